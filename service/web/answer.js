// One answer: the classes, the sub-network, why it was chosen, and where the time went.

import { byId, el, gflops, ms, nameOf, percent, setVar, words } from "./dom.js";

const CLASSES = 5;
const STAGES = [
  ["decode_wait", "decode wait"],
  ["decode", "decode"],
  ["queue", "queue"],
  ["inference", "inference"],
  ["rest", "other"], // upload and event loop
];

/** Show placeholders of the same size: before the first answer, and where a photo gets none. */
export function showNothing() {
  for (const id of ["spoken", "reason", "looks", "total"]) byId(id).textContent = "";
  byId("timing").replaceChildren();
  byId("timing").setAttribute("aria-label", "No answer yet");
  byId("bars").replaceChildren(...Array.from({ length: CLASSES }, () => bar(" ", 0)));
  byId("legend").replaceChildren(...STAGES.map(([key, name]) => stage(key, name)));
  byId("chosen").textContent = "The chosen sub-network appears here";
}

/** Show an answer of POST /classify. */
export function showAnswer(answer) {
  const { predictions, subnetwork, decision, timing_ms: timing } = answer;
  const [best] = predictions;
  const rows = predictions.slice(0, CLASSES).map(({ label, probability }) => bar(words(label), probability));
  while (rows.length < CLASSES) rows.push(bar(" ", 0));
  byId("bars").replaceChildren(...rows);
  byId("spoken").textContent = `${words(best.label)}, ${percent(best.probability)}, by ${nameOf(subnetwork)}`;
  const accuracy = subnetwork.expected_accuracy;
  const worth = accuracy === null ? "" : ` · ${percent(accuracy, 1)}`;
  const of = accuracy === null ? "" : el("span", { class: "sr" }, " top-1"); // shown on the axis of the map
  byId("chosen").replaceChildren(el("b", {}, nameOf(subnetwork)), ` ${gflops(subnetwork.gflops)} GFLOPs${worth}`, of);
  byId("reason").textContent = sentence(decision.reason);
  showLooks(answer.looks ?? []);
  showTiming(timing, answer.budget_ms, answer.deadline_met);
}

/** Show the looks at the image and their confidences, if more than one was needed. */
function showLooks(looks) {
  const parts = looks.map((look) => {
    const sure = look.confidence == null ? "" : `, ${percent(look.confidence)} sure`;
    return `${nameOf(look)}${sure}`;
  });
  const times = parts.length === 2 ? "twice" : `${parts.length} times`;
  byId("looks").textContent = parts.length > 1 ? `Looked ${times}: ${parts.join(" → ")}` : "";
}

function showTiming(timing, budgetMs, isMet) {
  const known = STAGES.slice(0, -1).reduce((sum, [key]) => sum + timing[key], 0);
  const times = { ...timing, rest: Math.max(0, timing.total - known) };
  byId("timing").replaceChildren(
    ...STAGES.map(([key]) => setVar(el("i", { class: `stage-${key}` }), "--share", times[key] / timing.total)),
  );
  const spoken = STAGES.map(([key, name]) => `${name} ${ms(times[key])} ms`).join(", ");
  byId("timing").setAttribute("aria-label", `${ms(timing.total)} ms${isMet ? "" : ", after the deadline"}: ${spoken}`);
  byId("legend").replaceChildren(...STAGES.map(([key, name]) => stage(key, name, times[key])));
  byId("total").textContent = `${ms(timing.total)} / ${ms(budgetMs)} ms`;
  byId("total").classList.toggle("late", !isMet);
}

function bar(label, probability) {
  const known = label !== " ";
  return setVar(
    el("li", {}, el("span", {}, label), el("b", {}, known ? percent(probability, 1) : " ")),
    "--share",
    probability,
  );
}

function stage(key, name, time) {
  return el("li", {}, el("i", { class: `stage-${key}` }), name, el("b", {}, time === undefined ? "–" : ms(time)));
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;
