// The server as this page knows it: what it asks, what it makes of errors, and whether anything answers at all.

const RETRY_MS = 1000;
const KEY = "api-key"; // kept as long as the tab is open
const TITLES = {
  invalid_image: "That is no image the server can read",
  unsupported_media_type: "That is no image the server can read",
  image_too_large: "That image is too large",
  body_too_large: "That file is too large",
  upload_timeout: "The upload took too long",
  budget_too_small: "That budget is too small",
  overloaded: "The server is full",
  deadline_exceeded: "Too late",
  not_ready: "The server is not ready",
  unauthorized: "The server asks for a key",
  out_of_memory: "The server is out of memory",
};

/** What the server answers instead of what it was asked for; `retryAfterS` where it is worth another try. */
export class ServerError extends Error {
  constructor(status, error, retryAfterS) {
    super(error.message);
    this.status = status;
    this.code = error.code;
    this.title = TITLES[error.code] ?? "That did not work";
    this.retryAfterS = retryAfterS;
  }
}

/** Nothing answers. */
export class GoneError extends Error {
  constructor() {
    super("this page keeps trying and goes on by itself");
    this.title = "The server does not answer";
  }
}

let askForKey = async () => null;
let asking = null;

/** Say how a person is asked for an API key; yields it, or null where there is none to be had. */
export function onKeyWanted(ask) {
  askForKey = ask;
}

/** Ask for a key once, however many requests want it. */
async function newKey() {
  asking ??= askForKey().finally(() => (asking = null));
  const key = await asking;
  if (key) sessionStorage.setItem(KEY, key);
  return key;
}

async function ask(path, options = {}) {
  let response;
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { "X-API-Key": key } : {};
  try {
    response = await fetch(path, { cache: "no-store", headers, ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new GoneError();
  }
  if (response.ok) return response.json();
  // Another request may have got one meanwhile.
  if (response.status === 401 && (key !== sessionStorage.getItem(KEY) || (await newKey()))) return ask(path, options);
  let error = { code: "unknown", message: `it answered ${response.status}` };
  try {
    ({ error } = await response.json());
  } catch {
    // a proxy's page
  }
  throw new ServerError(response.status, error, Number(response.headers.get("Retry-After")) || null);
}

const query = (parameters) => {
  const given = Object.entries(parameters).filter(([, value]) => value != null);
  return given.length ? `?${new URLSearchParams(given)}` : "";
};

export const subnetworks = () => ask("subnetworks");

export const classify = (image, parameters, signal) =>
  ask(`classify${query(parameters)}`, { method: "POST", body: image, signal });

export const explain = (image, parameters, signal) =>
  ask(`explain${query(parameters)}`, { method: "POST", body: image, signal });

/** Classify many copies of an image with one request; answers one result for each, errors among them. */
export async function classifyMany(image, count, parameters, signal) {
  const form = new FormData();
  for (let index = 0; index < count; index++) form.append("file", image);
  return (await ask(`classify${query(parameters)}`, { method: "POST", body: form, signal })).results;
}

/** Wait until the server takes requests; `tell` hears of each try that fails. */
export async function untilReady(tell) {
  for (;;) {
    try {
      await ask("health/ready");
      return;
    } catch (error) {
      tell(error);
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }
}
