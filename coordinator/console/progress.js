// What a generation has come to so far, as one line for a person.
// Knows: counts and times. Does not know: the document, requests.

import { plural, rate } from "./format.js";

export class Progress {
  #first = null; // { now, tokens } of the first text

  // `news`: { tokens, seed, finish, drafts } of one message, `now` in milliseconds.
  update({ text, tokens, seed, finish, drafts }, now) {
    if (text && this.#first === null) this.#first = { now, tokens };
    const parts = [plural(tokens, "token"), this.#speed(tokens, now), drafts && `${drafts.accepted} of ${plural(drafts.drafted, "draft")} right`];
    if (finish) parts.push(`finished: ${finish}`, `seed ${seed}`);
    return parts.filter(Boolean).join(", ");
  }

  #speed(tokens, now) {
    const seconds = this.#first === null ? 0 : (now - this.#first.now) / 1000;
    const more = tokens - Math.max(1, this.#first?.tokens ?? 0);
    return seconds > 0 && more > 0 ? `${rate(more / seconds)} tok/s` : "";
  }
}
