// What this page keeps for drafting: one memory of past outputs for each tokenizer, of one key's user. Nothing is stored,
// and nothing is shared: another key means another page's state.
// Knows: tokenizers by digest. Does not know: requests, keys.

import { SuffixMemory } from "./suffix_memory.js";

export class Memories {
  #byTokenizer = new Map();

  of(digest) {
    if (!this.#byTokenizer.has(digest)) this.#byTokenizer.set(digest, new SuffixMemory());
    return this.#byTokenizer.get(digest);
  }

  // Ids that are remembered, of all tokenizers.
  get rememberedIds() {
    return [...this.#byTokenizer.values()].reduce((sum, memory) => sum + memory.tree.length, 0);
  }

  clear() {
    for (const memory of this.#byTokenizer.values()) memory.clear();
  }
}
