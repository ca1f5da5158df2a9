// The generations that run or wait now.

import { byId, h } from "./dom.js";
import { rate } from "./format.js";

const SHOWN = 8;

export function drawRequests(requests) {
  const place = byId("requests");
  if (requests.length === 0) {
    place.replaceChildren(h("p", { class: "quiet" }, "Nothing is being generated."));
    return;
  }
  const heads = [["Request"], ["State"], ["Prompt", "n"], ["Made", "n"], ["tok/s", "n"]];
  const rows = requests.slice(0, SHOWN).map((request) => h("tr", {},
    h("td", {}, h("code", {}, shorten(request.id))), h("td", {}, request.state),
    h("td", { class: "n" }, `${request.prompt_tokens}`), h("td", { class: "n" }, `${request.generated_tokens}`),
    h("td", { class: "n" }, rate(request.tokens_per_second ?? 0))));
  const more = requests.length > SHOWN ? h("p", { class: "quiet" }, `and ${requests.length - SHOWN} more`) : null;
  place.replaceChildren(h("table", {},
    h("thead", {}, h("tr", {}, ...heads.map(([name, kind]) => h("th", { scope: "col", class: kind }, name)))),
    h("tbody", {}, ...rows)), ...(more ? [more] : []));
}

// Ids share their beginning; the end tells them apart.
const shorten = (id) => (id.length > 12 ? `…${id.slice(-10)}` : id);
