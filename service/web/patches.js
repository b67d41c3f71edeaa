// Draws the photo, the square that the model sees, the patch grid, and the patches that are kept after each pruning.

import { byId, el, onWidth, percent } from "./dom.js";

const FADE_MS = 160;

export class PatchView {
  constructor() {
    this.canvas = byId("canvas");
    this.photo = null;
    this.grid = null; // patches per side
    this.seenShare = 1;
    this.prunings = [];
    this.step = 0; // 0 is the photo, 1 the first pruning
    this.alpha = new Float32Array(0); // of the veil over each patch, as drawn now
    onWidth(byId("stage"), () => this.#draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
    this.#showSteps();
  }

  /** Show another photo, which has no explanation yet. */
  show(photo) {
    this.photo = photo;
    this.grid = null;
    this.prunings = [];
    this.#showSteps();
    this.#animate();
  }

  /** Show which patches a sub-network keeps, by the answer of POST /explain. */
  explain({ subnetwork, explanation }) {
    const before = this.prunings.length;
    this.grid = subnetwork.patch_grid;
    this.seenShare = explanation.seen_share;
    this.prunings = explanation.prunings;
    if (!before || this.step > this.prunings.length) this.step = this.prunings.length;
    this.#showSteps();
    this.#animate();
  }

  /** Set the caption below the photo. */
  say(sentence) {
    byId("caption").textContent = sentence;
  }

  #select(step) {
    this.step = step;
    this.#caption();
    this.#animate();
  }

  #showSteps() {
    const total = this.grid ** 2;
    const names = [["Photo", this.grid ? `${total}` : ""]];
    for (const { block, kept } of this.prunings) names.push([`Block ${block}`, percent(kept.length / total)]);
    const focused = byId("steps").contains(document.activeElement);
    const radios = names.map(([name, share], index) => {
      const radio = el("input", { type: "radio", name: "step", id: `step-${index}`, onchange: () => this.#select(index) });
      radio.checked = index === this.step;
      return el("span", {}, radio, el("label", { for: `step-${index}` }, name, el("small", {}, share)));
    });
    const legend = byId("steps").querySelector("legend");
    byId("steps").replaceChildren(legend, ...radios);
    if (focused) byId(`step-${Math.min(this.step, names.length - 1)}`).focus();
    this.#caption();
  }

  #caption() {
    let text = this.photo ? "The explanation appears here." : " ";
    if (this.photo && !this.photo.bitmap) text = "This browser cannot show the file; the server may still support it.";
    else if (this.grid && !this.prunings.length) {
      text = `Grid ${this.grid} at keep rate 1: all ${this.grid ** 2} patches are kept.`;
    } else if (this.grid && this.step === 0) text = `Cut into ${this.grid} × ${this.grid} patches.`;
    else if (this.grid) {
      const { block, kept } = this.prunings[this.step - 1];
      text = `Block ${block} keeps ${kept.length} of ${this.grid ** 2} patches, those that its class token attends to most.`;
    }
    this.say(text);
    this.canvas.setAttribute("aria-label", this.photo ? `${this.photo.file.name}. ${text}` : "No photo yet");
  }

  /** Return the opacity that the veil over each patch should have. */
  #target() {
    const veil = new Float32Array((this.grid ?? 0) ** 2);
    if (this.step > 0 && this.prunings.length) {
      veil.fill(1);
      for (const patch of this.prunings[Math.min(this.step, this.prunings.length) - 1].kept) veil[patch] = 0;
    }
    return veil;
  }

  #animate() {
    const target = this.#target();
    const from = this.alpha.length === target.length ? this.alpha : new Float32Array(target.length);
    const startedAt = performance.now();
    const run = (this.run = {});
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const frame = (now) => {
      if (this.run !== run) return;
      const share = calm ? 1 : Math.min(1, Math.max(0, now - startedAt) / FADE_MS);
      this.alpha = target.map((value, index) => from[index] + (value - from[index]) * share);
      this.#draw();
      if (share < 1) requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  }

  #draw() {
    const { canvas, photo } = this;
    const side = canvas.clientWidth;
    const scale = devicePixelRatio;
    canvas.width = canvas.height = Math.round(side * scale);
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    const styles = getComputedStyle(canvas);
    if (!photo?.bitmap) {
      if (photo) placeholder(context, side, styles.getPropertyValue("--muted"), photo.file.name);
      return;
    }
    const { width, height } = photo.bitmap;
    const fit = side / Math.max(width, height);
    const [w, h] = [width * fit, height * fit];
    const [left, top] = [(side - w) / 2, (side - h) / 2];
    context.drawImage(photo.bitmap, left, top, w, h);
    if (!this.grid) return;

    const seen = Math.min(w, h) * this.seenShare;
    const [x, y] = [(side - seen) / 2, (side - seen) / 2];
    const veil = styles.getPropertyValue("--surface");
    context.fillStyle = veil;
    context.globalAlpha = 0.6; // outside the square that the model sees
    context.beginPath();
    context.rect(left, top, w, h);
    context.rect(x, y, seen, seen);
    context.fill("evenodd");

    const patch = seen / this.grid;
    this.alpha.forEach((alpha, index) => {
      if (!alpha) return;
      context.globalAlpha = 0.86 * alpha;
      context.fillRect(x + (index % this.grid) * patch, y + Math.floor(index / this.grid) * patch, patch + 0.3, patch + 0.3);
    });
    context.globalAlpha = 0.28;
    context.strokeStyle = "white";
    context.lineWidth = 1;
    context.beginPath();
    for (let line = 0; line <= this.grid; line++) {
      const at = line * patch;
      context.moveTo(x + at, y);
      context.lineTo(x + at, y + seen);
      context.moveTo(x, y + at);
      context.lineTo(x + seen, y + at);
    }
    context.stroke();
    context.globalAlpha = 1;
  }
}

function placeholder(context, side, colour, name) {
  context.fillStyle = colour;
  context.font = "14px system-ui, sans-serif";
  context.textAlign = "center";
  context.fillText(name.length > 40 ? `${name.slice(0, 37)}…` : name, side / 2, side / 2);
}
