// Connects the parts of the page: a photo and two budgets go in, the answer and its explanation are shown.

import { showAnswer, showNothing } from "./answer.js";
import { Budgets } from "./budgets.js";
import { Comparison } from "./compare.js";
import { byId, debounced, el } from "./dom.js";
import { Live } from "./live.js";
import { VariantMap } from "./map.js";
import { PatchView } from "./patches.js";
import { watchPhotos } from "./photo.js";
import { classify, explain, GoneError, onKeyWanted, ServerError, subnetworks, untilReady } from "./server.js";

const DEBOUNCE_MS = 120;
const EXPLAIN_TRIES = 5;
const MOST_BREAKS = 3; // failed tries in a row after which a photo is not sent again

let photo = null;
let asking = null; // the AbortController of the latest request
let explanations = new Map(); // of this photo, by sub-network
let isOnline = false;
let hasBeenOnline = false;

const map = new VariantMap();
const patches = new PatchView();
const budgets = new Budgets(debounced(() => ask(), DEBOUNCE_MS));
const comparison = new Comparison(() => photo, failed);
const live = new Live({
  gone: async (retry) => {
    await connect();
    retry();
  },
  budgetMs: () => budgets.ms,
  failed,
});

function setStatus(state, text) {
  const status = byId("status");
  if (status.dataset.state === state && status.textContent === text) return;
  status.dataset.state = state;
  status.replaceChildren(el("span", {}, text)); // a new element: resizing the old one would be a layout shift
}

function toast(title, message, kind = "error") {
  const [box, text] = [byId("toast"), message ? `${title}: ${message}` : title];
  const paragraph = box.querySelector("p");
  if (box.hidden || paragraph.textContent !== text) paragraph.textContent = text; // or a screen reader would repeat it
  box.hidden = false;
  box.dataset.kind = kind;
  clearTimeout(toast.timer);
  if (kind === "good") toast.timer = setTimeout(hideToast, 3000);
}

function hideToast() {
  byId("toast").hidden = true;
}

/** Show an error; reconnect or retry where that can help. */
function failed(error) {
  if (error instanceof GoneError || error.code === "not_ready") {
    // A photo that fails every time would otherwise be sent for ever.
    if (photo && ++photo.breaks > MOST_BREAKS) toast("The server cannot process this photo", "try another one");
    else {
      isOnline = false;
      connect();
    }
    return;
  }
  if (!(error instanceof ServerError)) throw error;
  if (error.status === 429) {
    const seconds = error.retryAfterS ?? 1;
    toast(error.title, `${error.message} (retrying in ${seconds} s)`);
    const wanted = asking;
    setTimeout(() => asking === wanted && ask(), 1000 * seconds);
    return;
  }
  toast(error.title, error.message);
}

/** Wait for the server, load its sub-networks, and classify the current photo again. */
let connecting = null;
function connect() {
  connecting ??= (async () => {
    await untilReady((error) => {
      isOnline = false;
      const isThere = error instanceof ServerError;
      setStatus(isThere ? "wait" : "gone", isThere ? "getting ready" : "offline");
      if (isThere) toast("Getting ready", `${error.message.split(";")[0]}. This page continues automatically.`, "wait");
      else toast(error.title, error.message);
    });
    if (isOnline) return;
    describe(await subnetworks());
    if (hasBeenOnline) toast("Back online", "", "good");
    else hideToast();
    isOnline = hasBeenOnline = true;
    ask();
  })()
    .catch((error) => {
      if (!(error instanceof GoneError) && !(error instanceof ServerError)) throw error;
      setTimeout(connect, 1000); // the server stopped between two requests
    })
    .finally(() => (connecting = null));
  return connecting;
}

/** Show the model that is served and its sub-networks. */
let served = null;
function describe(family) {
  served = family.model.version;
  setStatus("ready", family.model.name);
  byId("about").textContent = `${family.model.name} ${served} · ${family.num_classes} classes · ${family.engine}`;
  for (const part of [budgets, map, comparison, live]) part.describe(family.subnetworks);
  explanations = new Map();
}

/** After a model change, show the new model; the answers of a canary have another version without one. */
async function follow(answered) {
  if (answered.version === served) return;
  const family = await subnetworks();
  if (family.model.version !== served) describe(family);
}

/** Classify the photo under the budgets, and show which patches the sub-network that answered keeps. */
async function ask() {
  if (!photo || !isOnline) return;
  asking?.abort();
  const wanted = (asking = new AbortController());
  const limit = budgets.gflops;
  document.body.classList.add("busy");
  try {
    const answer = await classify(photo.body, budgets.parameters, wanted.signal);
    if (asking !== wanted) return;
    photo.breaks = 0;
    photo.isAnswered = true;
    await follow(answer.model);
    if (asking !== wanted) return;
    showAnswer(answer);
    map.mark(answer.subnetwork, limit);
    if (byId("toast").dataset.kind !== "good") hideToast();
    await look(answer.subnetwork, wanted);
  } catch (error) {
    if (error.name === "AbortError" || asking !== wanted) return;
    if (!photo.isAnswered) {
      showNothing(); // what is shown is the answer to another photo
      map.mark(null, limit);
    }
    failed(error);
  } finally {
    if (asking === wanted) document.body.classList.remove("busy");
  }
}

/** Show which patches a sub-network keeps; the server explains one image at a time, so this may need several tries. */
async function look({ patch_grid, keep_rate }, wanted) {
  const key = `${patch_grid}@${keep_rate}`;
  for (let tries = 0; tries < EXPLAIN_TRIES && asking === wanted; tries++) {
    try {
      if (!explanations.has(key)) {
        explanations.set(key, await explain(photo.body, { patch_grid, keep_rate, top_k: 1 }, wanted.signal));
      }
      if (asking === wanted) patches.explain(explanations.get(key));
      return;
    } catch (error) {
      if (!(error instanceof ServerError) || ![429, 504].includes(error.status)) throw error;
      patches.say("The explanation follows once the server has time for it.");
      await new Promise((resolve) => setTimeout(resolve, 1000 * (error.retryAfterS ?? 1)));
    }
  }
}

function askForKey() {
  const [dialog, input] = [byId("key"), byId("key-value")];
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "use" ? input.value.trim() : null), { once: true });
  });
}

showNothing();
onKeyWanted(askForKey);
byId("toast").querySelector("button").addEventListener("click", hideToast);
const takeFirst = watchPhotos((given) => {
  photo = { ...given, breaks: 0, isAnswered: false };
  explanations = new Map();
  patches.show(given);
  comparison.forget();
  ask();
});
takeFirst().catch(() => {}); // if the server has stopped in the meantime, `connect` reports it
connect();
