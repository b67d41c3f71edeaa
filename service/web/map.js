// The map of the sub-networks: accuracy over GFLOPs, the compute budget, and the sub-network that answered.

import { byId, gflops, nameOf, onWidth, percent, svg } from "./dom.js";

const HEIGHT = 248;
const MARGIN = { left: 40, right: 14, top: 12, bottom: 34 };

export class VariantMap {
  constructor() {
    this.rows = [];
    this.chosen = null;
    this.limit = null; // GFLOPs
    this.node = byId("map");
    onWidth(this.node, (width) => this.#draw(width));
  }

  /** Draw the sub-networks of GET /subnetworks, cheapest first. */
  describe(rows) {
    this.rows = rows;
    this.#draw(this.node.clientWidth);
  }

  /** Mark the sub-network that answered, and the compute budget in GFLOPs or null. */
  mark(subnetwork, limit) {
    this.chosen = subnetwork;
    this.limit = limit;
    this.#draw(this.node.clientWidth);
  }

  #draw(width) {
    if (!width || !this.rows.length) return;
    // Without measured accuracies, the vertical axis shows compute too.
    const heightOf = (row) => row.expected_accuracy ?? row.gflops;
    const isMeasured = this.rows.every((row) => row.expected_accuracy !== null);
    const [low, high] = padded(this.rows.map(heightOf));
    const [left, right] = padded(this.rows.map((row) => row.gflops));
    const x = (value) => MARGIN.left + ((value - left) / (right - left)) * (width - MARGIN.left - MARGIN.right);
    const y = (value) => HEIGHT - MARGIN.bottom - ((value - low) / (high - low)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
    const frontier = this.rows.filter((row) => row.on_frontier);
    const chosen = this.rows.find((row) => same(row, this.chosen));
    const parts = [
      ...steps(low, high, 4).flatMap((value) => [
        svg("line", { class: "rule", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }),
        svg("text", { x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }, isMeasured ? label(value, high - low) : ""),
      ]),
      ...steps(left, right, 5).map((value) =>
        svg("text", { x: x(value), y: HEIGHT - 16, "text-anchor": "middle" }, `${+value.toPrecision(3)}`),
      ),
      svg("text", { class: "axis", x: width - MARGIN.right, y: HEIGHT - 2, "text-anchor": "end" }, "GFLOPs"),
      svg("text", { class: "axis", x: 0, y: HEIGHT - 2 }, isMeasured ? "top-1, %" : "not measured"),
      svg("polyline", { class: "frontier", points: frontier.map((row) => `${x(row.gflops)},${y(heightOf(row))}`).join(" ") }),
      ...this.rows.map((row) =>
        svg(
          "circle",
          { class: row.is_trained ? "trained" : "between", cx: x(row.gflops), cy: y(heightOf(row)), r: row.is_trained ? 3.5 : 1.8 },
          svg("title", {}, describe(row)),
        ),
      ),
    ];
    if (this.limit !== null) {
      const at = x(Math.min(Math.max(this.limit, left), right));
      parts.push(svg("line", { class: "limit", x1: at, x2: at, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }));
    }
    if (chosen) {
      const [cx, cy] = [x(chosen.gflops), y(heightOf(chosen))];
      parts.push(svg("circle", { class: "halo", cx, cy, r: 11 }), svg("circle", { class: "chosen", cx, cy, r: 5.5 }));
    }
    const text = chosen ? `${describe(chosen)} answered` : `${this.rows.length} sub-networks`;
    const frame = { width, height: HEIGHT, role: "img", "aria-label": `Accuracy over GFLOPs: ${text}` };
    this.node.replaceChildren(svg("svg", frame, ...parts));
  }
}

const same = (row, other) => other && row.patch_grid === other.patch_grid && row.keep_rate === other.keep_rate;

const describe = (row) =>
  `${nameOf(row)}, ${gflops(row.gflops)} GFLOPs${row.expected_accuracy === null ? "" : `, ${percent(row.expected_accuracy, 1)}`}`;

const label = (value, range) => (100 * value).toFixed(range < 0.05 ? 1 : 0);

function padded(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const pad = 0.06 * (high - low || high);
  return [low - pad, high + pad];
}

/** Return round numbers between two limits, as ticks of an axis. */
function steps(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) found.push(value);
  return found;
}
