// The page: sign-in, views, and the stream of the fleet that all views share.

import { events, getJson, key, Refused } from "./api.js";
import { setClass, setText } from "./dom.js";
import { FleetState, FleetView } from "./fleet.js";
import { PlaygroundView } from "./playground.js";
import { RequestsView } from "./requests.js";

const RETRY_MS = 1000;
const RETRY_MS_MAX = 5000;

const header = document.querySelector("header");
const main = document.querySelector("#view");
const login = document.querySelector("#login");
const refusal = document.querySelector("#refusal");
const where = document.querySelector("#where");
const connection = document.querySelector("#connection");

let state = null;
let views = {};
let view = null;
let stream = null;
let frame = 0;

/** Back to the sign-in where the key is not accepted any more. Returns whether that was the problem. */
function onRefused(problem) {
  if (!(problem instanceof Refused) || problem.status !== 401) return false;
  leave("The key is not accepted any more.");
  return true;
}

function show() {
  const [name, id] = location.hash.replace(/^#\//, "").split("/");
  const next = Object.hasOwn(views, name) ? views[name] : views.fleet;
  if (view !== null) view.close();
  if (view !== next) main.replaceChildren(next.element);
  view = next;
  for (const link of header.querySelectorAll("nav a")) {
    const isCurrent = views[link.hash.slice(2)] === view;
    if (isCurrent) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  view.open(decoded(id));
}

/** A part of an address as text; as it is where it is malformed, as a link from elsewhere may be. */
function decoded(part) {
  try {
    return part && decodeURIComponent(part);
  } catch {
    return part;
  }
}

function say(text, tone = "") {
  setText(connection, text);
  setClass(connection, tone);
}

/** Draw at most once per frame, however many events arrive. */
function drawSoon() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    view?.update();
  });
}

async function follow() {
  const own = (stream = new AbortController());
  let wait = RETRY_MS;
  while (!own.signal.aborted) {
    try {
      for await (const event of events("/api/fleet", { signal: own.signal })) {
        wait = RETRY_MS;
        state.apply(event);
        setText(where, [event.model, event.frontend].filter(Boolean).join(" · "));
        if (event.is_registry_live) say("live", "good");
        else say("no registry responds: the last known workers", "warn");
        drawSoon();
      }
    } catch (problem) {
      if (own.signal.aborted || onRefused(problem)) return;
    }
    if (own.signal.aborted) return;
    say("reconnecting", "bad");
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(RETRY_MS_MAX, 2 * wait);
  }
}

function pause() {
  stream?.abort();
  stream = null;
}

/** Everything is made anew for each sign-in: the next user of a tab sees nothing of the last one. */
function enter() {
  state = new FleetState();
  const options = { onRefused, state };
  views = { fleet: new FleetView(state), requests: new RequestsView(options), playground: new PlaygroundView(options) };
  login.hidden = true;
  header.hidden = false;
  main.hidden = false;
  show();
  follow();
}

function leave(reason = "") {
  pause();
  key.forget();
  view?.close();
  view = null;
  views = {};
  main.replaceChildren();
  header.hidden = true;
  main.hidden = true;
  login.hidden = false;
  setText(refusal, reason);
  login.elements.key.focus();
}

login.addEventListener("submit", async (event) => {
  event.preventDefault();
  const given = login.elements.key.value.trim();
  try {
    await getJson("/api/requests", { key: given });
  } catch (problem) {
    setText(refusal, problem instanceof Refused && problem.status === 401 ? "This key is not accepted." : problem.message);
    return;
  }
  key.set(given);
  login.reset();
  setText(refusal, "");
  enter();
});

document.querySelector("#leave").addEventListener("click", () => leave());
window.addEventListener("hashchange", () => key.get() && show());
document.addEventListener("visibilitychange", () => {
  // A hidden page costs the cluster nothing.
  if (!key.get()) return;
  if (document.hidden) pause();
  else if (stream === null) follow();
});
document.addEventListener("keydown", (event) => {
  const isTyping = event.target instanceof HTMLInputElement || event.target instanceof HTMLTextAreaElement;
  if (event.key === "/" && !isTyping && view !== null) {
    event.preventDefault();
    view.focusSearch();
  }
});

if (key.get()) enter();
else leave();
