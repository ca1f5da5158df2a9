"""One prompt for each place, in one request: the server decodes one token after each, with its prefix cache.

`prompt` is a list: the ids, the ids and one draft, … all drafts. Each generated token is the server's own choice at
that place, made by its own sampler, and no log-probabilities are needed. Nearly all of every prompt is in the server's
prefix cache, except what is in its last, unfinished block of tokens.

Knows: this format. Does not know: HTTP, what becomes of a verdict.
"""

from __future__ import annotations

from edge_runtime.errors import ProtocolError
from edge_runtime.speculative.verifiers.base import Json, Verdict, Window, as_id, at, list_at, object_at
from edge_runtime.speculative.verifiers.completions import VLLM_IDS, Completions, cached_tokens
from edge_runtime.speculative.verifiers.token_names import TokenNames

BLOCK_TOKENS = 16  # vLLM's default: only whole blocks are cached


class Prefixes(Completions):
    name = "prefixes"

    def __init__(self, model: str, names: TokenNames) -> None:
        super().__init__(model, names, VLLM_IDS)

    def verify_body(self, window: Window) -> Json:
        prompts = [[*window.ids, *window.drafts[:count]] for count in range(len(window.drafts) + 1)]
        return self.body(prompts, 1)

    def read_verdict(self, window: Window, answer: Json) -> Verdict:
        choices = list_at(answer, "choices")
        if len(choices) != len(window.drafts) + 1:
            raise ProtocolError(
                f"the server answered {len(choices)} of {len(window.drafts) + 1} prompts in one request",
                hint="it does not take several prompts of ids at once; use another dialect",
            )
        ordered = [object_at(choices, place) for place in range(len(choices))]
        ordered.sort(key=lambda choice: as_id(at(choice, "index")))
        generated = [self.generated(choice) for choice in ordered]
        if any(len(ids) != 1 for ids in generated):
            raise ProtocolError("the server generated another number of tokens than it was asked for")
        ended = ordered[-1].get("finish_reason") == "stop"
        return Verdict(tuple(ids[0] for ids in generated), ended, cached_tokens(answer))

    def text_body(self, text: str) -> Json:
        return self.body(text, 1, add_special_tokens=False)

    def read_text_ids(self, answer: Json) -> tuple[int, ...]:
        return tuple(as_id(token) for token in list_at(answer, "choices", 0, "prompt_token_ids"))

    def prompt_tokens(self, window: Window) -> int:
        count = len(window.drafts)
        return (count + 1) * len(window.ids) + count * (count + 1) // 2

    def computed_tokens(self, window: Window) -> int:
        """Of each prompt what lies beyond the last whole block; half a block is missing in the mean."""
        count = len(window.drafts)
        return min(self.prompt_tokens(window), (count + 1) * (BLOCK_TOKENS // 2 + count // 2 + 1))
