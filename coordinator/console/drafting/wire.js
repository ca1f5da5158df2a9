// The binary frames of the device's link, as edge_runtime/speculative/wire.py has them: drafts up, committed ids down, each
// as a difference to the one before. Side rows are not sent from a page. One codec per connection.
// Knows: frames as values, their bytes, the last frame of its direction. Does not know: sockets, requests, verdicts.

const TWO_BYTE_VOCABULARY = 1 << 16;
const MAX_COMMITTED_IDS = 1 << 16;
const VARINT_BYTES = 5;
const RESTART = 0x80, CHAIN_FIELD = 0x3f;
const LOAD = 0, LOADS = 255;
const POSITION = 0x80, FINISH_SHIFT = 5, COUNT_FIELD = 0x1f;
const FINISHES = ["", "stop", "length", "cancelled"];

export class FrameError extends Error {}

const idBytes = (vocabSize) => (vocabSize <= TWO_BYTE_VOCABULARY ? 2 : 3);

function pushVarint(out, value) {
  let rest = value;
  for (; rest >= 0x80; rest = Math.floor(rest / 0x80)) out.push((rest % 0x80) | 0x80);
  out.push(rest);
}

function pushIds(out, ids, width) {
  for (const id of ids) for (let byte = 0; byte < width; byte += 1) out.push((id >>> (8 * byte)) & 0xff);
}

// `encode({ turn, baseRow, ids })` in the order in which frames are sent: guesses for positions `baseRow` and on.
export class DraftEncoder {
  constructor(vocabSize) {
    this.width = idBytes(vocabSize);
    this.turn = 0;
    this.end = null; // where the last chain ended; null: nothing was sent
  }

  encode({ turn, baseRow, ids }) {
    if (!ids.length || turn < this.turn || turn > baseRow) throw new FrameError("a draft frame needs ids, and a turn that does not sink");
    const isRestart = turn !== this.turn || baseRow !== this.end;
    const out = [Math.min(ids.length - 1, CHAIN_FIELD) | (isRestart ? RESTART : 0)];
    if (ids.length - 1 >= CHAIN_FIELD) pushVarint(out, ids.length - 1 - CHAIN_FIELD);
    if (isRestart) {
      pushVarint(out, turn - this.turn);
      pushVarint(out, baseRow - turn);
    }
    pushIds(out, ids, this.width);
    this.turn = turn;
    this.end = baseRow + ids.length;
    return Uint8Array.from(out);
  }
}

// `decode(bytes)`: { position, ids, finish, load }, ids of positions `position` and on; `load`: of the target, 0 to 1, in a frame
// that has nothing else, null in others. Throws FrameError; the state is then as before.
export class CommittedDecoder {
  constructor(vocabSize) {
    this.vocabSize = vocabSize;
    this.next = null; // position that need not be said
  }

  decode(data) {
    const read = new Reader(data);
    const head = read.byte();
    if (head === LOAD) {
      const load = read.byte() / LOADS;
      read.end();
      return { position: this.next ?? 0, ids: [], finish: "", load };
    }
    const short = head & COUNT_FIELD;
    const count = short === COUNT_FIELD ? COUNT_FIELD + read.varint() : short;
    const position = head & POSITION ? read.varint() : this.next;
    if (position === null) throw new FrameError("committed ids without a position");
    if (count > MAX_COMMITTED_IDS) throw new FrameError(`${count} committed ids in one frame`);
    const ids = read.ids(count, idBytes(this.vocabSize));
    if (ids.some((id) => id >= this.vocabSize)) throw new FrameError("an id lies outside the vocabulary");
    read.end();
    this.next = position + count;
    return { position, ids, finish: FINISHES[(head >> FINISH_SHIFT) & 3], load: null };
  }
}

// What is left of a received frame.
class Reader {
  constructor(data) {
    this.data = data;
    this.at = 0;
  }

  byte() {
    if (this.at >= this.data.length) throw new FrameError("a frame ends too early");
    return this.data[this.at++];
  }

  varint() {
    let value = 0, scale = 1;
    for (let index = 0; index < VARINT_BYTES; index += 1, scale *= 0x80) {
      const byte = this.byte();
      value += (byte & 0x7f) * scale;
      if (byte < 0x80) return value;
    }
    throw new FrameError("a number has too many bytes");
  }

  ids(count, width) {
    const ids = [];
    for (let index = 0; index < count; index += 1) {
      let id = 0;
      for (let byte = 0; byte < width; byte += 1) id |= this.byte() << (8 * byte);
      ids.push(id);
    }
    return ids;
  }

  end() {
    if (this.at !== this.data.length) throw new FrameError("bytes are left over");
  }
}
