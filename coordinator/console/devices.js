// One card per device. Cards are kept and updated, so that a focused button stays focused.

import { byId, h, setText } from "./dom.js";
import { bytes, layers, seconds } from "./format.js";
import { plansOf } from "./plan.js";
import { hue } from "./topology.js";

const GOOD = new Set(["serving", "ready"]);
const BAD = new Set(["offline", "revoked"]);

export class DeviceList {
  constructor(onRevoke) {
    this.cards = new Map();
    this.onRevoke = onRevoke;
  }

  update(status) {
    const list = byId("devices");
    const stages = new Map(plansOf(status).flatMap((plan) => plan.stages).map(([name], index) => [name, index]));
    const place = (device) => stages.get(device.name) ?? stages.size; // pipeline first, in its order
    const devices = [...status.devices].sort((a, b) => place(a) - place(b) || (a.name < b.name ? -1 : 1));
    for (const device of devices) {
      let card = this.cards.get(device.id);
      if (!card) {
        card = new DeviceCard(device, this.onRevoke);
        this.cards.set(device.id, card);
      }
      card.update(device, stages.get(device.name));
    }
    const wanted = devices.map((device) => this.cards.get(device.id).element);
    if (wanted.some((element, index) => element !== list.children[index])) list.append(...wanted); // moving drops focus
    const known = new Set(status.devices.map((device) => device.id));
    for (const [id, card] of this.cards) {
      if (!known.has(id)) { card.element.remove(); this.cards.delete(id); }
    }
  }
}

class DeviceCard {
  constructor(device, onRevoke) {
    this.state = h("span", { class: "state" });
    this.why = h("p", { class: "why" });
    this.fill = h("i");
    this.values = Object.fromEntries(["Holds", "Weights", "Memory budget", "Round trip", "Last seen"].map((name) => [name, h("dd")]));
    this.revoke = h("button", { type: "button", class: "small danger", "aria-label": `Revoke ${device.name}`, onclick: () => onRevoke(device) }, "Revoke");
    this.foot = h("span", { class: "quiet" });
    this.element = h("li", { class: "device" },
      h("div", { class: "head" }, h("h3", {}, device.name), this.state),
      this.why,
      h("div", { class: "bar", "aria-hidden": "true" }, this.fill),
      h("dl", {}, ...Object.entries(this.values).flatMap(([name, value]) => [h("dt", {}, name), value])),
      h("div", { class: "foot" }, this.foot, this.revoke));
  }

  update(device, stage) {
    const tone = GOOD.has(device.state) ? "good" : BAD.has(device.state) ? "bad" : "warn";
    this.state.className = `state ${tone}`;
    this.element.className = `device ${stage === undefined ? "" : hue(stage)} ${BAD.has(device.state) ? "away" : ""}`;
    setText(this.state, device.state);
    setText(this.why, device.reason);
    this.why.hidden = device.reason === "";
    const share = device.memory_budget_bytes > 0 ? device.weight_bytes / device.memory_budget_bytes : 0;
    this.fill.style.width = `${Math.min(100, share > 0 ? Math.max(1, 100 * share) : 0)}%`;
    setText(this.values.Holds, layers(device.layers));
    setText(this.values.Weights, device.weight_bytes > 0 ? bytes(device.weight_bytes) : "none");
    setText(this.values["Memory budget"], device.memory_budget_bytes > 0 ? bytes(device.memory_budget_bytes) : "unknown");
    setText(this.values["Round trip"], seconds(device.rtt_seconds));
    setText(this.values["Last seen"], device.last_seen_seconds === null ? "never" : device.last_seen_seconds < 3 ? "now" : `${seconds(device.last_seen_seconds)} ago`);
    setText(this.foot, device.pid > 0 ? `pid ${device.pid}` : device.id.slice(0, 8));
    this.revoke.hidden = device.state === "revoked";
  }
}
