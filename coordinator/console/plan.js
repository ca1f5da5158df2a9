// What the planner promised, what was measured, and why it decided so.

import { byId, h, setText } from "./dom.js";
import { rate } from "./format.js";

/** Pipelines over different devices: each request is on one of them. */
export const plansOf = (status) => (status.plans?.length ? status.plans : status.plan ? [status.plan] : []);

export function drawPlan(plans) {
  const leases = plans.map((plan) => `${plan.lease}${plan.ready ? "" : ", not ready"}`);
  setText(byId("lease"), plans.length ? `${plans.length > 1 ? `${plans.length} pipelines, leases` : "lease"} ${leases.join("; ")}` : "");
  setText(byId("split"), plans.length ? `split: ${plans[0].split}` : "");
  const most = Math.max(1e-9, ...plans.flatMap((plan) => [plan.predicted_tokens_per_second, plan.measured_tokens_per_second]));
  const shown = plans.length ? plans : [{ predicted_tokens_per_second: 0, measured_tokens_per_second: 0, reasons: ["There is no plan yet."] }];
  const numbered = (text, index) => (shown.length > 1 ? `${text} ${index + 1}` : text);
  byId("rates").replaceChildren(...shown.flatMap((plan, index) => [
    row(numbered("Predicted", index), plan.predicted_tokens_per_second ?? 0, most, "predicted"),
    row(numbered("Measured", index), plan.measured_tokens_per_second ?? 0, most, "measured"),
  ]));
  byId("reasons").replaceChildren(...shown.flatMap((plan, index) =>
    plan.reasons.map((reason) => h("li", {}, index > 0 ? `pipeline ${index + 1}: ${reason}` : reason))));
}

function row(name, value, most, kind) {
  const bar = h("i", { class: kind });
  bar.style.width = `${(100 * value) / most}%`;
  const said = value > 0 ? `${rate(value)} tok/s` : "none yet";
  return h("div", { class: "rate" }, h("span", {}, name), h("div", { class: "bar", "aria-hidden": "true" }, bar), h("b", {}, said));
}
