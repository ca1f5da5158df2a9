// The prompt box: one completion at a time, streamed, with what it took.

import { byId, h, setText } from "./dom.js";
import { plural, rate } from "./format.js";

export class PromptBox {
  constructor(api) {
    this.api = api;
    this.model = null;
    this.running = null;
    byId("prompt-form").addEventListener("submit", (event) => { event.preventDefault(); this.generate(); });
    byId("stop").addEventListener("click", () => this.running?.abort());
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
      setText(byId("output-note"), await this.follow(request, output, text));
    } catch (error) {
      setText(byId("output-note"), error.name === "AbortError" ? "stopped" : [error.message, error.hint].filter(Boolean).join(" Hint: "));
    } finally {
      this.running = null;
      byId("generate").disabled = false;
      byId("stop").disabled = true;
    }
  }

  async follow(request, output, text) {
    let first = 0, finish = "", seed = 0, tokens = 0;
    for await (const chunk of this.api.complete(request, this.running.signal)) {
      const now = performance.now();
      seed = chunk.seed;
      tokens = chunk.usage?.completion_tokens ?? tokens;
      for (const choice of chunk.choices) {
        if (choice.text) {
          first ||= now;
          const isAtEnd = output.scrollHeight - output.scrollTop - output.clientHeight < 24;
          text.append(choice.text);
          if (isAtEnd) output.scrollTop = output.scrollHeight;
        }
        finish = choice.finish_reason ?? finish;
      }
    }
    const took = (performance.now() - first) / 1000;
    const speed = tokens > 1 && took > 0 ? `, ${rate((tokens - 1) / took)} tok/s` : "";
    return `${plural(tokens, "token")}${speed}, finished: ${finish}, seed ${seed}`;
  }
}
