// A table of any number of rows: only those in view are in the document, so that thousands scroll and change smoothly.
//
// Owns order, keys and scrolling. Each column says what its cells hold:
//   {head, title, className, value: row => sort key, text: row => string, draw: (cell, row) => void}

import { el, setClass, setText } from "./dom.js";

const ROW_HEIGHT = 26;
const BLOCK = 12;

export class Table {
  /** `columns`, the name of the table, and what to do with a row that is chosen with Enter or a click. */
  constructor({ columns, label, sort, onChoose = () => {}, height = null }) {
    this.columns = columns;
    this.sort = sort;
    this.onChoose = onChoose;
    this.rows = [];
    this.shown = [];
    this.active = null;
    this.keep = () => true;
    this.pool = [];
    this.first = 0;
    this.heads = columns.map((column, index) => this.#head(column, index));
    this.body = el("tbody");
    this.above = el("tr", { "aria-hidden": "true" });
    this.below = el("tr", { "aria-hidden": "true" });
    this.body.append(this.above, this.below);
    const groups = el("colgroup", {}, ...columns.map((column) => el("col", { class: column.width })));
    this.table = el("table", { role: "grid", "aria-label": label }, groups, el("thead", {}, el("tr", {}, ...this.heads)), this.body);
    this.element = el("div", { class: "grid", tabindex: "0", "aria-label": label }, this.table);
    if (height !== null) this.element.style.maxHeight = `${height}px`;
    this.element.addEventListener("scroll", () => this.first === this.#firstInView() || this.draw(), { passive: true });
    this.element.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.draw()).observe(this.element);
    this.#markSort();
  }

  /** Show these rows, each with a stable `id`. */
  set(rows) {
    this.rows = rows;
    this.arrange();
  }

  /** Show only the rows that `keep` accepts. */
  filter(keep) {
    this.keep = keep;
    this.element.scrollTop = 0;
    this.arrange();
  }

  /** Order the rows again, and draw. */
  arrange() {
    const { value } = this.columns[this.sort.column];
    const sign = this.sort.descending ? -1 : 1;
    const unknown = (entry) => entry === null || entry === undefined;
    const keyed = this.rows.filter(this.keep).map((row) => [value(row), row]);
    keyed.sort(([a, left], [b, right]) => {
      // Unknown values come last in either direction; equal ones by id, so that rows do not swap each second.
      if (unknown(a) !== unknown(b)) return unknown(a) ? 1 : -1;
      const order = unknown(a) ? 0 : typeof a === "string" ? compareIds(a, b) : a - b;
      return sign * order || compareIds(left.id, right.id);
    });
    this.shown = keyed.map(([, row]) => row);
    this.table.setAttribute("aria-rowcount", String(this.shown.length + 1));
    this.draw();
  }

  /** Draw the rows in view. */
  draw() {
    const first = (this.first = this.#firstInView());
    const room = Math.ceil((this.element.clientHeight || 400) / ROW_HEIGHT) + 3 * BLOCK;
    const seen = this.shown.slice(first, first + room);
    while (this.pool.length < seen.length) this.pool.push(this.#row());
    this.pool.forEach((line, index) => {
      const row = seen[index];
      if (row === undefined) {
        line.tr.remove();
        return;
      }
      if (!line.tr.isConnected) this.body.insertBefore(line.tr, this.below);
      this.#fill(line, row, first + index);
    });
    this.above.style.height = `${first * ROW_HEIGHT}px`;
    this.below.style.height = `${Math.max(0, this.shown.length - first - seen.length) * ROW_HEIGHT}px`;
  }

  /** Make a row the active one, and scroll to it. */
  choose(id) {
    this.active = id;
    this.draw();
  }

  /** The first row to draw. It changes by blocks: between two of them, scrolling touches no element. */
  #firstInView() {
    return Math.max(0, Math.floor(this.element.scrollTop / ROW_HEIGHT / BLOCK) - 1) * BLOCK;
  }

  #head(column, index) {
    const button = el("button", { type: "button", title: column.title, onclick: () => this.#sortBy(index) }, column.head);
    return el("th", { scope: "col", class: column.className }, button);
  }

  #row() {
    const cells = this.columns.map((column) => el("td", { class: column.className, role: "gridcell" }));
    const tr = el("tr", { role: "row" }, ...cells);
    const line = { tr, cells, id: null };
    tr.addEventListener("click", () => {
      this.active = line.id;
      this.draw();
      this.#choose();
    });
    return line;
  }

  #fill(line, row, index) {
    const isActive = row.id === this.active;
    line.id = row.id;
    line.tr.setAttribute("aria-rowindex", String(index + 2));
    line.tr.setAttribute("aria-selected", String(isActive));
    setClass(line.tr, row.tone ?? "");
    this.columns.forEach((column, at) => {
      const cell = line.cells[at];
      if (column.draw) column.draw(cell, row);
      else setText(cell, column.text(row));
    });
  }

  #sortBy(column) {
    const descending = this.sort.column === column ? !this.sort.descending : Boolean(this.columns[column].descends);
    this.sort = { column, descending };
    this.#markSort();
    this.arrange();
  }

  #markSort() {
    this.heads.forEach((head, index) => {
      const order = this.sort.descending ? "descending" : "ascending";
      head.setAttribute("aria-sort", index === this.sort.column ? order : "none");
    });
  }

  #choose() {
    const row = this.shown.find((one) => one.id === this.active);
    if (row) this.onChoose(row);
  }

  #key(event) {
    if (event.target !== this.element) return;
    const page = Math.max(1, Math.floor(this.element.clientHeight / ROW_HEIGHT) - 2);
    const last = this.shown.length - 1;
    const at = this.shown.findIndex((row) => row.id === this.active);
    const to = { ArrowDown: at + 1, ArrowUp: at < 0 ? last : at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: last }[event.key];
    if (event.key === "Enter") this.#choose();
    else if (event.key === "Escape" && this.active !== null) this.choose(null);
    else if (to !== undefined && last >= 0) this.#goTo(Math.min(last, Math.max(0, to)));
    else return;
    event.preventDefault();
  }

  #goTo(index) {
    this.active = this.shown[index].id;
    const head = this.table.tHead.offsetHeight;
    const top = index * ROW_HEIGHT;
    const { scrollTop, clientHeight } = this.element;
    if (top < scrollTop) this.element.scrollTop = top;
    else if (top + ROW_HEIGHT + head > scrollTop + clientHeight) this.element.scrollTop = top + ROW_HEIGHT + head - clientHeight;
    this.draw();
  }
}

const collator = new Intl.Collator("en", { numeric: true });

/** Orders texts as people count: decode-9 before decode-10. */
export function compareIds(left, right) {
  return collator.compare(left, right);
}
