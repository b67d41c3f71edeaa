// Runs the same photo through every trained sub-network, each pinned by patch grid and keep rate.

import { byId, el, gflops, percent, setVar, words } from "./dom.js";
import { classify } from "./server.js";

const AT_ONCE = 2;
const GRANTED_MS = 20_000; // long, as a comparison needs every answer

export class Comparison {
  #rows = [];
  #cells = new Map();
  #running = null;

  constructor(photo, failed) {
    this.photo = photo;
    this.failed = failed;
    byId("compare").addEventListener("click", () => this.run());
  }

  /** Build the table from the sub-networks of GET /subnetworks. */
  describe(rows) {
    this.#rows = rows.filter((row) => row.is_trained);
    const grids = [...new Set(this.#rows.map((row) => row.patch_grid))].sort((a, b) => a - b);
    const rates = [...new Set(this.#rows.map((row) => row.keep_rate))].sort((a, b) => b - a);
    const body = rates.map((rate) =>
      el("tr", {}, el("th", { scope: "row" }, `keep ${rate}`), ...grids.map((grid) => this.#cell(grid, rate))),
    );
    const head = el("tr", {}, el("td"), ...grids.map((grid) => el("th", { scope: "col" }, `grid ${grid}`)));
    const caption = byId("grid").querySelector("caption");
    byId("grid").replaceChildren(caption, el("thead", {}, head), el("tbody", {}, ...body));
    byId("compare").textContent = `Run all ${this.#rows.length}`;
    byId("compare").disabled = false;
    this.forget();
  }

  /** Clear the answers, which belong to another photo. */
  forget() {
    this.#running?.abort();
    for (const row of this.#rows) this.#show(row, null);
    byId("compare-note").textContent = "The same photo through every trained sub-network";
  }

  /** Run every sub-network, the cheapest first. */
  async run() {
    const photo = this.photo();
    if (!photo) return;
    this.forget();
    const running = (this.#running = new AbortController());
    const waiting = [...this.#rows];
    const answers = [];
    byId("compare").disabled = true;
    try {
      const ask = async () => {
        for (let row = waiting.shift(); row && !running.signal.aborted; row = waiting.shift()) {
          const parameters = { patch_grid: row.patch_grid, keep_rate: row.keep_rate, top_k: 1, budget_ms: GRANTED_MS };
          const { predictions: [best] } = await classify(photo.body, parameters, running.signal);
          answers.push({ row, ...best });
          this.#show(row, best);
        }
      };
      await Promise.all(Array.from({ length: AT_ONCE }, ask));
      this.#conclude(answers);
    } catch (error) {
      running.abort();
      if (error.name !== "AbortError") this.failed(error);
    } finally {
      byId("compare").disabled = false;
    }
  }

  #conclude(answers) {
    const largest = answers.reduce((a, b) => (b.row.gflops > a.row.gflops ? b : a));
    for (const { row, label } of answers) this.#cells.get(key(row)).classList.toggle("differs", label !== largest.label);
    const agreeing = answers.filter(({ label }) => label === largest.label);
    const cheapest = agreeing.reduce((a, b) => (b.row.gflops < a.row.gflops ? b : a));
    const times = largest.row.gflops / cheapest.row.gflops;
    byId("compare-note").textContent =
      `${agreeing.length} of ${answers.length} say ${words(largest.label)}` +
      (times > 1.05 ? `, the cheapest at ${times.toFixed(1)} times less compute than the largest` : "");
  }

  #cell(grid, rate) {
    const cell = el("td", { class: "variant" });
    this.#cells.set(key({ patch_grid: grid, keep_rate: rate }), cell);
    return cell;
  }

  #show(row, best) {
    const cell = this.#cells.get(key(row));
    cell.classList.remove("differs");
    setVar(cell, "--share", best?.probability ?? 0);
    cell.replaceChildren(
      el("b", {}, best ? words(best.label) : "–"),
      el("span", {}, best ? percent(best.probability, 1) : " ", el("small", {}, `${gflops(row.gflops)} GFLOPs`)),
    );
  }
}

const key = (row) => `${row.patch_grid}@${row.keep_rate}`;
