"""Ids with drafts against the ids of one model that decodes alone, through real layers, samplers and protocol code.

As `identity.py`, with `CpuWorldStage` for stages: several stages of a small model, virtual links that lose, repeat,
delay and break, leases that change the cut, and every drafter, the product's own ones included. The plain ids come from
the whole model in one stage, one row at a time: no pipeline, no protocol, no queue.

Knows: settings, a small bundle, how ids are compared. Does not know: how they come about.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

from benchmarks.simulator.cpu_stage import CpuWorldStage
from benchmarks.simulator.identity import FAULTS, SAMPLINGS, Compared, compared, totals
from benchmarks.simulator.world import Setting, World
from benchmarks.simulator.world_stage import WorldStage
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SamplingParams, SessionId
from edge_runtime.engine.base import Batch, Span
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.sampler import Sampler
from edge_runtime.speculative.controller import Limits
from edge_runtime.speculative.drafters.base import Drafter, Proposal
from edge_runtime.speculative.drafters.choose import DraftBudget, make_drafter

DRAFTERS = ("right", "mixed", "wrong", "suffix", "model", "auto")
LIMITS = (Limits(), Limits(max_width=3), Limits(max_window=3), Limits(max_window=16, max_chunk=1))
PROMPT_TOKENS = 24
STAGES = (1, 2, 3)
WINDOW_TOKENS = 64  # of context that the model drafter keeps
_KV_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Case:
    drafter: str
    sampling: str
    faults: str
    setting: Setting

    @property
    def name(self) -> str:
        width = self.setting.limits.max_width
        return f"{self.drafter}, {self.sampling}, {self.faults}, {self.setting.stages} stages, width {width}"


class CpuWorld(World):
    def __init__(self, setting: Setting, drafter: Drafter, bundle: Bundle) -> None:
        self.bundle = bundle
        self.layers = bundle.manifest.num_layers
        self.vocab_size = bundle.manifest.model.vocab_size
        super().__init__(setting, drafter)

    def _stage(self, name: str) -> WorldStage:
        return CpuWorldStage(name, self.bundle, self.clock, self._step_seconds, self._post)

    def _edges(self) -> list[int]:
        """Every stage has a layer; what lies between the first and the last cut moves from lease to lease."""
        inner = range(1, self.layers)
        cuts = list(combinations(inner, self.setting.stages - 1))
        return [0, *cuts[self._lease % len(cuts)], self.layers]


class RecordedDrafter:
    """Knows what the target says, and is right with chance `acceptance`; where it is not, a side row is.

    Off the recorded text it guesses anything.
    """

    source = "recorded"
    memory_bytes = 0

    def __init__(self, text: Sequence[int], acceptance: float, vocab_size: int, seed: int) -> None:
        self._text = list(text)
        self._acceptance = acceptance
        self._vocab_size = vocab_size
        self._rng = random.Random(seed)
        self._ids: list[int] = []

    def begin(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        self._ids = list(prompt_ids)

    def extend(self, ids: Sequence[int]) -> None:
        self._ids.extend(ids)

    def rewind(self, length: int) -> None:
        del self._ids[length:]

    def propose(self, count: int, width: int = 1) -> Proposal:
        right = self._text[len(self._ids) : len(self._ids) + count]
        chain = [
            token if self._rng.random() < self._acceptance else self._rng.randrange(self._vocab_size)
            for token in right
        ]
        ids, parents = list(chain), list(range(-1, len(chain) - 1))
        for depth, (guess, token) in enumerate(zip(chain, right, strict=True)):
            for other in [token] * (guess != token and width > 1):
                ids.append(other)
                parents.append(depth - 1)
        chances = [max(0.05, self._acceptance)] * len(chain) + [0.3] * (len(ids) - len(chain))
        return Proposal(tuple(ids), tuple(parents), tuple(chances), self.source)

    def end(self, *, learn: bool = True) -> None:
        """It learns nothing."""

    def close(self) -> None:
        """It holds nothing."""


def cases(new_tokens: int, max_context: int) -> Iterator[Case]:
    """Every pair of sampling and fault twice; drafters, limits, cuts and places take turns."""
    for number, (turn, sampling, faults) in enumerate(product(range(2), SAMPLINGS, FAULTS)):
        rng = random.Random(list(SAMPLINGS).index(sampling))
        setting = Setting(
            prompt=tuple(rng.randrange(3, 60) for _ in range(PROMPT_TOKENS)),
            new_tokens=min(new_tokens, max_context - PROMPT_TOKENS),
            topology=("ring", "site")[turn],
            stages=STAGES[(number + turn) % len(STAGES)],
            loop_delay_seconds=0.06,
            sampling=SAMPLINGS[sampling],
            limits=LIMITS[(number // 2 + turn) % len(LIMITS)],
            faults=replace(FAULTS[faults], seed=number),
        )
        yield Case(DRAFTERS[(number + number // 6 + turn) % len(DRAFTERS)], sampling, faults, setting)


def plain_ids(bundle: Bundle, setting: Setting) -> list[int]:
    """The reference: prompt and all that follows, one row at a time through the whole model."""
    model = bundle.manifest.model
    layers = LayerRange(0, bundle.manifest.num_layers - 1)
    stage = CpuStage.load(bundle, layers, threads=1, kv_budget_bytes=_KV_BYTES)
    sampler, session = Sampler(setting.sampling, model.vocab_size), SessionId(1)
    stage.open(session, setting.max_rows)
    ids = list(setting.prompt)
    sampler.observe(ids, generated=False)
    logits = stage.run(Batch((Span(session, 0, setting.prompt, 1),), None))
    while True:
        token, _ = sampler.sample(logits[0], len(ids))
        sampler.observe((token,), generated=True)
        ids.append(token)
        if len(ids) == setting.max_rows:
            stage.close()
            return ids
        logits = stage.run(Batch((Span(session, len(ids) - 1, (token,), 1),), None))


def compare(case: Case, bundle: Bundle, wanted: Sequence[int]) -> Compared:
    """Raises TimeoutError where the run stands still."""
    drafter = drafter_of(case, bundle, wanted)
    world = CpuWorld(case.setting, drafter, bundle)
    try:
        world.run()
    finally:
        drafter.close()
        for stage in world.stages.values():
            stage.close()
    return compared(world, wanted)


def drafter_of(case: Case, bundle: Bundle, wanted: Sequence[int]) -> Drafter:
    """The model drafter has the target's own weights and, later on, the end of its context only: often wrong then."""
    if case.drafter in ("suffix", "model", "auto"):
        return make_drafter(case.drafter, bundle=bundle, budget=DraftBudget(kv_bytes=_window_bytes(bundle)))
    acceptance = {"right": 1.0, "wrong": 0.0}.get(case.drafter, 0.75)
    return RecordedDrafter(wanted, acceptance, bundle.manifest.model.vocab_size, case.setting.faults.seed)


def _window_bytes(bundle: Bundle) -> int:
    model = bundle.manifest.model
    return WINDOW_TOKENS * model.kv_bytes_per_token_per_layer * bundle.manifest.num_layers


def figures(bundle: Bundle, new_tokens: int, say: Callable[[str], None]) -> dict[str, int]:
    done: list[Compared] = []
    texts: dict[str, list[int]] = {}
    for case in cases(new_tokens, bundle.manifest.model.max_context_tokens):
        wanted = texts.setdefault(case.sampling, []) or plain_ids(bundle, case.setting)
        texts[case.sampling] = wanted
        one = compare(case, bundle, wanted)
        done.append(one)
        say(
            f"{case.name}: {one.tokens} ids, {one.accepted} drafted, {one.leases} new leases, "
            f"{one.poisoned} rows poisoned, {one.differing} differ"
        )
    return totals(done, "layers") | {"layers_poisoned_rows": sum(one.poisoned for one in done)}
