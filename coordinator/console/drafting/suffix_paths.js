// What followed runs of every length at once, as drafters/suffix_paths.py has it: places of a longer match are among those of
// a shorter one, so each length's places are added to one tree of counts, and its most frequent path is read off it.
// Knows: counts of what followed. Does not know: texts, requests, how long a draft may be.

export const SEPARATOR = -1; // before every text: no run reaches across

export class Branch {
  count = 0;
  place = -1; // the last one that it was seen at
  children = new Map();
  head = null; // most frequent child, among equals the one seen last
  headId = SEPARATOR;

  // One more place, and the ids after it; ids after a separator belong to another text.
  add(following, place) {
    let branch = this;
    for (const id of following) {
      if (id === SEPARATOR) return;
      let child = branch.children.get(id);
      if (!child) branch.children.set(id, child = new Branch());
      child.count += 1;
      child.place = Math.max(child.place, place);
      const head = branch.head;
      if (head === null || child.count > head.count || (child.count === head.count && child.place > head.place)) {
        branch.head = child;
        branch.headId = id;
      }
      branch = child;
    }
  }

  // { ids, score }: the most frequent path from here, `count` places, while its probability is not below `least`. Score:
  // the sum of the probabilities that an id of it and all before are right.
  path(count, mostTokens, least) {
    const found = { ids: [], score: 0 };
    let probability = 1, above = count;
    for (let branch = this; found.ids.length < mostTokens && branch.head !== null; branch = branch.head) {
      probability *= branch.head.count / above;
      if (probability < least) break;
      found.ids.push(branch.headId);
      found.score += probability;
      above = branch.head.count;
    }
    return found;
  }
}
