// The suffix drafter, with the rules of drafters/suffix.py (SuffixDecoding, arXiv 2411.04975): what followed the last time
// these ids stood here, in this request or in this user's past outputs. A draft is as long as its match at most; the match
// whose draft expects most right ids wins, the longer one among equals, this request's own before the memory's.
// Knows: one request's ids, one user's memory. Does not know: models, noise, verdicts.

import { SEPARATOR } from "./suffix_paths.js";
import { DEPTH, SuffixTree } from "./suffix_tree.js";

export const REQUEST_INDEX_BYTES = 4 << 20;
const LEAST_PROBABILITY = 0.1; // of a path: less probable drafts end there

export class SuffixDrafter {
  constructor(memory = null, requestIndexBytes = REQUEST_INDEX_BYTES) {
    this.memory = memory;
    this.budgetBytes = requestIndexBytes;
    this.begin([]);
  }

  begin(promptIds) {
    this.ids = [...promptIds];
    this.promptTokens = promptIds.length;
    this.#indexFrom(0);
  }

  // These ids follow: drafts that were sent, or committed ids.
  extend(ids) {
    for (const id of ids) this.ids.push(id);
    this.tree.append(ids);
    this.#bound();
  }

  // Keep the first `length` ids, prompt included.
  rewind(length) {
    this.ids.length = Math.min(this.ids.length, length);
    if (length > this.first || this.first === 0) this.tree.truncate(1 + length - this.first);
    else this.#indexFrom(0);
  }

  // At most `count` ids after the sequence: { ids, score }, the score being how many of them it expects to be right.
  propose(count) {
    const tail = this.ids.slice(-DEPTH);
    const own = this.tree.bestPath(tail, true, count, LEAST_PROBABILITY);
    const past = this.memory?.tree.bestPath(tail, false, count, LEAST_PROBABILITY);
    return past && past.score > own.score ? past : own;
  }

  // The request is over; the sequence holds what was committed.
  end(learn) {
    if (learn) this.memory?.learn(this.ids.slice(this.promptTokens));
    this.begin([]);
  }

  #indexFrom(first) {
    this.first = first; // the first id in the tree; a separator stands before it
    this.tree = new SuffixTree();
    this.tree.append([SEPARATOR, ...this.ids.slice(first)]);
    this.#bound();
  }

  // Of a request whose index would take more than the budget the latest part; half of what fits, to have room to go on.
  #bound() {
    if (this.tree.memoryBytes <= this.budgetBytes) return;
    const fitting = Math.floor((this.tree.length * this.budgetBytes) / this.tree.memoryBytes);
    this.#indexFrom(this.ids.length - Math.floor(fitting / 2));
  }
}
