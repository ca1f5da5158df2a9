// How far ahead a page drafts. A look-up costs next to nothing, so only the target's work counts: a draft is sent while
// the chance that it is reached at all, acceptance to the power of the drafts before it, is above a least one. A loaded
// target is sent what is nearly sure to be right, and else nothing.
// Knows: acceptance, load. Does not know: time, frames, links.

const MOST_IN_FLIGHT = 64;
const MOST_IN_FRAME = 16;
const LEAST_REACHED = 0.1; // below, a row of the target is better spent on others

const LOADED_CHANCE = 0.88; // of a draft for a fully loaded target

// { window: drafts in flight, chunk: ids of a frame }. Below one only for load: a single draft a token finds out when text
// repeats again.
export function choosePace({ acceptance, load = 0 }) {
  if (load * LOADED_CHANCE > acceptance) return { window: 0, chunk: 1 };
  const least = Math.max(LEAST_REACHED, load * LOADED_CHANCE);
  const reached = Math.floor(Math.log(least) / Math.log(Math.min(0.999, Math.max(0.01, acceptance))));
  const window = Math.min(MOST_IN_FLIGHT, Math.max(1, reached));
  return { window, chunk: Math.max(1, Math.min(MOST_IN_FRAME, window >> 1)) };
}
