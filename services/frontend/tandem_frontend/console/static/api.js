// Calls of the console's own origin. The key is in a header and in this tab's session storage, never in an address.

const KEY = "tandem-console-key";

/** A call that the console refused; `code` says why, as in every error object of Tandem. */
export class Refused extends Error {
  constructor(status, error) {
    super(error?.message ?? `HTTP ${status}`);
    this.status = status;
    this.code = error?.code ?? "";
    this.param = error?.param ?? null;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

async function call(path, options = {}) {
  const response = await fetch(path, {
    ...options,
    cache: "no-store",
    credentials: "omit",
    headers: { ...options.headers, authorization: `Bearer ${options.key ?? key.get()}` },
  });
  if (response.ok) return response;
  let body = null;
  try {
    body = await response.json();
  } catch {
    // Not an error object: the status says enough.
  }
  throw new Refused(response.status, body?.error);
}

/** The JSON of a path. `options.key` replaces the stored key. */
export async function getJson(path, options) {
  return (await call(path, options)).json();
}

/** The events of a stream, each as the value of its JSON, until it ends or `signal` aborts it. */
export async function* events(path, { signal, body } = {}) {
  const posted = body && { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" } };
  const response = await call(path, { signal, ...posted });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    // A block of 300 KB arrives in pieces: only the new piece can hold an end of an event, or complete one.
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (block.startsWith("data: ")) yield JSON.parse(block.slice("data: ".length));
    }
  }
}
