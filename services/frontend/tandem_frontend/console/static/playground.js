// A chat with the cluster, and the path of its last request: which workers serve it, and what they are doing.

import { events, getJson } from "./api.js";
import { el, setClass, setText } from "./dom.js";
import { duration, grouped } from "./format.js";
import { drawTimeline } from "./timeline.js";

const PLACEMENT = /^PLACEMENT_/;
const AGGREGATED = "Aggregated";
const legName = (route) => (route.prefill_worker_id ? undefined : AGGREGATED);

/** One leg on the page: its worker, and what that does. */
class LegPanel {
  constructor(name) {
    this.worker = el("span", { class: "worker" });
    this.doing = el("span", { class: "doing" });
    this.name = name;
    this.role = el("span", { class: "role" }, name);
    this.element = el("li", {}, this.role, this.worker, this.doing);
    this.show("", "", "idle");
  }

  show(worker, doing, state, name = this.name) {
    setText(this.role, name);
    setText(this.worker, worker || "–");
    setText(this.doing, doing);
    setClass(this.element, name === this.name ? state : `${state} alone`);
    this.element.dataset.state = state;
  }
}

export class PlaygroundView {
  constructor({ onRefused, state }) {
    this.state = state;
    this.onRefused = onRefused;
    this.messages = [];
    this.running = null;
    this.models = [];
    this.model = el("select", { "aria-label": "Model" });
    this.modelLabel = el("label", { hidden: true }, "Model ", this.model);
    this.log = el("div", { class: "log", role: "log", "aria-label": "Conversation", tabindex: "0" });
    this.text = el("textarea", { rows: "3", "aria-label": "Message", placeholder: "Message", "aria-keyshortcuts": "Control+Enter" });
    this.max = el("input", { type: "number", min: "1", value: "128", "aria-label": "Maximum number of tokens" });
    this.temperature = el("input", { type: "number", min: "0", max: "2", step: "0.1", value: "0", "aria-label": "Temperature" });
    this.send = el("button", { type: "submit", title: "Ctrl+Enter" }, "Send");
    this.stop = el("button", { type: "button", title: "Escape", disabled: true, onclick: () => this.running?.abort() }, "Stop");
    this.clear = el("button", { type: "button", onclick: () => this.#clear() }, "Clear");
    this.form = el("form", { class: "ask", onsubmit: (event) => this.#submit(event) }, this.text,
      el("div", { class: "bar" }, this.send, this.stop, this.clear,
        this.modelLabel, el("label", {}, "Max tokens ", this.max), el("label", {}, "Temperature ", this.temperature)));
    this.text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
    this.frontend = new LegPanel("Frontend");
    this.prefill = new LegPanel("Prefill leg");
    this.decode = new LegPanel("Decode leg");
    this.why = el("p", { class: "why" });
    this.result = el("dl", { class: "facts" });
    this.path = el("aside", { class: "path", "aria-label": "Path of the request", "aria-live": "polite" },
      el("ol", {}, this.frontend.element, this.prefill.element, this.decode.element), this.why, this.result);
    this.timeline = el("div", { class: "detail", hidden: true, tabindex: "0", "aria-label": "Timeline of the last request" });
    this.element = el("section", { class: "playground" },
      el("div", { class: "split" }, el("div", { class: "talk" }, this.log, this.form), this.path), this.timeline);
    this.element.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.running?.abort();
    });
  }

  async open() {
    this.text.focus();
    try {
      this.models = (await getJson("/api/models")).models;
      const chosen = this.model.value;
      this.model.replaceChildren(...this.models.map((one) => el("option", { value: one.name }, one.name)));
      if (this.models.some((one) => one.name === chosen)) this.model.value = chosen;
      this.modelLabel.hidden = this.models.length < 2;
    } catch (problem) {
      if (!this.onRefused(problem)) this.#note(problem.message);
    }
  }

  close() {}

  update() {}

  focusSearch() {
    this.text.focus();
  }

  #clear() {
    this.running?.abort();
    this.messages = [];
    this.log.replaceChildren();
  }

  #note(text) {
    this.log.append(el("p", { class: "bad", role: "alert" }, text));
    this.log.scrollTop = this.log.scrollHeight;
  }

  #entry(role) {
    const body = el("div", { class: "said" });
    this.log.append(el("div", { class: `entry ${role}` }, el("span", { class: "role" }, role), body));
    return body;
  }

  #submit(event) {
    event.preventDefault();
    const text = this.text.value;
    if (!text.trim() || this.running !== null) return;
    this.text.value = "";
    this.messages.push({ role: "user", content: text });
    this.#entry("user").textContent = text;
    this.#run();
  }

  #request() {
    const body = { sampling: { temperature: Number(this.temperature.value) }, stopping: { max_tokens: Number(this.max.value) } };
    const model = this.models.find((one) => one.name === this.model.value);
    if (model) body.model = model.name;
    // A model without a chat template continues plain text.
    if (model?.has_chat_template === false) body.prompt = this.messages.at(-1).content;
    else body.chat = { messages: this.messages };
    return body;
  }

  async #run() {
    this.running = new AbortController();
    this.send.disabled = true;
    this.stop.disabled = false;
    const answer = this.#entry("assistant");
    this.#begin();
    let text = "";
    try {
      for await (const event of events("/api/generate", { body: this.#request(), signal: this.running.signal })) {
        if (event.error) throw new Error(event.error.message);
        if (event.accepted) this.#accepted(event.accepted);
        if (event.chunk) {
          text += event.chunk.text;
          answer.append(event.chunk.text);
          this.#chunk(event.chunk);
        }
        if (event.finish) this.#finish(event.finish);
      }
      this.messages.push({ role: "assistant", content: text });
    } catch (problem) {
      this.#failed(problem, text);
    } finally {
      this.running = null;
      this.send.disabled = false;
      this.stop.disabled = true;
    }
    await this.#drawTimeline();
  }

  #begin() {
    this.tokens = 0;
    this.request = null;
    this.frontend.show("", "tokenises, queues, routes", "active");
    this.prefill.show("", "", "idle");
    this.decode.show("", "", "idle");
    setText(this.why, "");
    this.result.replaceChildren();
    this.timeline.hidden = true;
  }

  #accepted(accepted) {
    this.request = accepted.request_id;
    this.route = accepted.route;
    const prompt = `${grouped(accepted.prompt_tokens)} prompt tokens`;
    this.frontend.show(this.state.last?.frontend ?? "", prompt, "done");
    if (this.route.prefill_worker_id) {
      this.prefill.show(this.route.prefill_worker_id, "computes the prompt", "active");
      this.decode.show(this.route.decode_worker_id, "waits for KV", "active");
    } else {
      this.prefill.show("", "none: one worker does both phases", "idle");
      this.decode.show(this.route.decode_worker_id, "computes the prompt", "active", AGGREGATED);
    }
    setText(this.why, whyChosen(this.route));
  }

  #chunk(chunk) {
    if (!this.tokens && this.route.prefill_worker_id) this.prefill.show(this.route.prefill_worker_id, "sent its KV", "done");
    this.tokens += chunk.token_ids.length;
    this.decode.show(this.route.decode_worker_id, `streams, ${grouped(this.tokens)} tokens`, "active", legName(this.route));
  }

  #finish(finish) {
    const { usage, timings, route } = finish;
    if (route.prefill_worker_id) this.prefill.show(route.prefill_worker_id, "done", "done");
    this.decode.show(route.decode_worker_id, `done, ${grouped(usage.completion_tokens)} tokens`, "done", legName(route));
    setText(this.why, whyChosen(route));
    const first = Date.parse(timings.first_token_time);
    const last = Date.parse(timings.last_token_time);
    const rate = last > first ? ((usage.completion_tokens - 1) * 1e3) / (last - first) : null;
    this.#facts([
      ["TTFT", timings.time_to_first_token ? duration(parseFloat(timings.time_to_first_token)) : null],
      ["Tokens/s", rate === null ? null : rate.toFixed(0)],
      ["KV moved", timings.kv_transfer_bytes ? `${grouped(Number(timings.kv_transfer_bytes))} B` : null],
      ["Cached", `${grouped(usage.cached_tokens)} of ${grouped(usage.prompt_tokens)}`],
      ["Finish", finish.reason.replace("FINISH_REASON_", "").toLowerCase()],
      ["Attempt", route.attempt > 1 ? String(route.attempt) : null],
    ]);
  }

  #facts(facts) {
    const known = facts.filter(([, value]) => value !== null);
    this.result.replaceChildren(...known.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  }

  #failed(problem, text) {
    const isStop = problem.name === "AbortError";
    for (const leg of [this.frontend, this.prefill, this.decode]) {
      if (leg.element.dataset.state === "active") leg.show(leg.worker.textContent, isStop ? "stopped" : "failed", isStop ? "idle" : "bad", leg.role.textContent);
    }
    if (isStop) this.messages.push({ role: "assistant", content: text });
    else {
      // What was refused is not a part of the conversation.
      this.messages.pop();
      if (!this.onRefused(problem)) this.#note(problem.message);
    }
  }

  async #drawTimeline() {
    if (this.request === null) return;
    try {
      const { timelines } = await getJson(`/api/requests/${encodeURIComponent(this.request)}`);
      this.timeline.replaceChildren(...timelines.map(drawTimeline));
      this.timeline.hidden = false;
    } catch (problem) {
      this.onRefused(problem);
    }
  }
}

/** Why the workers of a route were chosen, in words. */
export function whyChosen(route) {
  const parts = [];
  if (route.policy) parts.push(`chosen by ${route.policy}`);
  const placement = (route.placement ?? "").replace(PLACEMENT, "").toLowerCase().replaceAll("_", " ");
  if (placement && placement !== "unspecified") parts.push(`${route.prefill_worker_id ? "a pair" : "an aggregated worker"}: ${placement}`);
  if (route.expected_cached_tokens !== undefined) parts.push(`${grouped(route.expected_cached_tokens)} tokens expected in its prefix cache`);
  return parts.join(" · ");
}
