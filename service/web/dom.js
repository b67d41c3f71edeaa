// Elements, and numbers as text, for the other modules.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value == null) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** Make an element; attributes that begin with "on" are listeners. */
export const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

/** Make an SVG element. */
export const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

/** Set a custom property; the page's Content-Security-Policy forbids style attributes. */
export function setVar(node, name, value) {
  node.style.setProperty(name, value);
  return node;
}

export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;

export function gflops(value) {
  return value >= 10 ? value.toFixed(1) : value >= 1 ? value.toFixed(2) : value.toPrecision(3);
}

export const ms = (value) => (value >= 100 ? value.toFixed(0) : value.toFixed(1));

export const words = (label) => label.replaceAll("_", " ");

export const nameOf = (subnetwork) => `grid ${subnetwork.patch_grid} · keep ${+subnetwork.keep_rate.toFixed(2)}`;

/** Return a function that calls `call` once it has not been called for `waitMs`. */
export function debounced(call, waitMs) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(call, waitMs);
  };
}

/** Draw again whenever the width of an element changes. */
export function onWidth(node, draw) {
  let last = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.round(entry.contentRect.width);
    if (width !== last) draw((last = width));
  }).observe(node);
}
