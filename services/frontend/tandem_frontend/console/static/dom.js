// Elements whose content is text: nothing here, or in any other module, makes markup of a string.

/** An element with attributes, listeners (`onclick`) and children, which are elements or text. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Set the text of an element, only where it differs: an unchanged node costs the browser nothing. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Set the class of an element, only where it differs. */
export function setClass(node, name) {
  if (node.className !== name) node.className = name;
}
