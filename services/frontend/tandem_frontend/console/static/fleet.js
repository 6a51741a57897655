// The fleet: totals, frontends and workers, as the stream of the console says each second.

import { el, setClass, setText } from "./dom.js";
import { age, amount, grouped, milliseconds, percent, UNKNOWN } from "./format.js";
import { Table } from "./table.js";

const TONES = { unreachable: "bad", draining: "warn" };
const HEALTH_TONES = { unhealthy: "bad", ejected: "warn" };

/** The state of the fleet, updated by each event of the stream. */
export class FleetState {
  constructor() {
    this.workers = new Map();
    this.last = null;
  }

  apply(event) {
    if (event.is_whole) this.workers.clear();
    for (const id of event.removed) this.workers.delete(id);
    for (const row of event.workers) {
      row.tone = TONES[row.state] ?? HEALTH_TONES[row.health] ?? "";
      this.workers.set(row.id, row);
    }
    this.last = event;
  }
}

function nameCell(cell, row) {
  setText(cell, row.id);
  if (cell.title !== row.id) cell.title = row.id;
}

const named = (head) => ({ head, width: "w-name", className: "name", value: (row) => row.id, draw: nameCell });
const figure = (head, title, field, text, width = "w-5") => ({
  head, title, width, className: "figure", descends: true, value: (row) => row[field], text: (row) => text(row[field]),
});
const word = (head, field, width) => ({
  head, width, className: field, value: (row) => row[field], text: (row) => row[field],
});
const aged = (now) => ({
  head: "Age", title: "Since its start", width: "w-5", className: "figure", value: (row) => -row.epoch,
  text: (row) => age(now() - row.epoch / 1e3),
});

/** KV in use as a bar: held by requests, then only by the prefix cache; the rest is free. */
function kvCell(cell, row) {
  if (!cell.firstChild) cell.append(el("span", { class: "kv" }, el("i", { class: "used" }), el("i", { class: "cached" })), el("span"));
  const [bar, text] = cell.children;
  const known = row.kv_capacity_tokens && row.kv_used_tokens !== null;
  const used = known ? row.kv_used_tokens / row.kv_capacity_tokens : 0;
  const cached = known && row.kv_cached_tokens !== null ? row.kv_cached_tokens / row.kv_capacity_tokens : 0;
  bar.children[0].style.width = `${100 * used}%`;
  bar.children[1].style.width = `${100 * cached}%`;
  setText(text, known ? percent(used) : UNKNOWN);
}

const kvUsed = (row) => (row.kv_capacity_tokens ? row.kv_used_tokens / row.kv_capacity_tokens : null);

export class FleetView {
  constructor(state) {
    this.state = state;
    const now = () => this.state.last?.time_s ?? 0;
    this.figures = [
      ["workers", "Workers that report, of those registered"],
      ["open", "Requests in progress"],
      ["waiting", "Requests in the frontends' queues"],
      ["tokens/s", "Completion tokens per second, of the last five"],
      ["KV B/s", "KV moved between workers per second"],
      ["finished", "Requests since the frontends' start"],
      ["failed", "Requests that failed with an error of the cluster"],
      ["continued", "Streams that continued on other workers"],
      ["refused", "Requests refused before any leg was sent"],
    ].map(([name, title]) => {
      const value = el("dd");
      return { name, value, element: el("div", { title }, el("dt", {}, name), value) };
    });
    this.frontends = new Table({
      label: "Frontends",
      sort: { column: 0, descending: false },
      height: 200,
      columns: [
        named("Frontend"),
        word("State", "state", "w-10"),
        aged(now),
        figure("Open", "Requests in progress", "open_requests", amount),
        figure("Wait", "Requests in its queue", "waiting_requests", amount),
        ...["ttft", "itl"].flatMap((of) => ["p50", "p90", "p99"].map((p) =>
          figure(`${of.toUpperCase()} ${p}`, "ms, over the last minute", `${of}_${p}_s`, milliseconds, "w-7"))),
        figure("Done", "Finished requests", "finished_requests", amount),
        figure("Fail", "Failed requests", "failed_requests", amount),
        figure("Cont", "Streams that continued on other workers", "continuations", amount),
        figure("Refused", "Refused requests", "refused_requests", amount, "w-6"),
      ],
    });
    this.workers = new Table({
      label: "Workers",
      sort: { column: 0, descending: false },
      onChoose: (row) => this.#choose(row.id),
      columns: [
        named("Worker"),
        word("Role", "role", "w-8"),
        word("State", "state", "w-10"),
        word("Health", "health", "w-8"),
        aged(now),
        figure("Run", "Requests that run in the engine", "running_requests", amount),
        figure("Wait", "Requests in the engine's queue", "waiting_requests", amount),
        figure("Queue", "Prompt tokens in the engine's queue", "waiting_tokens", amount, "w-6"),
        figure("Hit %", "Prompt tokens that were in the prefix cache, of all", "hit_ratio", percent),
        { head: "KV %", title: "KV held by requests, and by the prefix cache only", width: "w-kv", className: "figure", descends: true, value: kvUsed, draw: kvCell },
        figure("Tok/s", "Prompt tokens of prefill workers, completion tokens of others", "tokens_per_s", amount, "w-6"),
        figure("KV B/s", "KV sent by prefill workers, received by decode workers", "kv_bytes_per_s", amount, "w-6"),
        figure("Fail", "Failed legs, as the frontends count them", "failures", amount),
        figure("Epoch", "Grows with each start of the worker", "epoch", String, "w-12"),
      ],
    });
    this.search = el("input", { type: "search", placeholder: "Filter", "aria-label": "Filter workers by any text", "aria-keyshortcuts": "/", spellcheck: "false" });
    this.search.addEventListener("input", () => this.#filter());
    this.count = el("span", { class: "quiet", role: "status" });
    this.detail = el("aside", { "aria-label": "Worker", hidden: true });
    this.chosen = null;
    this.element = el("section", { class: "fleet" },
      el("dl", { class: "figures" }, ...this.figures.map((one) => one.element)),
      this.frontends.element,
      el("div", { class: "bar" }, this.search, this.count),
      el("div", { class: "split" }, this.workers.element, this.detail));
  }

  open() {
    this.update();
  }

  close() {}

  focusSearch() {
    this.search.focus();
  }

  update() {
    const event = this.state.last;
    if (event === null) return;
    const rows = [...this.state.workers.values()];
    const { totals } = event;
    const alive = rows.filter((row) => row.state !== "unreachable").length;
    const texts = [
      `${alive}/${rows.length}`, amount(totals.open_requests), amount(totals.waiting_requests),
      amount(totals.completion_tokens_per_s), amount(totals.kv_transfer_bytes_per_s), amount(totals.finished_requests),
      amount(totals.failed_requests), amount(totals.continuations), amount(totals.refused_requests),
    ];
    this.figures.forEach((one, index) => setText(one.value, texts[index]));
    setClass(this.figures[0].element, alive < rows.length ? "warn" : "");
    setClass(this.figures[6].element, totals.failed_requests > 0 ? "bad" : "");
    for (const row of event.frontends) row.tone = TONES[row.state] ?? "";
    this.frontends.set(event.frontends);
    this.workers.set(rows);
    this.#countShown();
    if (this.chosen !== null) this.#drawDetail();
  }

  #filter() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const of = (row) => `${row.id} ${row.role} ${row.state} ${row.health} ${row.address} ${row.model}`.toLowerCase();
    this.workers.filter((row) => words.every((one) => of(row).includes(one)));
    this.#countShown();
  }

  #countShown() {
    const all = this.state.workers.size;
    const shown = this.workers.shown.length;
    setText(this.count, shown === all ? `${all} workers` : `${shown} of ${all} workers`);
  }

  #choose(id) {
    this.chosen = this.chosen === id ? null : id;
    if (this.chosen === null) this.workers.choose(null);
    this.#drawDetail();
  }

  #drawDetail() {
    const row = this.state.workers.get(this.chosen);
    this.detail.hidden = row === undefined;
    if (row === undefined) return;
    const facts = [
      ["Role", row.role], ["State", row.state], ["Health", row.health], ["Address", row.address], ["Epoch", String(row.epoch)],
      ["Started", new Date(row.epoch).toISOString().replace("T", " ").replace("Z", " UTC")],
      ["Model", row.model], ["Engine", row.engine],
      ["KV used", grouped(row.kv_used_tokens)], ["KV cached", grouped(row.kv_cached_tokens)],
      ["KV free", grouped(row.kv_free_tokens)], ["KV capacity", grouped(row.kv_capacity_tokens)],
      ["Running", grouped(row.running_requests)], ["Waiting", grouped(row.waiting_requests)],
      ["Queued tokens", grouped(row.waiting_tokens)], ["Failed legs", grouped(row.failures)],
    ];
    this.detail.replaceChildren(
      el("h2", {}, row.id),
      el("dl", { class: "facts" }, ...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
  }
}
