// Requests, newest first, and the timeline of the chosen one.

import { getJson } from "./api.js";
import { el, setText } from "./dom.js";
import { clock, duration, grouped } from "./format.js";
import { Table } from "./table.js";
import { drawTimeline, outcomeTone } from "./timeline.js";

const POLL_MS = 2000;

export class RequestsView {
  constructor({ onRefused }) {
    this.onRefused = onRefused;
    this.wanted = null;
    this.settled = null;
    this.isOpen = false;
    this.list = new Table({
      label: "Requests",
      sort: { column: 0, descending: true },
      onChoose: (row) => { location.hash = `#/requests/${encodeURIComponent(row.id)}`; },
      columns: [
        { head: "Received", width: "w-9", className: "figure", descends: true, value: (row) => row.begin_s, text: (row) => clock(row.begin_s) },
        { head: "Request", width: "w-id", className: "name", value: (row) => row.id, text: (row) => row.id },
        { head: "Operation", width: "w-10", value: (row) => row.operation, text: (row) => row.operation },
        { head: "Outcome", width: "w-8", className: "outcome", value: (row) => row.outcome, text: (row) => row.outcome },
        { head: "Took", width: "w-7", className: "figure", descends: true, value: (row) => row.took_s, text: (row) => duration(row.took_s) },
        { head: "Tokens", width: "w-6", className: "figure", descends: true, value: (row) => row.completion_tokens, text: (row) => grouped(row.completion_tokens) },
        { head: "Attempts", width: "w-7", className: "figure", descends: true, value: (row) => row.attempts, text: (row) => grouped(row.attempts) },
        { head: "Frontend", width: "w-name", value: (row) => row.frontend, text: (row) => row.frontend },
      ],
    });
    this.search = el("input", { type: "search", placeholder: "Request id or x-request-id", "aria-label": "Request id or x-request-id", "aria-keyshortcuts": "/", spellcheck: "false" });
    this.note = el("span", { class: "quiet", role: "status" });
    this.detail = el("div", { class: "detail", tabindex: "0", "aria-label": "Timeline of the chosen request", "aria-live": "polite" });
    const form = el("form", { class: "bar", onsubmit: (event) => this.#find(event) }, this.search, el("button", { type: "submit" }, "Find"), this.note);
    this.element = el("section", { class: "requests" }, form, this.list.element, this.detail);
  }

  open(id) {
    this.isOpen = true;
    this.wanted = id || null;
    this.settled = null;
    this.list.choose(this.wanted);
    this.detail.hidden = this.wanted === null;
    this.detail.replaceChildren();
    this.#poll();
  }

  close() {
    this.isOpen = false;
    clearTimeout(this.timer);
  }

  update() {}

  focusSearch() {
    this.search.focus();
  }

  #find(event) {
    event.preventDefault();
    const id = this.search.value.trim();
    if (id) location.hash = `#/requests/${encodeURIComponent(id)}`;
  }

  async #poll() {
    clearTimeout(this.timer);
    if (!this.isOpen) return;
    // A hidden page asks nothing of the cluster.
    if (!document.hidden) await Promise.all([this.#list(), this.#timeline()]);
    if (this.isOpen) this.timer = setTimeout(() => this.#poll(), POLL_MS);
  }

  async #list() {
    try {
      const { requests, silent } = await getJson("/api/requests");
      for (const row of requests) row.tone = outcomeTone(row.outcome);
      this.list.set(requests);
      setText(this.note, silent.length ? `${silent.join(", ")} did not respond` : requests.length ? "" : "no requests yet");
    } catch (problem) {
      if (!this.onRefused(problem)) setText(this.note, problem.message);
    }
  }

  async #timeline() {
    const id = this.wanted;
    if (id === null || this.settled === id) return;
    try {
      const { timelines } = await getJson(`/api/requests/${encodeURIComponent(id)}`);
      if (this.wanted !== id) return;
      this.detail.replaceChildren(...timelines.map(drawTimeline));
      // The timeline of a request that has ended does not change any more.
      if (!timelines.some((one) => one.is_open)) this.settled = id;
    } catch (problem) {
      if (this.wanted === id && !this.onRefused(problem)) this.detail.replaceChildren(el("p", { class: "bad" }, problem.message));
    }
  }
}
