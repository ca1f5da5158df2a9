// A WebSocket whose messages are awaited one after the other.
// Knows: one socket. Does not know: what messages mean.

const OPENING_MS = 5000;

export class LinkBroken extends Error {}

export class Link {
  #inbox = [];
  #isClosed = false;
  #wake = () => {};

  // `socket`: a WebSocket that may still be opening. Aborting `signal` closes it.
  constructor(socket, signal) {
    this.socket = socket;
    socket.binaryType = "arraybuffer";
    socket.addEventListener("message", ({ data }) => {
      this.#inbox.push(typeof data === "string" ? JSON.parse(data) : new Uint8Array(data));
      this.#wake();
    });
    socket.addEventListener("close", () => this.#end());
    signal.addEventListener("abort", () => this.close(), { once: true });
    // Whether it did, in time: a proxy that knows no WebSockets may never answer.
    this.opened = new Promise((resolve) => {
      setTimeout(resolve, OPENING_MS, false);
      socket.addEventListener("open", () => resolve(true), { once: true });
      socket.addEventListener("close", () => resolve(false), { once: true });
    });
  }

  // The next message: an object, or the bytes of a frame. Throws LinkBroken where no more will come.
  async receive() {
    while (!this.#inbox.length) {
      if (this.#isClosed) throw new LinkBroken("The drafting socket was closed.");
      await new Promise((resolve) => { this.#wake = resolve; });
    }
    return this.#inbox.shift();
  }

  // Nothing is sent on a link that broke: `receive` says so.
  send(data) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(data);
  }

  close() {
    this.socket.close();
    this.#end(); // whoever is gone need not be waited for
  }

  #end() {
    this.#isClosed = true;
    this.#wake();
  }
}
