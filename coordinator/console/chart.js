// Tokens per second over the last two minutes, one sample a second, the plan's prediction as a dashed line.

import { byId, s } from "./dom.js";
import { rate } from "./format.js";
import { plansOf } from "./plan.js";

const SAMPLES = 120;
const HEIGHT = 132;
const TOP = 14;
const BOTTOM = 18;

export class RateChart {
  constructor() {
    this.samples = [];
    this.current = 0;
    this.predicted = 0;
    this.isEmpty = true;
  }

  // True for the first status: it is worth drawing at once.
  update(status) {
    const isFirst = this.isEmpty;
    this.isEmpty = false;
    this.current = status.tokens_per_second ?? 0;
    this.predicted = plansOf(status).reduce((sum, plan) => sum + (plan.predicted_tokens_per_second ?? 0), 0);
    return isFirst;
  }

  // Called once a second, also when nothing changed: silence is a sample too.
  tick() {
    if (this.isEmpty) return;
    this.samples.push(this.current);
    if (this.samples.length > SAMPLES) this.samples.shift();
    this.draw();
  }

  draw() {
    const place = byId("chart"), width = place.clientWidth || 480;
    const most = niceCeiling(Math.max(...this.samples, this.current, 1));
    const x = (index) => ((SAMPLES - this.samples.length + index) / (SAMPLES - 1)) * width;
    const y = (value) => TOP + (1 - Math.min(value / most, 1)) * (HEIGHT - TOP - BOTTOM);
    const points = this.samples.map((value, index) => `${x(index).toFixed(1)} ${y(value).toFixed(1)}`);
    const base = y(0);
    const line = points.length ? `M${points.join("L")}` : "";
    place.replaceChildren(s("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": `Now ${rate(this.current)} tokens per second` },
      s("path", { class: "c-grid", d: `M0 ${base}H${width}M0 ${y(most)}H${width}` }),
      this.predicted > 0 && this.predicted <= most ? s("path", { class: "c-plan", d: `M0 ${y(this.predicted)}H${width}` }) : null,
      line ? s("path", { class: "c-area", d: `${line}L${width} ${base}L${x(0)} ${base}Z` }) : null,
      line ? s("path", { class: "c-line", d: line }) : null,
      s("text", { x: 0, y: TOP - 3 }, `${most}`),
      s("text", { x: 0, y: HEIGHT - 4 }, "−2 min"),
      s("text", { x: width, y: HEIGHT - 4, "text-anchor": "end" }, `now: ${rate(this.current)}`)));
  }
}

function niceCeiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}
