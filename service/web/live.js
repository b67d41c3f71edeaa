// Metrics of the last minutes, from GET /events, and a burst of requests to which the server adapts.

import { byId, el, onWidth, percent, setVar, svg } from "./dom.js";
import { classifyMany, ServerError } from "./server.js";
import { sample } from "./photo.js";

const [SHORTEST_S, WINDOW_S] = [60, 180]; // bounds of the time axis, which grows with the samples
const SMOOTH = 5; // seconds over which a tile averages
const SPARK_HEIGHT = 36;
const MIX_HEIGHT = 120;
const SHOWN = 4; // sub-networks in the legend
const REOPEN_MS = 3000;
// Limits of a burst. The budget of an image is at most six times the latency of the largest sub-network for one image:
// too short for that sub-network to run under this load.
const PAUSE_MS = 200; // after a rejection
const BURST = { loops: 3, images: 16, seconds: 10, most: 2400, leastMs: 100, times: 6 };

const TILES = [
  { key: "rate", name: "Requests / s", show: (value) => value.toFixed(value < 10 ? 1 : 0) },
  { key: "attainment", name: "In time", show: (value) => percent(value, 1), top: 1 },
  { key: "loss", name: "Accuracy loss", show: (value) => `${(100 * value).toFixed(1)} pts` },
  { key: "queued", name: "Queue", show: (value) => value.toFixed(0) },
  { key: "utilization", name: "Utilization", show: (value) => percent(value), top: 1 },
];

export class Live {
  #points = []; // one for each second
  #last = null;
  #tiles = new Map();
  #costs = new Map(); // GFLOPs by "grid@rate"
  #source = null;
  #burst = null;
  #burstMs = BURST.leastMs;

  constructor({ gone, budgetMs, failed }) {
    Object.assign(this, { gone, budgetMs, failed });
    for (const tile of TILES) this.#tiles.set(tile.key, makeTile(tile));
    byId("tiles").append(...[...this.#tiles.values()].map(({ node }) => node));
    onWidth(byId("mix"), () => this.#draw());
    byId("burst").addEventListener("click", () => (this.#burst ? this.#burst.abort() : this.#sendBurst()));
  }

  /** Set the sub-networks, and stream events while the page is visible: a browser has six connections to a server. */
  describe(rows) {
    this.#costs = new Map(rows.map((row) => [`${row.patch_grid}@${+row.keep_rate.toPrecision(6)}`, row.gflops]));
    document.onvisibilitychange = () => (document.hidden ? this.#source?.close() : this.#listen());
    this.#burstMs = Math.max(BURST.leastMs, Math.round(BURST.times * rows.at(-1).latency_ms[1]));
    byId("burst").disabled = false;
    this.#listen();
  }

  #listen() {
    this.#source?.close();
    const source = (this.#source = new EventSource("events"));
    source.onmessage = ({ data }) => this.#take(JSON.parse(data));
    source.onerror = () => {
      source.close();
      if (this.#source !== source) return;
      this.gone(() => setTimeout(() => this.#source === source && this.#listen(), REOPEN_MS));
    };
  }

  #take(sample) {
    const last = this.#last;
    if (last && sample.at <= last.at) return; // known already: the server sends the last minutes first
    this.#last = sample;
    if (!last || sum(sample.requests) < sum(last.requests)) return; // the server restarted, so its counters did too
    this.#points.push(difference(last, sample));
    while (this.#points[0].at < sample.at - WINDOW_S) this.#points.shift();
    this.#draw();
  }

  #draw() {
    if (!this.#points.length) return;
    const now = this.#last.at;
    const shownS = Math.min(WINDOW_S, Math.max(SHORTEST_S, now - this.#points[0].at));
    for (const tile of TILES) this.#tiles.get(tile.key).update(this.#points, now, shownS);
    this.#drawMix(now, shownS);
  }

  #drawMix(now, shownS) {
    const width = byId("mix").clientWidth;
    if (!width) return;
    const used = new Set(this.#points.flatMap((point) => Object.keys(point.mix)));
    const names = [...used].sort((a, b) => (this.#costs.get(a) ?? 0) - (this.#costs.get(b) ?? 0));
    const tops = this.#points.map((point) => sum(point.mix));
    const most = Math.max(1, ...tops);
    const x = (at) => width * (1 - (now - at) / shownS);
    const y = (value) => MIX_HEIGHT - (MIX_HEIGHT - 18) * (value / most);
    const base = this.#points.map(() => 0);
    const areas = names.map((name) => {
      const lower = [...base];
      this.#points.forEach((point, index) => (base[index] += point.mix[name] ?? 0));
      const forth = this.#points.map((point, index) => `${x(point.at)},${y(base[index])}`);
      const back = this.#points.map((point, index) => `${x(point.at)},${y(lower[index])}`).reverse();
      return this.#coloured(svg("polygon", { points: [...forth, ...back].join(" ") }), name);
    });
    const peak = svg("text", { x: 0, y: 12 }, tops.some(Boolean) ? `peak ${most.toFixed(0)} / s` : "No answers in the last three minutes");
    const frame = { width, height: MIX_HEIGHT, role: "img", "aria-label": `Answers per second, at most ${most.toFixed(0)}` };
    const ground = svg("line", { class: "rule", x1: 0, x2: width, y1: MIX_HEIGHT, y2: MIX_HEIGHT });
    byId("mix").replaceChildren(svg("svg", frame, ...areas, ground, peak));
    this.#legend(names);
  }

  #legend(names) {
    const counts = names.map((name) => [name, this.#points.reduce((total, point) => total + (point.mix[name] ?? 0), 0)]);
    const all = counts.reduce((total, [, count]) => total + count, 0);
    const most = counts.sort((a, b) => b[1] - a[1]).slice(0, SHOWN);
    byId("mix-legend").replaceChildren(
      ...most.map(([name, count]) => {
        const share = count / all < 0.01 ? "< 1 %" : percent(count / all);
        return el("li", {}, this.#coloured(el("i"), name), `grid ${name.replace("@", " · keep ")}`, el("b", {}, share));
      }),
    );
  }

  /** Colour by cost: the more GFLOPs, the stronger. */
  #coloured(node, name) {
    const costs = [...this.#costs.values()];
    const [low, high] = [Math.min(...costs), Math.max(...costs)];
    const share = ((this.#costs.get(name) ?? low) - low) / (high - low || 1);
    return setVar(node, "--strength", `${Math.round(22 + 78 * share)}%`);
  }

  async #sendBurst() {
    const burst = (this.#burst = new AbortController());
    const button = byId("burst");
    const budgetMs = Math.min(this.budgetMs(), this.#burstMs);
    const counts = { sent: 0, met: 0, late: 0, rejected: 0 };
    const endsAt = performance.now() + 1000 * BURST.seconds;
    const say = (more) => {
      const left = [`${counts.met} in time`, counts.late && `${counts.late} late`, counts.rejected && `${counts.rejected} rejected`];
      byId("live-note").textContent = `${more} with ${budgetMs} ms each: ${left.filter(Boolean).join(", ")}`;
    };
    button.textContent = "Stop";
    try {
      const image = await sample();
      const loop = async () => {
        while (performance.now() < endsAt && counts.sent < BURST.most && !burst.signal.aborted) {
          counts.sent += BURST.images;
          await sendOnce(image, budgetMs, burst.signal, counts);
          say("Sending");
        }
      };
      await Promise.all(Array.from({ length: BURST.loops }, loop));
      say(`Sent ${counts.sent}`);
    } catch (error) {
      burst.abort();
      if (error.name !== "AbortError") this.failed(error);
      say(`Stopped after ${counts.sent}`);
    }
    this.#burst = null;
    button.textContent = "Send a burst";
  }
}

async function sendOnce(image, budgetMs, signal, counts) {
  try {
    const results = await classifyMany(image, BURST.images, { budget_ms: budgetMs, top_k: 1 }, signal);
    for (const result of results) {
      if (result.status !== 200) counts.rejected += 1;
      else if (result.deadline_met) counts.met += 1;
      else counts.late += 1;
    }
    if (results.some((result) => result.status !== 200)) await pause();
  } catch (error) {
    if (!(error instanceof ServerError) || ![429, 504].includes(error.status)) throw error;
    counts.rejected += BURST.images;
    await pause();
  }
}

/** Wait as a client should that was rejected. */
function pause() {
  return new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
}

/** Return the rates between two samples, per second. */
function difference(last, sample) {
  const seconds = sample.at - last.at;
  const grown = (name) => sample[name] - last[name];
  const mix = {};
  let answers = 0;
  for (const [name, count] of Object.entries(sample.subnetworks)) {
    const more = count - (last.subnetworks[name] ?? 0);
    answers += more;
    if (more > 0) mix[name] = more / seconds;
  }
  const promised = grown("met") + grown("missed");
  return {
    at: sample.at,
    mix,
    rate: (sum(sample.requests) - sum(last.requests)) / seconds,
    attainment: promised ? grown("met") / promised : null,
    loss: answers ? grown("accuracy_loss") / answers : null,
    queued: sample.queued,
    utilization: sample.gpu ?? Math.min(1, sample.own_cpu),
  };
}

function makeTile({ key, name, show, top }) {
  const value = el("b", {}, "–");
  const spark = el("div", { class: "spark" });
  const node = el("div", { class: "tile" }, el("h3", {}, name), value, spark);
  const update = (points, now, shownS) => {
    const known = points.filter((point) => point[key] !== null);
    const recent = known.filter((point) => point.at > now - SMOOTH);
    value.textContent = recent.length ? show(recent.reduce((total, point) => total + point[key], 0) / recent.length) : "–";
    const width = spark.clientWidth;
    const most = top ?? Math.max(1e-9, ...known.map((point) => point[key]));
    const place = (point) => [width * (1 - (now - point.at) / shownS), SPARK_HEIGHT - 1 - (SPARK_HEIGHT - 3) * (point[key] / most)];
    const line = known.map((point) => place(point).map((at) => at.toFixed(1)).join(",")).join(" ");
    spark.replaceChildren(svg("svg", { width, height: SPARK_HEIGHT, "aria-hidden": "true" }, svg("polyline", { points: line })));
  };
  return { node, update };
}

const sum = (counts) => Object.values(counts).reduce((total, count) => total + count, 0);
