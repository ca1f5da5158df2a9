"""Which of a layer's missing experts are read from flash here, and which a peer that has them in memory computes.

Both happen at the same time, so what counts is which ends last. A read costs the same however many rows want the
expert, a peer is paid by the row: experts that few rows want are given away first. A third way, to have the bytes sent,
is left out: an expert is hundreds of times the bytes of a row and its answer.

Knows: seconds in, a division out (pure). Does not know: where the seconds come from, caches, links.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds that `count` at once take: nothing where there are none, else `fixed_seconds + count * each_seconds`."""

    fixed_seconds: float
    each_seconds: float

    def seconds(self, count: int) -> float:
        return self.fixed_seconds + count * self.each_seconds if count else 0.0


NOTHING = Line(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Miss:
    """An expert that is not in memory here. `uses`: rows that want it; `holders`: peers that may be asked for it."""

    expert: int
    uses: int
    holders: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class HereCost:
    """Of this device: `reading` by experts read, `computing` by uses, of which `hit_uses` are to be done in any case.
    What a read hides behind computing is not in `reading`."""

    reading: Line
    computing: Line = NOTHING
    hit_uses: int = 0

    def seconds(self, reads: int, read_uses: int) -> float:
        return self.computing.seconds(self.hit_uses + read_uses) + self.reading.seconds(reads)


@dataclass(frozen=True, slots=True)
class PeerCost:
    """By uses: the way there and back and computing. `most_uses`: that one request may ask for."""

    line: Line
    most_uses: int


@dataclass(frozen=True, slots=True)
class Division:
    """`read`: experts; `asked[p]`: those of peer p. `seconds`: until the last of all is here."""

    read: tuple[int, ...]
    asked: tuple[tuple[int, ...], ...]
    seconds: float


@dataclass(slots=True)
class _Asked:
    """What peers were given so far."""

    peers: Sequence[PeerCost]
    uses: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.uses = [0] * len(self.peers)

    def give(self, miss: Miss) -> int | None:
        """To the holder that then ends first, and to whom; None: no holder has room."""
        able = [peer for peer in miss.holders if self.uses[peer] + miss.uses <= self.peers[peer].most_uses]
        if not able:
            return None
        peer = min(able, key=lambda each: (self._end(each, miss.uses), each))
        self.uses[peer] += miss.uses
        return peer

    @property
    def seconds(self) -> float:
        return max((self._end(peer, 0) for peer in range(len(self.peers))), default=0.0)

    def _end(self, peer: int, more_uses: int) -> float:
        return self.peers[peer].line.seconds(self.uses[peer] + more_uses)


def divide(
    misses: Sequence[Miss], here: HereCost, peers: Sequence[PeerCost], least_reads: int = 0
) -> Division:
    """The best of: the k most wanted experts are read and the others asked for, for every k from `least_reads` on.

    So it is never slower than reading all of them, or than asking for all of them where that is possible; with one peer
    and experts wanted alike it is the optimum. Where nothing is gained by asking, nobody is asked.
    """
    order = sorted(misses, key=lambda miss: (bool(miss.holders), -miss.uses, miss.expert))
    read_uses = sum(miss.uses for miss in order)
    asked, given = _Asked(peers), [-1] * len(order)
    best_reads, best_seconds = len(order), here.seconds(len(order), read_uses)
    for reads in range(len(order) - 1, least_reads - 1, -1):
        peer = asked.give(order[reads])
        if peer is None:
            break
        given[reads] = peer
        read_uses -= order[reads].uses
        seconds = max(here.seconds(reads, read_uses), asked.seconds)
        if seconds < best_seconds:
            best_reads, best_seconds = reads, seconds
    away = [(miss.expert, peer) for miss, peer in zip(order, given, strict=True)][best_reads:]
    return Division(
        tuple(miss.expert for miss in order[:best_reads]),
        tuple(tuple(expert for expert, to in away if to == peer) for peer in range(len(peers))),
        best_seconds,
    )
