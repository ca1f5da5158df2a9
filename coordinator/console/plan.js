// What the planner promised, what was measured, and why it decided so.

import { byId, h, setText } from "./dom.js";
import { rate } from "./format.js";

export function drawPlan(plan) {
  setText(byId("lease"), plan ? `lease ${plan.lease}${plan.ready ? "" : ", not ready"}` : "");
  setText(byId("split"), plan ? `split: ${plan.split}` : "");
  const predicted = plan?.predicted_tokens_per_second ?? 0, measured = plan?.measured_tokens_per_second ?? 0;
  const most = Math.max(predicted, measured, 1e-9);
  byId("rates").replaceChildren(
    row("Predicted", predicted, most, "predicted"),
    row("Measured", measured, most, "measured"),
  );
  const reasons = plan?.reasons.length ? plan.reasons : ["There is no plan yet."];
  byId("reasons").replaceChildren(...reasons.map((reason) => h("li", {}, reason)));
}

function row(name, value, most, kind) {
  const bar = h("i", { class: kind });
  bar.style.width = `${(100 * value) / most}%`;
  const said = value > 0 ? `${rate(value)} tok/s` : "none yet";
  return h("div", { class: "rate" }, h("span", {}, name), h("div", { class: "bar", "aria-hidden": "true" }, bar), h("b", {}, said));
}
