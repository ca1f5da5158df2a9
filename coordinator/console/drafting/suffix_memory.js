// What past requests of this tab's user produced, for the suffix drafter. It lives in this page and nowhere else: no storage,
// no server, one for each key; `clear` forgets it, and so does leaving the page.
// Knows: finished outputs, a budget. Does not know: who the user is, requests in progress.

import { SEPARATOR } from "./suffix_paths.js";
import { SuffixTree } from "./suffix_tree.js";

export const MEMORY_BYTES = 4 << 20;
const KEPT_SHARE = 0.875; // when it is full: forgetting costs as much as learning, so some room is made at once

export class SuffixMemory {
  constructor(budgetBytes = MEMORY_BYTES) {
    this.budgetBytes = budgetBytes;
    this.tree = new SuffixTree();
  }

  get memoryBytes() { return this.tree.memoryBytes; }

  clear() { this.tree = new SuffixTree(); }

  // A request is over. Of an output larger than the budget the end is kept.
  learn(ids) {
    if (!ids.length) return;
    this.tree.append([SEPARATOR, ...ids]);
    if (this.tree.memoryBytes > this.budgetBytes) this.#forget();
  }

  // The oldest texts, whole, until some room is free; of a single one its beginning.
  #forget() {
    const tree = this.tree, enough = this.budgetBytes * KEPT_SHARE;
    while (tree.memoryBytes > enough && tree.length > 1) {
      const least = Math.max(1, Math.floor(tree.length * (1 - enough / tree.memoryBytes)));
      const start = tree.ids().indexOf(SEPARATOR, least);
      tree.forgetBefore(start < 0 ? least : start);
    }
  }
}
