// A drafter, a DraftLoop and a link: what the loop orders is done at once and in order. A drafter that fails ends drafting,
// never the request.
// Knows: one request, the page's clock. Does not know: sockets, text.

const LEAST_MS = 1; // timers of a page are no finer

export class Driver {
  #alarm = null;
  #isOver = false;

  // `send({ turn, baseRow, ids })` takes frames; while there is no link it may drop them.
  constructor({ loop, drafter, promptIds, send, seconds = () => performance.now() / 1000 }) {
    Object.assign(this, { loop, drafter, send, seconds, failure: null });
    drafter.begin(promptIds);
    this.#act(loop.start(seconds()));
  }

  // A committed frame arrived. Throws FrameError where ids before it are missing.
  committed({ position, ids, finish, load = null }) {
    if (load !== null) this.loop.estimates.load = load;
    this.#act(this.loop.committed(position, ids, this.seconds(), finish));
    if (finish) this.end(finish !== "cancelled");
  }

  linkLost() { this.#act(this.loop.linkLost()); }
  linkResumed() { this.#act(this.loop.linkResumed(this.seconds())); }

  // No more drafts. `learn`: what was committed may be remembered.
  end(learn = false) {
    if (this.#isOver) return;
    this.#isOver = true;
    clearTimeout(this.#alarm);
    if (this.failure !== null) return;
    this.drafter.rewind(this.loop.length); // drafts that were never judged
    this.drafter.end(learn);
  }

  #act(actions) {
    if (this.#isOver || this.failure !== null) return;
    const queue = [...actions];
    try {
      while (queue.length) queue.push(...this.#do(queue.shift()));
    } catch (error) {
      this.failure = error;
      console.warn("drafting stopped, the request goes on:", error);
    }
    this.#setAlarm();
  }

  #do(action) {
    if (action.do === "send") this.send(action);
    else if (action.do === "rewind") this.drafter.rewind(action.length);
    else if (action.do === "extend") this.drafter.extend(action.ids);
    else return this.loop.proposed(action.ticket, this.drafter.propose(action.count).ids, this.seconds());
    return [];
  }

  #setAlarm() {
    clearTimeout(this.#alarm);
    const at = this.failure === null ? this.loop.wakeAt : null;
    if (at === null) return;
    const wait = Math.max(LEAST_MS, (at - this.seconds()) * 1000);
    this.#alarm = setTimeout(() => this.#act(this.loop.passed(this.seconds())), wait);
  }
}
