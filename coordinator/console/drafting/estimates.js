// What this page has measured of one request: acceptance, loop and floor times (speculative/estimates.py knows more).
// Knows: samples and means. Does not know: where samples come from, or what follows from them.

const NEW_SHARE = 0.1; // of a new sample in a mean
const ACCEPTANCE_SHARE = 0.06; // verdicts are single bits, and need more of them
const PRIOR_ACCEPTANCE = 0.5; // before the first verdict; worth PRIOR_VERDICTS of them
const PRIOR_VERDICTS = 4;
const PRIOR_FLOOR_SECONDS = 0.2;
const RECENT_LOOPS = 16;

// An exponentially weighted mean that starts as a plain one, so that the first sample does not weigh for long.
class Mean {
  constructor(share, value = 0, count = 0) { Object.assign(this, { share, value, count }); }

  add(sample) {
    this.count += 1;
    this.value += (sample - this.value) * Math.max(this.share, 1 / this.count);
  }
}

export class Estimates {
  constructor() {
    this.verdicts = new Mean(ACCEPTANCE_SHARE, PRIOR_ACCEPTANCE, PRIOR_VERDICTS);
    this.load = 0; // of the target, as it says
    this.loops = [];
    this.waits = []; // loops, and of drafts sent more than once how long they took at most
    this.floor = new Mean(NEW_SHARE);
  }

  // Of a draft, given that all before it were right.
  judged(accepted) { this.verdicts.add(accepted ? 1 : 0); }

  // From sending a draft to the sample of its row; it was in time and nothing was queued before it.
  looped(seconds, isBound = false) {
    for (const times of isBound ? [this.waits] : [this.loops, this.waits]) {
      times.push(seconds);
      if (times.length > RECENT_LOOPS) times.shift();
    }
  }

  // From a miss to the next id, which the target made by itself.
  turned(seconds) { this.floor.add(seconds); }

  get acceptance() { return this.verdicts.value; }
  get floorSeconds() { return this.floor.count ? this.floor.value : PRIOR_FLOOR_SECONDS; }

  // The middle of the last loops; until there are some, one turn of the ring.
  get loopSeconds() {
    if (!this.loops.length) return this.floorSeconds;
    return [...this.loops].sort((a, b) => a - b)[Math.floor(this.loops.length / 2)];
  }

  get isLoopMeasured() { return this.waits.length > 0; }

  // The upper quartile: what takes much longer was lost.
  get slowLoopSeconds() {
    if (!this.waits.length) return this.loopSeconds;
    return [...this.waits].sort((a, b) => a - b)[this.waits.length - 1 - Math.floor(this.waits.length / 4)];
  }
}
