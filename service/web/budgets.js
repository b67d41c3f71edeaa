// The two budget sliders, scaled to the sub-networks of the server.

import { byId, el, gflops, setVar } from "./dom.js";

const LONGEST_MS = 5000;
const DEFAULT_MS = 1000;
const OVERHEAD_MS = 5; // of network and decoding, added to the latency of the fastest sub-network

export class Budgets {
  #cheapest = 0;
  #dearest = 1;
  #shortestMs = 1;

  constructor(changed) {
    this.compute = byId("gflops");
    this.latency = byId("ms");
    for (const slider of [this.compute, this.latency]) {
      slider.addEventListener("input", () => {
        this.#show();
        changed();
      });
    }
  }

  /** Set the scales from the sub-networks of GET /subnetworks, cheapest first. */
  describe(rows) {
    const frontier = rows.filter((row) => row.on_frontier);
    const fastest = Math.min(...rows.map((row) => row.latency_ms[1]));
    this.#cheapest = rows[0].gflops;
    this.#dearest = rows.at(-1).gflops;
    this.#shortestMs = Math.max(2, Math.ceil(fastest + OVERHEAD_MS));
    if (this.latency.disabled) this.latency.value = 100 * this.#placeOfMs(DEFAULT_MS);
    this.compute.disabled = this.latency.disabled = false;
    ticks("gflops-ticks", rows, (row) => (row.gflops - this.#cheapest) / (this.#dearest - this.#cheapest));
    ticks("ms-ticks", frontier, (row) => this.#placeOfMs(row.latency_ms[1]));
    this.#show();
  }

  /** The compute budget in GFLOPs; null for no limit. */
  get gflops() {
    const share = this.compute.value / this.compute.max;
    if (share === 1) return null;
    return Math.max(this.#cheapest, Number((this.#cheapest + share * (this.#dearest - this.#cheapest)).toPrecision(3)));
  }

  /** The latency budget in milliseconds. */
  get ms() {
    const exact = this.#shortestMs * (LONGEST_MS / this.#shortestMs) ** (this.latency.value / this.latency.max);
    const unit = 10 ** Math.max(0, Math.floor(Math.log10(exact)) - 1);
    return Math.ceil(exact / unit) * unit;
  }

  /** The budgets as parameters of POST /classify. */
  get parameters() {
    return { budget_gflops: this.gflops, budget_ms: this.ms };
  }

  #placeOfMs(ms) {
    return Math.log(ms / this.#shortestMs) / Math.log(LONGEST_MS / this.#shortestMs);
  }

  #show() {
    const limit = this.gflops === null ? "no limit" : `${gflops(this.gflops)} GFLOPs`;
    for (const [slider, text] of [[this.compute, limit], [this.latency, `${this.ms} ms`]]) {
      byId(`${slider.id}-value`).textContent = text;
      slider.setAttribute("aria-valuetext", text);
      setVar(slider, "--share", slider.value / slider.max);
    }
  }
}

/** Draw a tick on a slider for each sub-network, a longer one for those that were trained. */
function ticks(id, rows, place) {
  const marks = rows.filter((row) => place(row) >= 0 && place(row) <= 1);
  byId(id).replaceChildren(
    ...marks.map((row) => setVar(el("i", { class: row.is_trained ? "trained" : "" }), "--at", place(row))),
  );
}
