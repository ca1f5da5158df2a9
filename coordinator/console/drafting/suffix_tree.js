// A suffix tree over texts of ids, with the rules of drafters/suffix_tree.py (SuffixDecoding, arXiv 2411.04975): which ids
// followed a given run of ids, and how often. What is kept is the text and each id's places; matches are looked up when asked for.
// Knows: ids and counts. Does not know: requests, users, budgets of drafts.

import { Branch, SEPARATOR } from "./suffix_paths.js";

export const DEPTH = 64; // longest run that is matched
const MOST_PLACES = 1024; // of one id, the latest: what bounds the work of a look-up
const PLACE_BYTES = 4.5;
const LIST_BYTES = 240; // of an id's list, its entry and its key
const SPARE_IDS = 64;

export class SuffixTree {
  constructor() {
    this.text = new Int32Array(SPARE_IDS);
    this.length = 0; // ids and separators held
    this.places = new Map();
  }

  get memoryBytes() {
    return this.text.byteLength + Math.floor(this.length * PLACE_BYTES) + this.places.size * LIST_BYTES;
  }

  ids() { return this.text.subarray(0, this.length); }

  append(ids) {
    const end = this.length + ids.length;
    if (end > this.text.length) {
      const grown = new Int32Array(this.length + Math.max(end, SPARE_IDS));
      grown.set(this.ids());
      this.text = grown;
    }
    for (const id of ids) {
      this.text[this.length] = id;
      if (id !== SEPARATOR) {
        const places = this.places.get(id);
        if (places) places.push(this.length);
        else this.places.set(id, [this.length]);
      }
      this.length += 1;
    }
  }

  // Take ids away from the end until `length` are left.
  truncate(length) {
    for (; this.length > length; this.length -= 1) {
      const id = this.text[this.length - 1];
      if (id === SEPARATOR) continue;
      const places = this.places.get(id);
      places.pop();
      if (!places.length) this.places.delete(id);
    }
  }

  // Take ids away from the beginning: the one at `first` becomes the first.
  forgetBefore(first) {
    const kept = this.text.slice(first, this.length);
    this.text = new Int32Array(kept.length + SPARE_IDS);
    this.length = 0;
    this.places = new Map();
    this.append(kept);
  }

  // { matchTokens, count, places } for each length at which the end of `tail` matches, longest first. `count`: places where so
  // many match; `places`: those of them where no more do. `isOwnEnd`: the text ends with `tail`; that place says
  // nothing about what follows, and is not counted.
  #find(tail, isOwnEnd) {
    let places = (tail.length && this.places.get(tail[tail.length - 1]))?.slice(-MOST_PLACES) ?? [];
    if (isOwnEnd) places = places.filter((place) => place < this.length - 1);
    const byLength = new Map();
    for (const place of places) {
      const length = this.#agreeing(place, tail);
      if (byLength.has(length)) byLength.get(length).push(place);
      else byLength.set(length, [place]);
    }
    let count = 0;
    return [...byLength].sort(([a], [b]) => b - a).map(([matchTokens, ending]) => {
      count += ending.length;
      return { matchTokens, count, places: ending.filter((place) => place < this.length - 1) }; // after a text's last id there is none
    });
  }

  // How many ids up to `place` agree with the end of `tail`.
  #agreeing(place, tail) {
    const most = Math.min(DEPTH, tail.length, place + 1);
    let count = 0;
    while (count < most && this.text[place - count] === tail[tail.length - 1 - count]) count += 1;
    return count;
  }

  // Of each length of match's most frequent path the one with the largest score, the longer match's among equals: { ids,
  // score }. A path has at most `count` ids, and no more than its match; `least`: of a path's probability.
  bestPath(tail, isOwnEnd, count, least) {
    const root = new Branch();
    let best = { ids: [], score: 0 };
    for (const node of this.#find(tail, isOwnEnd)) {
      const allowed = Math.min(count, node.matchTokens);
      if (allowed <= best.score) break; // a score is at most the number of ids, and shorter matches allow fewer
      for (const place of node.places) root.add(this.text.subarray(place + 1, Math.min(place + 1 + allowed, this.length)), place);
      const path = root.path(node.count, allowed, least);
      if (path.score > best.score) best = path;
    }
    return best;
  }
}
