"""A toy target whose every sample depends on every id before it, and a drafter that is right as often as wanted.

Each layer keeps one number per row, made of the one before it and of what the layer below says; a wrong or stale number
anywhere changes all samples that follow. Numbers stay below 2^24, so that float32 rows carry them exactly.

Knows: ids, layers' numbers, the product's own sampler. Does not know: stages, frames, links, time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.core import SamplingParams
from edge_runtime.engine.sampler import Sampler
from edge_runtime.speculative.drafters.base import Proposal

LAYERS = 4
VOCABULARY = 64
_PRIME = 16777213
_CONTEXTS = 4096
_LOGITS: NDArray[np.float32] = (
    np.random.default_rng(5).normal(0, 2.5, (_CONTEXTS, VOCABULARY)).astype(np.float32)
)
_UNIT = 1 << 20


def layer_row(layer: int, before: int, value: int) -> int:
    """`before`: of the same layer, one row up, 0 at row 0."""
    return (before * 48271 + (value + 1) * 6364137 + layer * 977 + 12345) % _PRIME


def logits_of(value: int) -> NDArray[np.float32]:
    """[V], of the last layer's number."""
    row: NDArray[np.float32] = _LOGITS[value % _CONTEXTS]
    return row


def advance(states: tuple[int, ...], token: int) -> tuple[int, ...]:
    """All layers' numbers after one more id."""
    value, after = token, []
    for layer, before in enumerate(states):
        value = layer_row(layer, before, value)
        after.append(value)
    return tuple(after)


def plain_loop(prompt: Sequence[int], max_rows: int, sampling: SamplingParams) -> list[int]:
    """The reference: one id at a time, no stages, no drafts."""
    sampler, ids, states = Sampler(sampling, VOCABULARY), list(prompt), (0,) * LAYERS
    sampler.observe(prompt, generated=False)
    for token in prompt:
        states = advance(states, token)
    while len(ids) < max_rows:
        token, _ = sampler.sample(logits_of(states[-1]), len(ids))
        sampler.observe((token,), generated=True)
        ids.append(token)
        states = advance(states, token)
    return ids


class DialDrafter:
    """Right with chance `acceptance`, independently at every position of every continuation.

    Knows the target, but not its penalties: with those it is right less often.
    """

    def __init__(
        self, acceptance: float, sampling: SamplingParams, luck: int = 0, rescue: float = 0.4
    ) -> None:
        """`rescue`: chance that the right id stands beside a wrong one, where there are side nodes."""
        self._acceptance = acceptance
        self._rescue = rescue
        self._luck = luck
        self._sampler = Sampler(
            SamplingParams(temperature=sampling.temperature, seed=sampling.seed), VOCABULARY
        )
        self._states: list[tuple[int, ...]] = [(0,) * LAYERS]

    source = "dial"
    memory_bytes = 0

    def begin(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        """`sampling` is the one it was made for."""
        self._states = [(0,) * LAYERS]
        self.extend(prompt_ids)

    def extend(self, ids: Sequence[int]) -> None:
        for token in ids:
            self._states.append(advance(self._states[-1], token))

    def rewind(self, length: int) -> None:
        del self._states[length + 1 :]

    def propose(self, count: int, width: int = 1) -> Proposal:
        states, ids = self._states[-1], []
        sides: list[tuple[int, int]] = []  # parent, id
        for index in range(count):
            position = len(self._states) - 1 + index
            token, _ = self._sampler.sample(logits_of(states[-1]), position)
            is_right = _chance(states[-1], self._luck + position) < self._acceptance
            is_rescued = not is_right and _chance(states[-1], self._luck - 1 - position) < self._rescue
            first = token if is_rescued else (token + 2) % VOCABULARY
            sides += [(index - 1, (first + 3 * side) % VOCABULARY) for side in range(width - 1)]
            token = token if is_right else (token + 1) % VOCABULARY
            ids.append(token)
            states = advance(states, token)
        chances = [self._acceptance] * count + [
            (1 - self._acceptance) * self._rescue / max(1, width - 1)
        ] * len(sides)
        parents = (*range(-1, count - 1), *(parent for parent, _ in sides))
        return Proposal((*ids, *(token for _, token in sides)), parents, tuple(chances), self.source)

    def end(self, *, learn: bool = True) -> None:
        """It learns nothing."""

    def close(self) -> None:
        """It holds nothing."""


def _chance(value: int, salt: int) -> float:
    mixed = ((value + 1) * 0x9E3779B97F4A7C15 ^ (salt + 1) * 0xC2B2AE3D27D4EB4F) & (1 << 64) - 1
    mixed = (mixed ^ mixed >> 31) * 0xD6E8FEB86659FD93 & (1 << 64) - 1
    return (mixed >> 40) % _UNIT / _UNIT
