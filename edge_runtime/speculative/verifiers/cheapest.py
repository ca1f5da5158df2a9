"""Of several dialects that one server speaks, for each window the one that makes it compute least.

vLLM computes the whole text anew for prompt log-probabilities, and for `prefixes` half a block for each draft: the
first is better for short texts, the second for long ones.

Knows: what dialects say they cost. Does not know: formats.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.speculative.verifiers.base import Decoded, Dialect, Json, Verdict, Window


class Cheapest:
    """At least one dialect, all with the same path. What is not about windows is left to the first."""

    def __init__(self, dialects: Sequence[Dialect]) -> None:
        self._dialects = tuple(dialects)
        self.name = "+".join(dialect.name for dialect in dialects)
        self.path = dialects[0].path

    def for_window(self, window: Window) -> Dialect:
        return min(self._dialects, key=lambda dialect: dialect.computed_tokens(window))

    def verify_body(self, window: Window) -> Json:
        return self.for_window(window).verify_body(window)

    def read_verdict(self, window: Window, answer: Json) -> Verdict:
        return self.for_window(window).read_verdict(window, answer)

    def decode_body(self, ids: tuple[int, ...], max_tokens: int, *, ignore_end: bool) -> Json:
        return self._dialects[0].decode_body(ids, max_tokens, ignore_end=ignore_end)

    def read_event(self, event: Json, have: int) -> Decoded:
        return self._dialects[0].read_event(event, have)

    def text_body(self, text: str) -> Json:
        return self._dialects[0].text_body(text)

    def read_text_ids(self, answer: Json) -> tuple[int, ...]:
        return self._dialects[0].read_text_ids(answer)

    def prompt_tokens(self, window: Window) -> int:
        return self.for_window(window).prompt_tokens(window)

    def computed_tokens(self, window: Window) -> int:
        return self.for_window(window).computed_tokens(window)
