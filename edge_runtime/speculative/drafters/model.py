"""A small model as drafter: what it would draw itself, with the target's seed and noise.

Two samplers with the same noise draw the same id far more often than two that toss their own coins: with probability
sum over i of 1 / sum over j of max(p_j / p_i, q_j / q_i), at least (1 - TV) / (1 + TV) (arXiv 2408.07978).
Knows: one request's ids, a stage that holds a whole model. Does not know: verdicts, links, what the target is.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SamplingParams, SessionId
from edge_runtime.engine.base import Batch, Span
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.executors import AUTO
from edge_runtime.engine.sampler import Sampler
from edge_runtime.errors import UsageError
from edge_runtime.speculative.drafters.base import ROOT, Proposal, no_proposal
from edge_runtime.speculative.drafters.favoured import Favourite, favoured
from edge_runtime.speculative.drafters.window import Window

_SESSION = SessionId(1)
_PREFILL_ROWS = 256  # of one run: bounds its scratch memory

Logits = NDArray[np.float32]


@dataclass(slots=True)
class _Held:
    """What the stage holds: rows of `ids`, taken from the sequence as a window that begins at `start`."""

    ids: list[int]
    start: int = 0


class ModelDrafter:
    source = "model"

    def __init__(self, bundle: Bundle, *, kv_bytes: int, executor: str = AUTO, threads: int = 1) -> None:
        """Keys and values never take more than `kv_bytes`; a longer sequence is drafted from a `Window` of it.

        Raises UsageError (not a generator), CapacityError (`kv_bytes` below one page), BundleError or EngineError.
        """
        model = bundle.manifest.model
        if model.kind != "generator":
            raise UsageError(f"{model.name} writes no text, so it can't draft", hint="name a language model")
        layers = LayerRange(0, bundle.manifest.num_layers - 1)
        self._stage = CpuStage.load(
            bundle, layers, threads=threads, kv_budget_bytes=kv_bytes, executor=executor
        )
        self._vocab_size = model.vocab_size
        self._window = Window(min(self._stage.kv_capacity_tokens, model.max_context_tokens))
        self._sampling = SamplingParams()
        self._ids = array("i")
        self._prompt_tokens = 0
        self._held = _Held([])

    @property
    def memory_bytes(self) -> int:
        """Weights, keys and values in use, and ids."""
        return self._stage.weight_bytes + self.kv_bytes + 4 * len(self._ids)

    @property
    def kv_bytes(self) -> int:
        return self._stage.kv_committed_bytes

    def begin(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        self._forget_rows()
        self._stage.open(_SESSION, self._window.rows)
        bias = tuple(pair for pair in sampling.logit_bias if pair[0] < self._vocab_size)
        self._sampling = replace(sampling, logit_bias=bias, top_logprobs=-1)
        self._ids = array("i", self._known(prompt_ids))
        self._prompt_tokens = len(prompt_ids)

    def extend(self, ids: Sequence[int]) -> None:
        self._ids.extend(self._known(ids))

    def rewind(self, length: int) -> None:
        """Rows stay until others take their place: `propose` compares ids."""
        del self._ids[length:]

    def propose(self, count: int, width: int = 1) -> Proposal:
        count = min(count, self._window.longest_draft)
        if count < 1 or not self._ids:
            return no_proposal(self.source)
        sampler = self._sampler()
        logits = self._catch_up(count)
        steps: list[list[Favourite]] = []
        while True:
            position = len(self._ids) + len(steps)
            steps.append(favoured(sampler.penalised(logits), self._sampling, position, width))
            if len(steps) == count:
                return _as_tree(steps, self.source)
            drawn = steps[-1][0].token
            sampler.observe([drawn], generated=True)
            logits = self._run([drawn])

    def end(self, *, learn: bool = True) -> None:
        """A model learns nothing from a request."""
        self._forget_rows()
        self._ids, self._prompt_tokens = array("i"), 0

    def close(self) -> None:
        self._stage.close()

    def _known(self, ids: Sequence[int]) -> list[int]:
        """A target's vocabulary may be padded further than the draft's: such ids are no text, and any will do."""
        last = self._vocab_size - 1
        return [min(token, last) for token in ids]

    def _sampler(self) -> Sampler:
        """That has seen what the target's will have: made anew, since what is observed can't be taken back."""
        sampler = Sampler(self._sampling, self._vocab_size)
        if _has_penalties(self._sampling):
            sampler.observe(self._ids[: self._prompt_tokens], generated=False)
            sampler.observe(self._ids[self._prompt_tokens :], generated=True)
        return sampler

    # ------------------------------------------------------------ rows

    def _catch_up(self, room: int) -> Logits:
        """Logits [V] after the sequence; only rows that are not there yet are computed, the last one always."""
        held = self._held
        start = self._window.start(len(self._ids), room, held.start)
        wanted = self._window.ids(self._ids, start)
        same = _common_prefix(held.ids, wanted[:-1])
        del held.ids[same:]
        held.start = start
        return self._run(wanted[same:])

    def _run(self, ids: Sequence[int]) -> Logits:
        """Logits [V] of the last of `ids`, which follow what is held."""
        for first in range(0, len(ids), _PREFILL_ROWS):
            piece = tuple(ids[first : first + _PREFILL_ROWS])
            is_last = first + len(piece) == len(ids)
            span = Span(_SESSION, len(self._held.ids), piece, logit_rows=int(is_last))
            logits = self._stage.run(Batch((span,), None))
            self._held.ids.extend(piece)
        last: Logits = logits[0]
        return last

    def _forget_rows(self) -> None:
        self._stage.drop(_SESSION)
        self._held = _Held([])


def _as_tree(steps: Sequence[Sequence[Favourite]], source: str) -> Proposal:
    """Each step's first is the chain's next node; its others stand beside that one."""
    nodes = [(step[0], depth - 1) for depth, step in enumerate(steps)]
    nodes += [(other, depth - 1) for depth, step in enumerate(steps) for other in step[1:]]
    assert nodes[0][1] == ROOT
    return Proposal(
        ids=tuple(favourite.token for favourite, _ in nodes),
        parents=tuple(parent for _, parent in nodes),
        probabilities=tuple(favourite.probability for favourite, _ in nodes),
        source=source,
    )


def _common_prefix(held: Sequence[int], wanted: Sequence[int]) -> int:
    both = min(len(held), len(wanted))
    if held[:both] == wanted[:both]:
        return both
    return int((np.array(held[:both]) != np.array(wanted[:both])).argmax())


def _has_penalties(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1.0 or bool(sampling.presence_penalty or sampling.frequency_penalty)
