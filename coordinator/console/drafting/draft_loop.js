// The page's side of a drafted request as a pure state machine: speculative/draft_loop.py without side rows. In: committed
// ids, proposals, time, the link's ends. Out: what to do, in order, as objects whose `do` is one of
//   send { turn, baseRow, ids }   put the frame on the link; where there is none, drop it: `linkResumed` makes another
//   rewind { length }, extend { ids }, propose { ticket, count }   orders for the drafter; `proposed` answers the last
// Knows: positions, what is in flight, and which of it is settled. Does not know: clocks, sockets, drafters.

import { FrameError } from "./wire.js";

const LOOPS_BEFORE_RESEND = 1.5;
const UNMEASURED_LOOPS_BEFORE_RESEND = 6; // while the loop is only guessed from the target's own pace
const LONGEST_RESEND_SECONDS = 30;
const IN_TIME = 0.5; // of a turn: ids that follow faster came from drafts, the target alone can't make them

export class DraftLoop {
  #window = []; // { id, firstSeconds, lastSeconds }: when it was sent; not the same: more than once, its loop can't be told
  #tickets = 0;
  #asked = null; // { ticket, base }: base is the position of its first id
  #held = null; // a draft for position `length` that was not worth sending: judged when the target says what is right
  #since = []; // committed while a proposal was being made for their positions
  #isStuck = false; // the drafter had nothing to say about this sequence
  #isLinked = false;
  #afterVerdict = false; // the next id is the target's own: nothing was in flight
  #lastRight = null; // the draft whose row is sampled next
  #lastCommitSeconds = -1;
  #resends = 0;

  // `promptLength`: position of the first id to come. `maxRows`: prompt and all that may follow. `choosePace(estimates)`.
  constructor({ promptLength, maxRows, vocabSize, stopIds, choosePace, estimates }) {
    this.length = promptLength; // ids that are committed, prompt included
    this.turn = 0; // position of the last miss, 0 for none
    this.finish = "";
    this.counts = { drafted: 0, accepted: 0, wasted: 0, misses: 0, resentFrames: 0 };
    this.estimates = estimates;
    this.first = promptLength;
    this.lastRow = maxRows - 2; // the id of the last position is never run
    this.vocabSize = vocabSize;
    this.choosePace = choosePace;
    this.stopIds = new Set(stopIds);
  }

  // When to call `passed`, in seconds of the caller's clock; null: only when something happens. By the age of the oldest
  // draft: where drafts were lost, the target's own ids go on, and what is drafted beyond the gap comes too early for ever.
  get wakeAt() {
    if (!this.#window.length || !this.#isLinked || this.finish) return null;
    const loops = this.estimates.isLoopMeasured ? LOOPS_BEFORE_RESEND : UNMEASURED_LOOPS_BEFORE_RESEND;
    const wait = loops * this.estimates.slowLoopSeconds * 2 ** this.#resends;
    return this.#window[0].lastSeconds + Math.min(wait, LONGEST_RESEND_SECONDS);
  }

  // The link is up and the request admitted. Drafting begins with the first committed id.
  start(now) {
    this.#isLinked = true;
    return [];
  }

  linkLost() {
    this.#isLinked = false;
    return [];
  }

  // Again connected, with new codecs; the far side sends what was committed since by itself.
  linkResumed(now) {
    this.#isLinked = true;
    return [...this.#resend(now), ...this.#ask()];
  }

  // Ids of positions `position` and on; those known already are skipped. Throws FrameError where some are missing.
  committed(position, ids, now, finish = "") {
    if (position > this.length) throw new FrameError(`ids from position ${position} arrived, ${this.length} is next`);
    const fresh = ids.slice(this.length - position);
    this.finish = finish || this.finish;
    if (!fresh.length) return this.#ask();
    const actions = this.#settle(fresh, now);
    this.#isStuck = false;
    this.#resends = 0;
    this.#lastCommitSeconds = now;
    return [...actions, ...this.#ask()];
  }

  #settle(fresh, now) {
    const right = this.#countRight(fresh, now);
    this.length += fresh.length;
    const rest = fresh.slice(right);
    if (!rest.length) return [];
    if (!this.#window.length) { // the target is ahead of the drafter
      this.#judgeHeld(rest[0]);
      if (this.#asked !== null) this.#since.push(...rest);
      return [{ do: "extend", ids: rest }];
    }
    return this.#miss(this.length - rest.length, rest);
  }

  #judgeHeld(id) {
    if (this.#held !== null) this.estimates.judged(this.#held === id);
    this.#held = null;
  }

  // Takes drafts that were right out of the window.
  #countRight(fresh, now) {
    const right = [];
    while (right.length < fresh.length && this.#window[0]?.id === fresh[right.length]) {
      right.push(this.#window.shift());
      this.estimates.judged(true);
    }
    this.#time(right, fresh.length, now);
    this.counts.accepted += right.length;
    return right.length;
  }

  // Loop and floor, from when ids arrive: the row of a right draft is sampled as the id after it.
  #time(right, fresh, now) {
    const before = this.#lastCommitSeconds, waited = now - before;
    if (this.#afterVerdict && before >= 0) this.estimates.turned(right.length ? waited : waited / fresh);
    const isInTime = before >= 0 && waited < IN_TIME * this.estimates.floorSeconds;
    for (const draft of [isInTime ? this.#lastRight : null, ...right.slice(0, fresh - 1)]) {
      if (draft) this.estimates.looped(now - draft.firstSeconds, draft.lastSeconds > draft.firstSeconds);
    }
    this.#afterVerdict = !this.#window.length && right.length < fresh;
    this.#lastRight = right.length === fresh ? right[right.length - 1] : null;
  }

  // The draft at `position` was wrong; `ids` are right, from there on.
  #miss(position, ids) {
    this.estimates.judged(false);
    this.counts.misses += 1;
    this.counts.wasted += this.#window.length;
    this.turn = position;
    this.#window = [];
    this.#asked = null;
    this.#since = [];
    this.#afterVerdict = true;
    return [{ do: "rewind", length: position }, { do: "extend", ids }];
  }

  // What the drafter answered to propose { ticket }. A newer ticket makes older ones worthless.
  proposed(ticket, chain, now) {
    if (this.#asked?.ticket !== ticket) return [];
    const { base: asked } = this.#asked, since = this.#since;
    this.#asked = null;
    this.#since = [];
    if (since.some((id, index) => chain[index] !== id)) return this.#ask();
    const base = asked + since.length, rest = chain.slice(since.length);
    const ids = this.#worthSending(rest).slice(0, Math.max(0, this.lastRow + 1 - base));
    this.#isStuck = !chain.length || (rest.length > 0 && !ids.length);
    if (!ids.length || !this.#isLinked || this.finish) return this.#ask();
    if (!this.choosePace(this.estimates).window) {
      if (base === this.length) [this.#held] = ids;
      return [];
    }
    return [...this.#send(base, ids, now), ...this.#ask()];
  }

  // Nothing follows a stop id, and the target has no other ids than its vocabulary's.
  #worthSending(ids) {
    const end = ids.findIndex((id) => this.stopIds.has(id) || id < 0 || id >= this.vocabSize);
    return end < 0 ? ids : ids.slice(0, end);
  }

  #send(baseRow, ids, now) {
    this.#held = null; // what is sent is judged as such
    for (const id of ids) this.#window.push({ id, firstSeconds: now, lastSeconds: now });
    this.counts.drafted += ids.length;
    return [{ do: "send", turn: this.turn, baseRow, ids }, { do: "extend", ids }];
  }

  #ask() {
    if (this.#asked || this.#isStuck || this.finish || !this.#isLinked || this.length === this.first) return [];
    const pace = this.choosePace(this.estimates);
    if (!pace.window && (this.#window.length || this.#held !== null)) return [];
    const inFlight = this.#window.length, base = this.length + inFlight;
    const chunk = Math.min(pace.chunk, Math.max(1, inFlight)); // the first after a miss goes alone, at once
    const count = Math.min(chunk, this.lastRow + 1 - base);
    if (count < 1 || pace.window - inFlight < Math.min(chunk, pace.window)) return [];
    this.#tickets += 1;
    this.#asked = { ticket: this.#tickets, base };
    return [{ do: "propose", ticket: this.#tickets, count }];
  }

  // Sends again what is in flight once the oldest of it is unanswered for 1.5 loops; each time in a row twice as long.
  passed(now) {
    if (this.wakeAt === null || now < this.wakeAt) return [];
    this.#resends += 1;
    return this.#resend(now);
  }

  #resend(now) {
    if (!this.#window.length) return [];
    for (const draft of this.#window) draft.lastSeconds = now;
    this.counts.resentFrames += 1;
    return [{ do: "send", turn: this.turn, baseRow: this.length, ids: this.#window.map((draft) => draft.id) }];
  }
}
