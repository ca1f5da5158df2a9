// How far ahead a page drafts. A look-up costs next to nothing, so only the target's work counts: a draft is sent while the
// chance that it and all before it are right, a power of the acceptance, is not below a least one.
// Knows: acceptance, the target's load. Does not know: time, frames, links.

const MOST_IN_FLIGHT = 64;
const MOST_IN_FRAME = 16;
const LEAST_ACCEPTANCE = 0.4; // below, steps that carry a draft cost more than right ones bring
const LEAST_CHANCE = 0.1; // below, a row is hardly ever worth its bytes
const LOADED_CHANCE = 0.88; // the least where the target is fully loaded: its rows are others', as controller.py has it

// { window: drafts in flight, chunk: ids of a frame }. `load`: 0, nobody else needs the target's rows, to 1. A window of 0:
// drafts are made and judged, and none is sent, until they would be right again.
export function choosePace({ acceptance, load }) {
  const least = Math.max(LEAST_CHANCE, load * LOADED_CHANCE);
  const likely = Math.floor(Math.log(least) / Math.log(Math.min(0.999, Math.max(0.01, acceptance))));
  const window = acceptance < LEAST_ACCEPTANCE ? 0 : Math.min(MOST_IN_FLIGHT, likely);
  return { window, chunk: Math.max(1, Math.min(MOST_IN_FRAME, window >> 1)) };
}
