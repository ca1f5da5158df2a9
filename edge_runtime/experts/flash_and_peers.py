"""Experts behind a cache on this device's flash, where peers have some of them in memory: a miss goes where it is
there first.

    router ─┬─ in memory ── computed here ──────────────┐
            ├─ missing, read ── cache, flash ───────────┼─ outputs by (row, gate rank) ── combine ── row
            └─ missing, asked ── rows ► peer ► outputs ─┘

Who is asked for what is decided for every layer of every batch (`miss_split`), by what reads and answers took lately.
Nothing depends on a peer: what is late or can't be had is read from flash, and an answer that comes later is dropped.
The first answers of a peer count for nothing: this device computes the same, and every bit must agree, else the peer is
never asked again. So a row has the bits that it has on one device, whatever was where.

What a peer computes does not come into the cache, so an expert is read all the same when peers have spent `RENT` times
a read on it since it was last here (rent or buy), and where the cache has room, one miss of a layer at least.

Knows: the order among looking up, asking, reading and waiting. Does not know: links, plans, the cache's inside. One
compute thread uses it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from edge_kernels.experts import combine
from numpy.typing import NDArray

from edge_runtime.experts.cache import CacheOptions, ExpertCache
from edge_runtime.experts.helper_request import Helper, HelperPort, HelperRequest
from edge_runtime.experts.measured_line import MeasuredLine
from edge_runtime.experts.miss_split import Division, HereCost, Miss, PeerCost, divide
from edge_runtime.experts.peer_runner import PIECE_BYTES
from edge_runtime.experts.peer_shares import LayerHolders
from edge_runtime.experts.peer_standing import PeerStanding, Trials

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

RENT = 3.0  # reads: what asking for one expert may cost before it is read; by replay of a recorded trace
SAMPLED = 8  # one of so many layers that read nothing is measured, and the first ones
TRIED_TOGETHER = 3  # experts more than one, in every second trial


@dataclass(frozen=True, slots=True)
class HelpedOptions:
    """`holders`: of every layer, peers of this device's numeric class."""

    cache: CacheOptions
    holders: Mapping[int, LayerHolders]
    port: HelperPort


@dataclass(slots=True)
class HelpedStatistics:
    """Uses: a row through an expert that was not in memory here."""

    asked_uses: int = 0  # and answered in time
    late_uses: int = 0  # and read after all
    shared_layers: int = 0  # of batches, in which somebody was asked


@dataclass(frozen=True, slots=True)
class _Intent:
    """For one layer of a batch. `is_trial`: a peer is asked to see how it is now, by itself."""

    absent: frozenset[int] = frozenset()
    asked: tuple[tuple[int, ...], ...] = ()  # by peer: experts
    is_trial: bool = False


_NOTHING_ABSENT = _Intent()


@dataclass(frozen=True, slots=True)
class _Layer:
    """x [R, hidden], ids and gates [R, top_k]."""

    number: int
    x: Float32
    ids: Int32
    gates: Float32
    activation: str
    threads: int


class FlashAndPeers:
    def __init__(
        self, cache: ExpertCache, options: HelpedOptions, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.cache = cache
        self.statistics = HelpedStatistics()
        self._holders, self._clock = options.holders, clock
        devices = next(iter(options.holders.values())).devices if options.holders else ()
        self._helpers = [Helper(device, PeerStanding(), options.port, clock) for device in devices]
        self._computing, self._reading = MeasuredLine(), MeasuredLine()  # by uses; by experts read
        self._reads = Trials()
        self._without_reads = 0  # layers of batches
        self._rent_seconds: dict[tuple[int, int], float] = {}  # by (layer, expert), since it was last read
        self._is_open = False

    @property
    def peers(self) -> Mapping[str, PeerStanding]:
        return {helper.device_id: helper.standing for helper in self._helpers}

    @property
    def says(self) -> str:
        """What others did since the stage was loaded; "" where nobody was asked."""
        counted = self.statistics
        if not counted.shared_layers:
            return ""
        barred = sum(peer.is_barred for peer in self.peers.values())
        text = f"{counted.asked_uses} uses computed by other devices, {counted.late_uses} too late"
        return f"{text}; {barred} of them compute other bits and are not asked" if barred else text

    @property
    def arena_bytes(self) -> int:
        return self.cache.arena_bytes

    @property
    def total_bytes(self) -> int:
        return self.cache.total_bytes

    def layer_of(self, tensor: str) -> int:
        return self.cache.layer_of(tensor)

    def open(self) -> None:
        """There are links: from now on peers may be asked. Until then all is read."""
        # What a device computes whose experts are used early depends on when reads end: nobody computes the same.
        self._is_open = not self.cache.is_lossy

    def close(self) -> None:
        self._is_open = False
        self.cache.close()

    # ------------------------------------------------------------ a layer of a batch

    def run(
        self, layer: int, x: Float32, ids: Int32, gates: Float32, *, activation: str, threads: int
    ) -> Float32:
        """What `run_experts` gives, bit for bit. Raises as `ExpertCache.run`."""
        if not self._is_open:
            return self.cache.run(layer, x, ids, gates, activation=activation, threads=threads)
        begin = self._clock()
        experts = ids.reshape(-1).tolist()
        absent = self.cache.absent(layer, experts)
        work = _Layer(layer, x, ids, gates, activation, threads)
        intent = self._intent(layer, experts, absent) if absent else _NOTHING_ABSENT
        requests = self._ask(work, intent) if intent.asked else ()
        if requests:
            self.statistics.shared_layers += 1
            result = self._shared(work, intent, requests)
        else:
            result = self._computed(work, x, ids, gates, len(intent.absent))
        self._passed(layer, intent, self._clock() - begin)
        return result

    def _intent(self, layer: int, experts: Sequence[int], absent: Sequence[int]) -> _Intent:
        """`experts`: of every use."""
        able = [number for number, helper in enumerate(self._helpers) if helper.standing.may_be_asked]
        if not (self._is_any_faster(able, len(absent), len(experts)) or self._is_any_due()):
            return _Intent(frozenset(absent))
        holds, wanted = self._holders[layer].holds, Counter(experts)
        trial = self._trial(holds, absent, wanted)
        if trial is not None:
            return _Intent(frozenset(absent), trial, is_trial=True)
        most_rent = RENT * self._reading.line.seconds(1)
        misses = [
            Miss(expert, wanted[expert], tuple(n for n in able if holds[n, expert]))
            if self._rent_seconds.get((layer, expert), 0.0) <= most_rent
            else Miss(expert, wanted[expert])
            for expert in absent
        ]
        return _Intent(frozenset(absent), self._divided(layer, misses, len(experts)).asked)

    def _is_any_faster(self, able: Sequence[int], reads: int, uses: int) -> bool:
        """With a single expert than this device with all of them: else there is nothing to decide."""
        here_seconds = self._reading.line.seconds(reads) + self._computing.line.seconds(uses)
        return any(self._helpers[number].standing.measured.line.seconds(1) < here_seconds for number in able)

    def _is_any_due(self) -> bool:
        return any(helper.standing.is_due for helper in self._helpers)

    def _divided(self, layer: int, misses: Sequence[Miss], uses: int) -> Division:
        hit_uses = uses - sum(miss.uses for miss in misses)
        here = HereCost(self._reading.line, self._computing.line, hit_uses)
        most_uses = PIECE_BYTES // (4 * self.cache.layers[layer].hidden)
        peers = [PeerCost(helper.standing.measured.line, most_uses) for helper in self._helpers]
        must_read = not self._reading.observations or self.cache.has_room(layer)
        must_read = must_read or self._reads.is_due(self._reading.line.seconds(1))
        return divide(misses, here, peers, least_reads=int(must_read))

    def _trial(
        self, holds: NDArray[np.bool_], absent: Sequence[int], wanted: Mapping[int, int]
    ) -> tuple[tuple[int, ...], ...] | None:
        """Of a peer that was not asked for long: one expert that few rows want, and in turn several, for the line."""
        for number, helper in enumerate(self._helpers):
            peer = helper.standing
            held = [expert for expert in absent if holds[number, expert]] if peer.is_due else []
            if held:
                held.sort(key=lambda expert: (wanted[expert], expert))
                chosen = tuple(held[: 1 + peer.measured.observations % 2 * TRIED_TOGETHER])
                return tuple(chosen if n == number else () for n in range(len(self._helpers)))
        return None

    def _ask(self, work: _Layer, intent: _Intent) -> list[HelperRequest]:
        """Those that were sent."""
        sent = []
        for helper, experts in zip(self._helpers, intent.asked, strict=False):
            if experts:
                places = np.flatnonzero(np.isin(work.ids.reshape(-1), experts))
                request = HelperRequest(helper, places)
                if request.ask(work.number, work.x, work.ids):
                    sent.append(request)
        return sent

    def _shared(self, work: _Layer, intent: _Intent, requests: Sequence[HelperRequest]) -> Float32:
        outputs = np.empty((work.ids.size, work.x.shape[1]), np.float32)
        left = np.ones(work.ids.size, bool)  # places that this device computes
        for request in requests:
            left[request.places] = False
        try:
            if not intent.is_trial:  # else its time is to be that of the peer alone
                self._apart(work, np.flatnonzero(left), intent, outputs)
                left[:] = False
            for request in requests:
                left[request.places] = not self._collect(request, outputs)
            told = outputs.copy() if requests[0].is_only_checked else outputs
            self._apart(work, np.flatnonzero(left), intent, outputs)
            for request in requests:
                request.check(told, outputs)
        except BaseException:
            for request in requests:
                request.give_up()
            raise
        return combine(outputs, work.gates)

    def _collect(self, request: HelperRequest, outputs: Float32) -> bool:
        """Whether these outputs are good as they are."""
        found = request.collect(outputs.shape[1])
        if found is None:
            self.statistics.late_uses += len(request.places)
            return False
        outputs[request.places] = found
        self.statistics.asked_uses += 0 if request.is_only_checked else len(request.places)
        return not request.is_only_checked

    def _apart(self, work: _Layer, places: NDArray[np.intp], intent: _Intent, outputs: Float32) -> None:
        """Each use as a row with one expert and the gate 1: its output as it is."""
        if places.size:
            ids = work.ids.reshape(-1)[places]
            rows, ones = work.x[places // work.ids.shape[1]], np.ones((places.size, 1), np.float32)
            reads = len(intent.absent.intersection(ids.tolist()))
            outputs[places] = self._computed(work, rows, ids[:, None], ones, reads)

    def _computed(self, work: _Layer, x: Float32, ids: Int32, gates: Float32, reads: int) -> Float32:
        """Here, and what it took."""
        begin = self._clock()
        result = self.cache.run(work.number, x, ids, gates, activation=work.activation, threads=work.threads)
        seconds = self._clock() - begin
        if reads:
            self._reading.observe(reads, max(0.0, seconds - self._computing.line.seconds(ids.size)))
            self._reads.used()
        elif self._is_sampled():
            self._computing.observe(ids.size, seconds)
        return result

    def _is_sampled(self) -> bool:
        """Most layers miss nothing, and to look at each costs as much as a part of one."""
        self._without_reads += 1
        return self._without_reads < SAMPLED or self._without_reads % SAMPLED == 0

    def _passed(self, layer: int, intent: _Intent, seconds: float) -> None:
        self._reads.passed(seconds)
        asked = intent.asked or ((),) * len(self._helpers)
        for helper, experts in zip(self._helpers, asked, strict=True):
            each_seconds = helper.standing.measured.line.seconds(1)
            for expert in experts:
                spent_seconds = self._rent_seconds.get((layer, expert), 0.0)
                self._rent_seconds[layer, expert] = spent_seconds + each_seconds
            if not experts:
                helper.standing.passed(seconds)
        for expert in intent.absent.difference(*asked):
            self._rent_seconds.pop((layer, expert), None)
