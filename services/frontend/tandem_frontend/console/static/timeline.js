// One request's timeline: the lines of `tandem trace`, with their bars.

import { el } from "./dom.js";
import { clock, duration } from "./format.js";

const BEYOND_FIRST_TOKEN = 1.15;

/** The element of a timeline. */
export function drawTimeline(timeline) {
  const received = [
    `received ${clock(timeline.begin_s)} by ${timeline.frontend}`, timeline.operation, timeline.model,
    timeline.tenant && `tenant ${timeline.tenant}`,
  ];
  const ids = [timeline.call_id && `x-request-id ${timeline.call_id}`, timeline.trace_id && `trace ${timeline.trace_id}`];
  const title = [el("span", { class: "id" }, timeline.id || "without an id"), " ", el("small", { class: outcomeTone(timeline.ending) }, timeline.ending)];
  const table = el("div");
  const draw = (shown) => table.replaceChildren(drawLines(timeline, shown));
  draw(timeline.shown_s);
  return el("article", { class: "timeline" },
    el("h2", {}, ...title),
    sentence(received), sentence(timeline.stats), sentence([timeline.error], "bad"), sentence(ids, "quiet"),
    drawZoom(timeline, draw), table);
}

/** The tone of an outcome. */
export function outcomeTone(ending) {
  return /^failed/.test(ending) ? "bad" : /^(refused|cancelled)/.test(ending) ? "warn" : "";
}

function sentence(parts, tone) {
  const known = parts.filter(Boolean);
  return known.length ? el("p", { class: tone }, known.join(" · ")) : null;
}

/** Buttons that choose the time in view: most of what matters lies before the first token, most of the time after it. */
function drawZoom(timeline, draw) {
  const first = timeline.first_token_s;
  if (first === null || first * BEYOND_FIRST_TOKEN >= timeline.shown_s) return null;
  const buttons = [["whole request", timeline.shown_s], ["to the first token", first * BEYOND_FIRST_TOKEN]].map(([name, shown], index) =>
    el("button", { type: "button", "aria-pressed": String(index === 0), onclick: (event) => choose(event.target, shown) }, name));
  function choose(chosen, shown) {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button === chosen));
    draw(shown);
  }
  return el("div", { class: "zoom", role: "group", "aria-label": "Time in view" }, ...buttons);
}

function drawLines(timeline, shown) {
  const head = el("tr", {},
    el("th", { class: "figure", scope: "col" }, "At"), el("th", { class: "figure", scope: "col" }, "Took"),
    el("th", { class: "track", scope: "col" }, el("span", {}, "0"), el("span", {}, duration(shown))),
    el("th", { class: "what", scope: "col" }, "What"));
  return el("table", { class: "lines", "aria-label": "Timeline" }, el("thead", {}, head),
    el("tbody", {}, ...timeline.lines.map((line) => drawLine(line, shown))));
}

function drawLine(line, shown) {
  const isOpen = line.end_s === null;
  const end = isOpen ? shown : line.end_s;
  const took = line.is_moment ? "" : isOpen ? "open" : duration(end - line.begin_s);
  const isBeyond = line.begin_s > shown;
  const bar = el("i", { class: `${line.is_moment ? "moment" : isOpen ? "open" : "span"} ${line.part}`, hidden: isBeyond });
  if (shown > 0 && !isBeyond) {
    const from = Math.max(0, line.begin_s / shown);
    bar.style.left = `${100 * from}%`;
    if (!line.is_moment) bar.style.width = `${100 * Math.max(0, Math.min(1, end / shown) - from)}%`;
  }
  const what = el("td", { class: "what" }, line.text);
  what.style.paddingLeft = `${line.depth * 1.25 + 0.75}rem`;
  const figures = [duration(line.begin_s), took].map((text) => el("td", { class: "figure" }, text));
  return el("tr", { class: isBeyond ? "beyond" : null }, ...figures, el("td", { class: "track" }, bar), what);
}
