// How far ahead a page drafts. A look-up costs next to nothing, so only the target's work counts: a draft is sent while
// the chance that it is reached at all, acceptance to the power of the drafts before it, is above a least one.
// Knows: acceptance. Does not know: time, frames, links.

const MOST_IN_FLIGHT = 64;
const MOST_IN_FRAME = 16;
const LEAST_REACHED = 0.05; // about what the target may spend on rows that nobody asks for

// { window: drafts in flight, chunk: ids of a frame }. Never below one: a single draft a token finds out when text repeats again.
export function choosePace({ acceptance }) {
  const reached = Math.floor(Math.log(LEAST_REACHED) / Math.log(Math.min(0.999, Math.max(0.01, acceptance))));
  const window = Math.min(MOST_IN_FLIGHT, Math.max(1, reached));
  return { window, chunk: Math.max(1, Math.min(MOST_IN_FRAME, window >> 1)) };
}
