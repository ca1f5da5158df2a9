// The prompt box: one completion at a time, streamed, with what it took; with drafts of this page where they are switched on.

import { byId, h, setText } from "./dom.js";
import { Memories } from "./drafting/memories.js";
import { DraftedRequest, NoDraftingSocket } from "./drafting/request.js";
import { plural } from "./format.js";
import { Progress } from "./progress.js";

const NO_SOCKET = "No drafting socket could be opened (a proxy that knows no WebSockets?): the last answer came without drafts.";

export class PromptBox {
  constructor(api) {
    this.api = api;
    this.model = null;
    this.running = null;
    this.memories = new Memories();
    byId("prompt-form").addEventListener("submit", (event) => { event.preventDefault(); this.generate(); });
    byId("stop").addEventListener("click", () => this.running?.abort());
    byId("forget-drafts").addEventListener("click", () => { this.memories.clear(); this.showMemory(); });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.generate();
    });
  }

  update(model) {
    this.model = model;
    const isGenerator = model.kind === "generator";
    setText(byId("prompt-note"), isGenerator ? "Ctrl + Enter generates" : "This model embeds; it does not generate.");
    byId("generate").disabled = !isGenerator || this.running !== null;
  }

  showMemory() {
    const ids = this.memories.rememberedIds;
    setText(byId("forget-drafts"), `Forget ${plural(ids, "token")} of past answers`);
    byId("forget-drafts").hidden = ids === 0;
  }

  async generate() {
    if (this.running !== null || this.model === null) return;
    const prompt = byId("prompt").value;
    const request = {
      model: this.model.name, prompt,
      max_tokens: byId("max-tokens").valueAsNumber || 64, temperature: byId("temperature").valueAsNumber || 0,
    };
    this.running = new AbortController();
    byId("generate").disabled = true;
    byId("stop").disabled = false;
    const output = byId("output"), text = h("span");
    output.replaceChildren(h("span", { class: "given" }, prompt), text);
    setText(byId("output-note"), "waiting for the first token");
    try {
      await this.follow(request, output, text);
    } catch (error) {
      setText(byId("output-note"), error.name === "AbortError" ? "stopped" : [error.message, error.hint].filter(Boolean).join(" Hint: "));
    } finally {
      this.running = null;
      byId("generate").disabled = false;
      byId("stop").disabled = true;
      this.showMemory();
    }
  }

  async follow(request, output, text) {
    const progress = new Progress();
    for await (const news of this.open(request)) {
      if (news.text) {
        const isAtEnd = output.scrollHeight - output.scrollTop - output.clientHeight < 24;
        text.append(news.text);
        if (isAtEnd) output.scrollTop = output.scrollHeight;
      }
      const line = progress.update(news, performance.now());
      if (news.tokens) setText(byId("output-note"), line);
    }
  }

  // { text, tokens, seed, finish, drafts } as they come; `drafts` only where this page makes them.
  async *open(request) {
    const { signal } = this.running;
    if (byId("draft").checked) {
      const memory = (tokenizer) => this.memories.of(tokenizer);
      try {
        yield* new DraftedRequest({ connect: () => this.api.openDrafting(), body: request, memory, signal }).run();
        return;
      } catch (error) {
        if (!(error instanceof NoDraftingSocket)) throw error;
        setText(byId("draft-note"), NO_SOCKET);
      }
    }
    yield* plainNews(this.api.complete(request, signal));
  }
}

async function* plainNews(chunks) {
  let finish = "";
  for await (const { choices, seed, usage } of chunks) {
    finish = choices[0]?.finish_reason ?? finish;
    yield { text: choices[0]?.text, tokens: usage?.completion_tokens ?? 0, seed, finish };
  }
}
