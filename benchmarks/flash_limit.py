"""What a product on flash could reach: the schedule limit of each stretch of tokens, and where its own time went.

Per layer of a token: dense + max(compute of hits, missed bytes / flash) + compute of the last miss. Every term is
measured in the product's own process between its tokens: computing by tokens with all experts in memory
(`memory_beside`), flash by reads like the product's (`flash_beside`). Only which experts were missed is the product's.

Knows: the formula, what was measured. Does not know: stages, files, clocks.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from edge_runtime.experts.cost import LayerWork, schedule_limit_seconds

Table = dict[str, float]


@dataclass
class Stretch:
    """A few tokens one after the other. Seconds are of all of them together."""

    missed: list[list[int]] = field(default_factory=list)  # by token: experts read, by layer
    # The product's own.
    seconds: float = 0.0
    experts_seconds: float = 0.0
    waited_seconds: float = 0.0  # for flash, with nothing to do
    asking_seconds: float = 0.0  # system calls
    reading_seconds: float = 0.0  # of layers with misses: from the first read to the last byte
    after_seconds: float = 0.0  # from there to the result
    hashing_seconds: float = 0.0  # of all threads together, as the next
    computing_seconds: float = 0.0  # of layers with misses
    stolen_seconds: float = 0.0  # from all processors, by the host of a virtual machine
    # Beside it.
    memory_tokens: list[tuple[float, float]] = field(default_factory=list)  # each: seconds, of which experts
    flash_bytes_per_second: float = 0.0  # while hits are computed; 0: nothing was missed
    flash_alone_bytes_per_second: float = 0.0  # while nobody computes

    @property
    def tokens(self) -> int:
        return len(self.missed)

    @property
    def memory_seconds(self) -> float:
        """A token."""
        return statistics.fmean(token for token, _ in self.memory_tokens)

    @property
    def memory_experts_seconds(self) -> float:
        """A token."""
        return statistics.fmean(experts for _, experts in self.memory_tokens)


@dataclass(frozen=True)
class Limit:
    """Seconds of a stretch at best, by what they are for: `flash` is what compute of hits does not hide."""

    dense: float
    hits: float
    flash: float
    last: float

    @property
    def seconds(self) -> float:
        return self.dense + self.hits + self.flash + self.last


def stretch_limit(stretch: Stretch, top_k: int, expert_bytes: int, usual_bytes_per_second: float) -> Limit:
    """`usual_bytes_per_second`: of flash, where the stretch has no figure of its own."""
    layers = len(stretch.missed[0])
    expert_seconds = stretch.memory_experts_seconds / (layers * top_k)
    dense_seconds = (stretch.memory_seconds - stretch.memory_experts_seconds) / layers
    work = [
        LayerWork(
            dense_seconds,
            (top_k - misses) * expert_seconds,
            expert_seconds if misses else 0.0,
            misses * expert_bytes,
        )
        for token in stretch.missed
        for misses in token
    ]
    whole = schedule_limit_seconds(work, stretch.flash_bytes_per_second or usual_bytes_per_second)
    dense = sum(layer.dense_seconds for layer in work)
    hits = sum(layer.hit_seconds for layer in work)
    last = sum(layer.last_miss_seconds for layer in work)
    return Limit(dense, hits, whole - dense - hits - last, last)


def limits(stretches: Sequence[Stretch], top_k: int, expert_bytes: int) -> list[Limit]:
    usual = statistics.median(
        [own.flash_bytes_per_second for own in stretches if own.flash_bytes_per_second] or [1.0]
    )
    return [stretch_limit(own, top_k, expert_bytes, usual) for own in stretches]


def limit_fraction(stretches: Sequence[Stretch], top_k: int, expert_bytes: int) -> float:
    """Share of the limit's speed that the product reaches."""
    best = sum(limit.seconds for limit in limits(stretches, top_k, expert_bytes))
    return best / sum(own.seconds for own in stretches)


def table(stretches: Sequence[Stretch], top_k: int, expert_bytes: int) -> list[Table]:
    """Milliseconds a token of each stretch, the product's and at best; flash in GB/s."""
    found = []
    for own, limit in zip(stretches, limits(stretches, top_k, expert_bytes), strict=True):
        ms = 1e3 / own.tokens
        found.append(
            {
                "fraction": limit.seconds / own.seconds,
                "token": ms * own.seconds,
                "dense": ms * (own.seconds - own.experts_seconds),
                "experts": ms * own.experts_seconds,
                "waited": ms * own.waited_seconds,
                "asking": ms * own.asking_seconds,
                "reading": ms * own.reading_seconds,
                "after": ms * own.after_seconds,
                "hashing": ms * own.hashing_seconds,
                "computing": ms * own.computing_seconds,
                "stolen": ms * own.stolen_seconds,
                "missed": sum(map(sum, own.missed)) / own.tokens,
                "limit": ms * limit.seconds,
                "limit_dense": ms * limit.dense,
                "limit_hits": ms * limit.hits,
                "limit_flash": ms * limit.flash,
                "limit_last": ms * limit.last,
                "memory": 1e3 * own.memory_seconds,
                "flash_gbps": own.flash_bytes_per_second / 1e9,
                "flash_alone_gbps": own.flash_alone_bytes_per_second / 1e9,
            }
        )
    return found


def medians(rows: Iterable[Table]) -> Table:
    rows = list(rows)
    return {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}
