// One request with drafts made in this page: the drafting socket (docs/http_api.md), taken up again where it breaks.
// Text comes from the coordinator, which has the tokenizer; this page works on ids.
// Knows: the socket's messages and frames, resuming. Does not know: how guesses are made, the document.

import { ApiFailure } from "../api.js";
import { DraftLoop } from "./draft_loop.js";
import { Driver } from "./driver.js";
import { Estimates } from "./estimates.js";
import { Link, LinkBroken } from "./link.js";
import { choosePace } from "./pace.js";
import { SuffixDrafter } from "./suffix_drafter.js";
import { CommittedDecoder, DraftEncoder, FrameError } from "./wire.js";

const FIRST_PAUSE_MS = 200;
const LONGEST_PAUSE_MS = 5000;
const RESUME_MS = 60_000; // how long a broken request is asked for again
const LABELS = { drafter: "suffix", text: true };

// Nothing was asked for: the same request may be made in another way.
export class NoDraftingSocket extends LinkBroken {}

export class DraftedRequest {
  #seen = 0; // tokens whose ids and text are here: what a resumed link need not send again
  #driver = null;
  #head = null;
  #brokenAt = 0;
  #pause = FIRST_PAUSE_MS;

  // `connect()` gives a WebSocket to /v1/drafting; `memory`: this user's SuffixMemory for a digest of a tokenizer.
  constructor({ connect, body, memory, signal }) {
    Object.assign(this, { connect, body, memory, signal });
  }

  // What happened since the last one: { text, tokens, seed, finish, drafts: { drafted, accepted } }. Throws ApiFailure, LinkBroken, NoDraftingSocket.
  async *run() {
    try {
      for (;;) {
        try {
          yield* this.#oneLink();
          return;
        } catch (error) {
          if (!(error instanceof LinkBroken || error instanceof FrameError)) throw error;
          await this.#beforeTheNext(error);
        }
      }
    } finally {
      this.#driver?.end();
    }
  }

  async #beforeTheNext(error) {
    this.signal.throwIfAborted();
    this.#brokenAt ||= performance.now();
    if (this.#head === null || performance.now() - this.#brokenAt > RESUME_MS) throw error;
    this.#driver.linkLost();
    await pause(this.#pause, this.signal);
    this.#pause = Math.min(2 * this.#pause, LONGEST_PAUSE_MS);
  }

  async *#oneLink() {
    this.signal.throwIfAborted();
    const link = new Link(this.connect(), this.signal);
    try {
      if (!(await link.opened)) {
        this.signal.throwIfAborted();
        throw new (this.#head === null ? NoDraftingSocket : LinkBroken)("The coordinator did not open a drafting socket: try again, or switch drafts off.");
      }
      link.send(JSON.stringify(this.#opening()));
      this.#begin(await answer(link), link);
      yield* this.#follow(link);
    } finally {
      link.close();
    }
  }

  #opening() {
    return this.#head === null ? { kind: "completion", ...this.body, ...LABELS } : { resume: this.#head.id, after: this.#seen, ...LABELS };
  }

  #begin(head, link) {
    const isFirst = this.#head === null;
    this.#head ??= head;
    const { vocab_size: vocabSize } = this.#head;
    this.encoder = new DraftEncoder(vocabSize);
    this.decoder = new CommittedDecoder(vocabSize);
    this.send = (frame) => link.send(this.encoder.encode(frame));
    if (isFirst) this.#driver = this.#makeDriver(head);
    else this.#driver.linkResumed();
  }

  #makeDriver({ prompt_token_ids: promptIds, max_tokens: maxTokens, vocab_size: vocabSize, stop_ids: stopIds, tokenizer }) {
    const promptLength = promptIds.length, maxRows = promptLength + maxTokens;
    const loop = new DraftLoop({ promptLength, maxRows, vocabSize, stopIds, choosePace, estimates: new Estimates() });
    return new Driver({ loop, drafter: new SuffixDrafter(this.memory(tokenizer)), promptIds, send: (frame) => this.send(frame) });
  }

  async *#follow(link) {
    for (;;) {
      const message = await answer(link);
      if (message instanceof Uint8Array) {
        this.#driver.committed(this.decoder.decode(message));
        continue;
      }
      if (message.text !== undefined) {
        this.#seen = message.tokens;
        this.#brokenAt = 0;
        this.#pause = FIRST_PAUSE_MS;
      }
      yield this.#news(message);
      if (message.finish_reason) return;
    }
  }

  #news({ text = "", finish_reason: finish = "" }) {
    const { drafted, accepted } = this.#driver.loop.counts;
    return { text, tokens: this.#seen, seed: this.#head.sampling.seed, finish, drafts: { drafted, accepted } };
  }
}

// Over at once where the signal aborts.
const pause = (milliseconds, signal) => new Promise((resume) => {
  setTimeout(resume, milliseconds);
  signal.addEventListener("abort", resume, { once: true });
});

async function answer(link) {
  const message = await link.receive();
  if (message.error) throw new ApiFailure(message.status ?? 500, message);
  return message;
}
