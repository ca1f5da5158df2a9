"""The sampling end of a pipeline: one sampler per session, fed with every id in row order.

Knows: which ids a sampler has seen, and that a new parent takes some back. Does not know: links, finish rules, threads.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.core import SamplingParams, Token
from edge_runtime.engine.base import Rows
from edge_runtime.engine.sampler import Sampler


class TailSession:
    def __init__(self, params: SamplingParams, vocab_size: int, prompt_rows: int) -> None:
        self._params = params
        self._vocab_size = vocab_size
        self._prompt_rows = prompt_rows
        self._ids: list[int] = []
        self._sampler = Sampler(params, vocab_size)

    def adopt(self, ids: Sequence[int]) -> None:
        """Rows that are here already, from a session that began alike: penalties count their ids, too."""
        self._observe(ids)

    def sample(self, base_row: int, ids: Sequence[int], logits: Rows) -> tuple[Token, ...]:
        """Take in rows base_row .. and sample after each of the last len(logits) of them. Logits [n, V].

        Stops at the first sample that is not the id of the next row: that row was guessed wrong, and all after it.
        """
        if base_row < len(self._ids):
            self._go_back_to(base_row)
        quiet = len(ids) - len(logits)
        self._observe(ids[:quiet])
        tokens: list[Token] = []
        for token_id, row in zip(ids[quiet:], logits, strict=True):
            if tokens and token_id != tokens[-1].id:
                break
            self._observe((token_id,))
            position = len(self._ids)
            tokens.append(Token(position, *self._sampler.sample(row, position)))
        return tuple(tokens)

    def _observe(self, ids: Sequence[int]) -> None:
        prompt_left = max(0, self._prompt_rows - len(self._ids))
        if ids[:prompt_left]:
            self._sampler.observe(ids[:prompt_left], generated=False)
        if ids[prompt_left:]:
            self._sampler.observe(ids[prompt_left:], generated=True)
        self._ids.extend(ids)

    def _go_back_to(self, row: int) -> None:
        """Samplers only add; taking ids back means counting again."""
        kept = self._ids[:row]
        self._ids = []
        self._sampler = Sampler(self._params, self._vocab_size)
        self._observe(kept)
