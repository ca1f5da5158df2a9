"""What a cache would have done on a recorded trace, by policy and size, beside the best that was possible.

Knows: traces, slots, policies. Does not know: bytes and time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_runtime.errors import UsageError
from edge_runtime.experts.affinity import Affinity
from edge_runtime.experts.policies import POLICIES, Belady, Policy
from edge_runtime.experts.predictor import wanted
from edge_runtime.experts.retention import Retention
from edge_runtime.experts.slot_table import ABSENT, SlotTable
from edge_runtime.experts.trace import Access, RoutingTrace

BELADY = "belady"
_NO_ROWS = np.zeros((1, 0), np.float32)


@dataclass(frozen=True, slots=True)
class Replayed:
    """Decoding only; the prompt warms the cache. First touches count as misses."""

    hits: int
    misses: int
    missed_by_access: tuple[int, ...]  # experts read, for each layer of each decoded step

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


def replay(trace: RoutingTrace, slots: int, policy: str, *, keeps: bool = False) -> Replayed:
    """`keeps`: with the experts that affinity expects in the next layer kept until then, as it is learnt on the way.

    Raises UsageError where one layer of one batch does not fit into the slots."""
    kept = _Kept(trace) if keeps else None
    table = SlotTable(slots, trace.keys, _policy(trace, slots, policy))
    hits = misses = 0
    missed: list[int] = []
    for access in trace.accesses:
        keys = [trace.key(access.layer, expert) for expert in access.experts]
        uses = list(zip(keys, access.rows, strict=True))
        if kept is not None:
            kept.before(access, table)
        absent = [(key, rows) for key, rows in uses if table.use(key, access.step, rows) == ABSENT]
        for key, rows in absent:
            if table.admit(key, access.step, rows) == ABSENT:
                raise UsageError(f"{slots} slots do not hold the {len(keys)} experts of one layer's batch")
        for key in keys:
            table.unpin(key)
        if access.decode:
            hits += len(keys) - len(absent)
            misses += len(absent)
            missed.append(len(absent))
    return Replayed(hits, misses, tuple(missed))


class _Kept:
    """Decoding only, like the live cache's retention."""

    def __init__(self, trace: RoutingTrace) -> None:
        self._trace = trace
        self._affinity = Affinity(trace.layers, trace.experts)
        self._retention = Retention()
        self._step: list[tuple[int, ...]] = []

    def before(self, access: Access, table: SlotTable) -> None:
        """Before the layer's experts are looked up."""
        self._retention.let_go()
        if not access.decode:
            return
        self._learn(access)
        if self._affinity.reaches(access.layer):
            ids = np.array([access.experts], np.int32)
            scores = self._affinity.scores(access.layer, _NO_ROWS, ids)
            keys = [self._trace.key(access.layer + 1, e) for e in wanted(scores, self._trace.top_k)]
            self._retention.keep(table, keys, ids.size)

    def _learn(self, access: Access) -> None:
        self._step = [*self._step, access.experts] if access.layer else [access.experts]
        if len(self._step) == self._trace.layers:
            self._affinity.learn(np.array(self._step, np.int32)[:, None])


def _policy(trace: RoutingTrace, slots: int, name: str) -> Policy:
    if name == BELADY:
        return Belady(slots, _uses(trace))
    if name not in POLICIES:
        raise UsageError(f"{name!r} is not a policy", hint=f"choose one of {', '.join((*POLICIES, BELADY))}")
    return POLICIES[name](slots, trace.keys)


def _uses(trace: RoutingTrace) -> list[int]:
    """In the order a replay makes them: what is here first, then what is admitted; within one access it does not
    matter to Belady, who only compares times across accesses."""
    return [trace.key(access.layer, expert) for access in trace.accesses for expert in access.experts]
