// The pipeline as a drawing: coordinator, stages in order, and the way the ids go back to the first stage.

import { byId, h, s } from "./dom.js";
import { bytes, layers } from "./format.js";
import { plansOf } from "./plan.js";

const BOX = { width: 168, height: 74 };
const GAP = 56;
const HUES = 6;

export const hue = (index) => `s${index % HUES}`;

export function drawTopology(status) {
  const place = byId("topology");
  const plans = plansOf(status).filter((plan) => plan.stages.length > 0);
  if (plans.length === 0) {
    place.replaceChildren(h("p", { class: "quiet" }, "No pipeline yet. Add devices, and the plan appears here."));
    byId("layers").replaceChildren();
    return;
  }
  let number = 0; // of the stage, over all pipelines: its colour
  const pipelines = plans.map((plan) => plan.stages.map(([name, first, last]) => ({
    name, range: [first, last], hue: hue(number++), device: status.devices.find((device) => device.name === name),
  })));
  const isFlowing = status.requests.length > 0, width = place.clientWidth || 800;
  // The last strip is the one that is always there; with several pipelines each has its own under its drawing.
  place.replaceChildren(...pipelines.flatMap((stages, index) => {
    const picture = drawing(stages, isFlowing, width), isLast = index + 1 === pipelines.length;
    return isLast ? [picture] : [picture, drawLayers(h("div", { class: "layers", role: "img" }), stages)];
  }));
  drawLayers(byId("layers"), pipelines.at(-1));
}

function drawing(stages, isFlowing, width) {
  const nodes = [{ name: "coordinator", lines: ["plan, journal, API"] }, ...stages.map(describe)];
  const columns = Math.max(1, Math.floor((width + GAP) / (BOX.width + GAP)));
  return columns >= nodes.length ? inRow(nodes, isFlowing, width) : inColumn(nodes, isFlowing, width);
}

function describe(stage) {
  const weights = stage.device ? bytes(stage.device.weight_bytes) : "";
  return { name: stage.name, lines: [layers(stage.range), weights], hue: stage.hue };
}

function inRow(nodes, isFlowing, width) {
  const gap = Math.min(110, (width - nodes.length * BOX.width - 4) / Math.max(1, nodes.length - 1));
  const height = BOX.height + 46;
  const at = nodes.map((_, index) => 2 + index * (BOX.width + gap));
  const middle = 2 + BOX.height / 2;
  const wires = at.slice(1).map((x, index) => arrow(`M${at[index] + BOX.width} ${middle}H${x - 8}`, `M${x - 9} ${middle - 5}l9 5l-9 5z`));
  const tail = at.at(-1) + BOX.width / 2, first = at[1] + BOX.width / 2, low = BOX.height + 28, bottom = BOX.height + 4;
  if (nodes.length > 2) {
    wires.push(arrow(`M${tail} ${bottom}V${low - 8}q0 8 -8 8H${first + 8}q-8 0 -8 -8V${bottom + 8}`, `M${first - 5} ${bottom + 8}l5 -9l5 9z`, "t-back"));
  }
  const note = nodes.length > 2 ? label((tail + first) / 2, low + 15, "token ids go round", "t-quiet", "middle") : null;
  return canvas(at.at(-1) + BOX.width + 4, height, nodes, isFlowing, wires, at.map((x) => [x, 2]), BOX.width, note);
}

function inColumn(nodes, isFlowing, width) {
  const gap = 30, side = 34, box = width - side - 4;
  const at = nodes.map((_, index) => 2 + index * (BOX.height + gap));
  const x = 2 + box / 2, edge = 2 + box;
  const wires = at.slice(1).map((y, index) => arrow(`M${x} ${at[index] + BOX.height}V${y - 8}`, `M${x - 5} ${y - 9}l5 9l5 -9z`));
  if (nodes.length > 2) {
    const from = at.at(-1) + BOX.height / 2, to = at[1] + BOX.height / 2, out = edge + side - 8;
    wires.push(arrow(`M${edge} ${from}H${out - 8}q8 0 8 -8V${to + 8}q0 -8 -8 -8H${edge + 8}`, `M${edge + 9} ${to - 5}l-9 5l9 5z`, "t-back"));
  }
  return canvas(width, at.at(-1) + BOX.height + 4, nodes, isFlowing, wires, at.map((y) => [2, y]), box, null);
}

function canvas(width, height, nodes, isFlowing, wires, places, boxWidth, note) {
  const said = nodes.slice(1).map((node) => `${node.name} runs ${node.lines[0]}`).join(", then ");
  return s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Pipeline: ${said}` },
    s("g", { class: isFlowing ? "t-flow" : null }, ...wires),
    ...nodes.map((node, index) => box(node, ...places[index], boxWidth)), note);
}

function box(node, x, y, width) {
  return s("g", { transform: `translate(${x} ${y})` },
    s("rect", { class: "t-box", width, height: BOX.height, rx: 11 }),
    node.hue ? s("rect", { class: `t-mark ${node.hue}`, x: 12, y: 14, width: 5, height: BOX.height - 28, rx: 2.5 }) : null,
    label(26, 27, clip(node.name, width), "t-name"),
    ...node.lines.map((line, index) => label(26, 45 + index * 16, line, "t-quiet")));
}

const label = (x, y, text, kind, anchor) => s("text", { x, y, class: kind, "text-anchor": anchor }, text);
const arrow = (line, head, kind = "t-wire") => s("g", {}, s("path", { class: kind, d: line }), s("path", { class: "t-head", d: head }));
const clip = (name, width) => { const room = Math.floor((width - 34) / 8); return name.length > room ? `${name.slice(0, room - 1)}…` : name; };

function drawLayers(strip, stages) {
  const marks = stages.flatMap((stage) =>
    Array.from({ length: stage.range[1] - stage.range[0] + 1 }, (_, offset) => {
      return h("span", { class: stage.hue, title: `layer ${stage.range[0] + offset}: ${stage.name}` });
    }));
  strip.setAttribute("aria-label", stages.map((stage) => `${layers(stage.range)} on ${stage.name}`).join("; "));
  strip.replaceChildren(...marks);
  return strip;
}
