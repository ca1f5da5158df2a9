"""The sampling end of a pipeline: one sampler per session, fed with every id in row order.

Knows: which ids a sampler has seen, and that a new parent takes some back. Does not know: links, finish rules, threads.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.core import SamplingParams, Token
from edge_runtime.engine.base import Rows
from edge_runtime.engine.sampler import Sampler
from edge_runtime.engine.side_rows import NO_SIDES, SideRows


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

    def sample(
        self, base_row: int, ids: Sequence[int], logits: Rows, sides: SideRows = NO_SIDES
    ) -> tuple[Token, ...]:
        """Take in rows base_row .. and sample after each of the last len(logits) - len(sides) of them. Logits [n, V].

        Goes on at the child whose id is the sample, the chain's first, else a side row; stops where there is none: all
        others were guessed wrong.
        """
        chain_logits = logits[: len(logits) - len(sides)]
        quiet = len(ids) - len(chain_logits)
        self._catch_up(base_row, ids[:quiet])
        tokens: list[Token] = []
        for token_id, row in zip(ids[quiet:], chain_logits, strict=True):
            if tokens and token_id != tokens[-1].id:
                break
            tokens.append(self._after(token_id, row))
        parent = len(self._ids) - 1
        while tokens and (side := sides.child(parent, tokens[-1].id)) is not None:
            tokens.append(self._after(sides.ids[side], logits[len(chain_logits) + side]))
            parent = ~side
        return tuple(tokens)

    def _after(self, token_id: int, logits: Rows) -> Token:
        self._observe((token_id,))
        position = len(self._ids)
        return Token(position, *self._sampler.sample(logits, position))

    def _catch_up(self, base_row: int, quiet: Sequence[int]) -> None:
        """Have seen the ids below base_row + len(quiet), these being the last of them."""
        wanted = base_row + len(quiet)
        seen = self._ids[base_row:wanted]
        if list(quiet[: len(seen)]) != seen or len(self._ids) > wanted:
            self._go_back_to(base_row)
            seen = []
        self._observe(quiet[len(seen) :])

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
