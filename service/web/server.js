// Requests to the server: their errors, the API key, and waiting until the server is ready.

const RETRY_MS = 1000;
const KEY = "api-key"; // kept as long as the tab is open
const TITLES = {
  invalid_image: "The server cannot read this image",
  unsupported_media_type: "The server cannot read this image",
  image_too_large: "The image is too large",
  body_too_large: "The file is too large",
  upload_timeout: "The upload took too long",
  budget_too_small: "The budget is too small",
  overloaded: "The server is overloaded",
  deadline_exceeded: "The deadline was exceeded",
  not_ready: "The server is not ready",
  unauthorized: "The server requires an API key",
  out_of_memory: "The server is out of memory",
};

/** An error that the server answered; `retryAfterS` is set if a retry may succeed. */
export class ServerError extends Error {
  constructor(status, error, retryAfterS) {
    super(error.message);
    this.status = status;
    this.code = error.code;
    this.title = TITLES[error.code] ?? "The request failed";
    this.retryAfterS = retryAfterS;
  }
}

/** The server cannot be reached. */
export class GoneError extends Error {
  constructor() {
    super("this page keeps retrying and continues automatically");
    this.title = "The server does not answer";
  }
}

let askForKey = async () => null;
let asking = null;

/** Set the function that asks the user for an API key; it resolves to the key, or to null without one. */
export function onKeyWanted(ask) {
  askForKey = ask;
}

/** Ask for a key once, however many requests need it. */
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
  // Another request may have set a new key in the meantime.
  if (response.status === 401 && (key !== sessionStorage.getItem(KEY) || (await newKey()))) return ask(path, options);
  let error = { code: "unknown", message: `the server answered with status ${response.status}` };
  try {
    ({ error } = await response.json());
  } catch {
    // not JSON: the page of a proxy
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

/** Classify many copies of an image with one request; return one result for each, which may be an error. */
export async function classifyMany(image, count, parameters, signal) {
  const form = new FormData();
  for (let index = 0; index < count; index++) form.append("file", image);
  return (await ask(`classify${query(parameters)}`, { method: "POST", body: form, signal })).results;
}

/** Wait until the server is ready; call `tell` with the error of each try that fails. */
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
