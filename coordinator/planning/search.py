"""Finds the fastest pipeline: dynamic programming over contiguous layer ranges and ordered subsets of devices.

State: (first device, set of devices used, last device) -> for every k, the least seconds in which they cover layers
0..k-1. Stage 1 is fixed per state because the ring closes on it. With at most MAX_EXACT devices all orders are
searched; beyond, subsets of a few plausible orders.

Knows: costs. Does not know: reasons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coordinator.planning.costs import Costs, Placement
from edge_runtime.core import LayerRange

MAX_EXACT = 8
MAX_CANDIDATES = 32  # of more devices, the fastest and the largest are looked at

Vector = NDArray[np.float64]


@dataclass(slots=True)
class Found:
    """The best of what was searched, alone, together, and with each device."""

    single: tuple[Placement, ...] | None = None  # the fastest device that holds everything
    pipeline: tuple[Placement, ...] | None = None  # the fastest of two or more
    seconds_with: dict[int, float] = field(default_factory=dict)  # device -> best pipeline that uses it


def search(costs: Costs) -> Found:
    """Look at every way (or the plausible ones) of splitting the model over these devices."""
    found = Found(single=_best_single(costs))
    count = len(costs.devices)
    if count < 2 or costs.model.num_layers < 2:
        return found
    if count <= MAX_EXACT:
        candidates = [_Table(costs, list(range(count)), any_order=True)]
    else:
        candidates = [_Table(costs, order, any_order=False) for order in _orders(costs)]
    best = float("inf")
    for table in candidates:
        for seconds, end in table.pipelines():
            placements = table.trace(end)
            for placement in placements:
                known = found.seconds_with.get(placement.device, float("inf"))
                found.seconds_with[placement.device] = min(seconds, known)
            if seconds < best * (1 - 1e-12):
                best, found.pipeline = seconds, placements
    return found


def best_of_every_set(costs: Costs) -> dict[int, tuple[float, tuple[Placement, ...]]]:
    """Bit set of devices -> (seconds per token, placements) of the fastest pipeline over exactly these devices.

    For at most MAX_EXACT devices.
    """
    everyone = range(len(costs.devices))
    found: dict[int, tuple[float, tuple[Placement, ...]]] = {
        1 << device: (costs.compute_seconds(device, costs.all_layers), (Placement(device, costs.all_layers),))
        for device in everyone
        if costs.fits(device, costs.all_layers)
    }
    if len(costs.devices) < 2 or costs.model.num_layers < 2:
        return found
    table = _Table(costs, list(everyone), any_order=True)
    ends: dict[int, tuple[float, _End]] = {}
    for seconds, end in table.pipelines():
        used = end.used | 1 << end.tail
        if used not in ends or seconds < ends[used][0]:
            ends[used] = (seconds, end)
    return found | {used: (seconds, table.trace(end)) for used, (seconds, end) in ends.items()}


def _best_single(costs: Costs) -> tuple[Placement, ...] | None:
    everything = costs.all_layers
    holders = [d for d in range(len(costs.devices)) if costs.fits(d, everything)]
    if not holders:
        return None
    return (Placement(min(holders, key=lambda d: costs.compute_seconds(d, everything)), everything),)


def _orders(costs: Costs) -> Iterator[list[int]]:
    """By speed, by size, and a walk from each fast device to its nearest neighbour."""
    everyone = range(len(costs.devices))
    by_speed = sorted(everyone, key=lambda d: costs.devices[d].layer_decode_seconds)
    by_size = sorted(everyone, key=lambda d: -costs.devices[d].memory_free_bytes)
    fastest = by_speed[: MAX_CANDIDATES // 2]
    pool = fastest + [d for d in by_size if d not in fastest][: MAX_CANDIDATES - len(fastest)]
    for chosen in (pool, by_size[:MAX_CANDIDATES]):
        yield [d for d in by_speed if d in chosen]
        yield [d for d in by_size if d in chosen]
        yield _walk(costs, [d for d in by_speed if d in chosen])


def _walk(costs: Costs, devices: Sequence[int]) -> list[int]:
    order, left = [devices[0]], list(devices[1:])
    while left:
        nearest = min(left, key=lambda d: costs.row_hop_seconds(order[-1], d))
        left.remove(nearest)
        order.append(nearest)
    return order


@dataclass(slots=True)
class _State:
    seconds: Vector  # [L + 1]
    from_device: NDArray[np.int64]  # [L + 1]; -1: stage 1
    from_layer: NDArray[np.int64]  # [L + 1]


@dataclass(frozen=True, slots=True)
class _End:
    """A finished pipeline: the state it came to, and the tail on top of it."""

    first: int
    used: int
    last: int
    tail: int
    tail_from: int


class _Table:
    """All pipelines of two or more stages over `order` (in any order of it, or only in this one)."""

    def __init__(self, costs: Costs, order: Sequence[int], *, any_order: bool) -> None:
        self._costs = costs
        self._order = list(order)
        self._position = {device: item for item, device in enumerate(order)}
        self._any_order = any_order
        self._layers = costs.model.num_layers
        self._seconds = _stage_seconds(costs, order)
        # (first, used, last); `used` is a bit set of positions in any-order tables, 0 in the others
        self._states: dict[tuple[int, int, int], _State] = {}
        for first in self._order:
            self._fill(first)

    def _fill(self, first: int) -> None:
        seconds = self._seconds[first][0].copy()
        seconds[self._layers] = np.inf  # that would be a pipeline of one
        if not np.isfinite(seconds).any():
            return
        nowhere = np.full(self._layers + 1, -1, dtype=np.int64)
        start = _State(seconds, nowhere, nowhere)
        if self._any_order:
            self._fill_any_order(first, start)
        else:
            self._fill_in_order(first, start)

    def _fill_any_order(self, first: int, start: _State) -> None:
        """One more stage at a time, over sets of devices."""
        level = {1 << self._position[first]: {first: start}}
        while level:
            following: dict[int, dict[int, _State]] = {}
            for used, states in level.items():
                for last, state in states.items():
                    self._states[first, used, last] = state
                for device in self._order:
                    bit = 1 << self._position[device]
                    if used & bit:
                        continue
                    state = self._extended(states, device)
                    if np.isfinite(state.seconds).any():
                        following.setdefault(used | bit, {})[device] = state
            level = following

    def _fill_in_order(self, first: int, start: _State) -> None:
        """One device after the other: each may follow any of those before it."""
        reached = {first: start}
        self._states[first, 0, first] = start
        for device in self._order[self._position[first] + 1 :]:
            state = self._extended(reached, device)
            if np.isfinite(state.seconds).any():
                reached[device] = state
                self._states[first, 0, device] = state

    def _extended(self, states: dict[int, _State], device: int) -> _State:
        """The best way to cover layers 0..k'-1 with `device` running the last of them, the tail left to others."""
        lasts = np.array(list(states))  # [S]
        hops = np.array([self._costs.row_hop_seconds(int(last), device) for last in lasts])
        arriving = np.stack([state.seconds for state in states.values()]) + hops[:, None]  # [S, L + 1]
        totals = arriving.min(axis=0)[:, None] + self._seconds[device]  # [k, k']
        from_layer = totals.argmin(axis=0)  # [L + 1]
        from_device = lasts[arriving.argmin(axis=0)[from_layer]]
        seconds = totals.min(axis=0)
        seconds[self._layers] = np.inf
        return _State(seconds, from_device, from_layer)

    def pipelines(self) -> Iterator[tuple[float, _End]]:
        """(seconds per token, end) of the best pipeline of every state and tail."""
        for (first, used, last), state in self._states.items():
            for tail in self._order:
                if not self._may_follow(used, last, tail):
                    continue
                hops = self._costs.row_hop_seconds(last, tail) + self._costs.id_hop_seconds(tail, first)
                totals = state.seconds + self._seconds[tail][:, self._layers]
                tail_from = int(totals.argmin())
                seconds = float(totals[tail_from]) + hops
                if np.isfinite(seconds):
                    yield seconds, _End(first, used, last, tail, tail_from)

    def _may_follow(self, used: int, last: int, device: int) -> bool:
        if self._any_order:
            return not used & (1 << self._position[device])
        return self._position[device] > self._position[last]

    def trace(self, end: _End) -> tuple[Placement, ...]:
        """From the tail back to stage 1."""
        backwards = [Placement(end.tail, LayerRange(end.tail_from, self._layers - 1))]
        used, device, until = end.used, end.last, end.tail_from
        while True:
            state = self._states[end.first, used, device]
            since, before = int(state.from_layer[until]), int(state.from_device[until])
            backwards.append(Placement(device, LayerRange(max(since, 0), until - 1)))
            if before < 0:
                return tuple(reversed(backwards))
            if self._any_order:
                used &= ~(1 << self._position[device])
            device, until = before, since


def _add_flash(costs: Costs, device: int, table: Vector) -> None:
    """Ranges whose experts are read from flash: some that did not fit do, and all of them take longer."""
    count = costs.model.num_layers
    for first in range(count):
        for after in range(first + 1, count + 1):
            layers = LayerRange(first, after - 1)
            if costs.expert_cache_bytes(device, layers) is not None:
                fits = costs.fits(device, layers)
                table[first, after] = costs.compute_seconds(device, layers) if fits else np.inf


def _stage_seconds(costs: Costs, devices: Sequence[int]) -> dict[int, Vector]:
    """Per device: [k, k'] seconds of layers k..k'-1; infinite where they don't fit."""
    model = costs.model
    count = model.num_layers
    layer_bytes = np.concatenate([[0], np.cumsum(model.layer_weight_bytes, dtype=np.int64)])
    work = np.array([0.0] + [costs.relative_weight(LayerRange(0, last)) for last in range(count)])
    lengths = np.arange(count + 1)[None, :] - np.arange(count + 1)[:, None]  # [k, k']
    needed = layer_bytes[None, :] - layer_bytes[:, None]
    needed = needed + lengths * (model.kv_tokens_wanted * model.kv_bytes_per_token_per_layer)
    needed[0, :] += model.embedding_bytes
    needed[:, count] += model.head_bytes
    if model.tied:
        needed[1:, count] += model.embedding_bytes
    relative = work[None, :] - work[:, None]
    seconds = {}
    for device in devices:
        profile = costs.devices[device]
        table = relative * profile.layer_decode_seconds
        table[:, count] += profile.head_seconds
        table[(lengths <= 0) | (needed > profile.memory_free_bytes)] = np.inf
        if profile.flash_bytes_per_second and sum(model.layer_expert_bytes):
            _add_flash(costs, device, table)
        seconds[device] = table
    return seconds
