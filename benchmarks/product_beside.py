"""What is measured between a product's tokens, and what of the time is the product's.

Before every token one is computed with all experts in memory, so that others' work on the machine, which comes and
goes within a second, meets both alike; the first of a stretch is computed twice, since helper threads are asleep then,
as they never are in the arm in memory. Then one more is computed like that, which reads meanwhile as the product's last
token did. None of this is the product's time, and none of it changes what is in its cache.

Knows: a stage with an expert cache. Does not know: arms, the limit's formula.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from edge_kernels.flash import FlashTimes
from numpy.typing import NDArray

from benchmarks.flash_beside import STRETCH_TOKENS, FlashBeside
from benchmarks.flash_limit import Stretch
from benchmarks.memory_beside import MemoryBeside
from edge_runtime.experts.cache import ExpertCache

Float32 = NDArray[np.float32]

_STAT = Path("/proc/stat")
_STOLEN = 8  # place of the host's share in its first line, in hundredths of a second


class Beside(Protocol):
    """Who runs a layer's experts instead of the product."""

    def run(self, layer: int, x: Float32, gates: Float32) -> Float32: ...


class Routed(Protocol):
    """Experts of a layer in a benchmark: `in_memory` runs them, where it is set."""

    in_memory: Beside | None
    beside_seconds: float  # of it


@dataclass(frozen=True)
class _Seen:
    """Running totals, in seconds."""

    experts: float
    waited: float
    stolen: float
    times: FlashTimes


class ProductBeside:
    """`prompt` once, then `before` and `after` each token. `aside_seconds`: what it took, not the product's."""

    def __init__(
        self,
        cache: ExpertCache,
        routed: Sequence[Routed],
        memory: MemoryBeside,
        flash: FlashBeside,
        experts_seconds: Callable[[], float],
    ) -> None:
        self.stretches: list[Stretch] = []
        self.aside_seconds = 0.0
        self._cache, self._routed, self._memory, self._flash = cache, routed, memory, flash
        self._experts_seconds = experts_seconds
        self._seen = self._look()
        self._begin = 0.0

    def prompt(self) -> None:
        self._flash.prompt()

    def before(self, token: int, run: Callable[[], object]) -> None:
        """`run`: a token at the position of `token`, whose rows are written anew afterwards."""
        begin = time.perf_counter()
        if token % STRETCH_TOKENS == 0:
            self._memory.choose()
            self._run_beside(self._memory, run)
        found = self._run_beside(self._memory, run)
        if token > 0:
            self._flash.begin(token - 1)
            self._run_beside(self._flash, run)
        if token % STRETCH_TOKENS == 0:
            self._end_stretch()
            self.stretches.append(Stretch())
        self.stretches[-1].memory_tokens.append(found)
        self._memory.choose()
        self._seen = self._look()
        self._begin = time.perf_counter()  # looking takes half a millisecond
        self.aside_seconds += self._begin - begin

    def after(self, token: int, missed: list[int]) -> None:
        end = time.perf_counter()
        self.stretches[-1].seconds += end - self._begin
        self._note(missed)
        self.aside_seconds += time.perf_counter() - end

    def close(self) -> None:
        self._end_stretch()
        self._flash.close()

    def _end_stretch(self) -> None:
        if not self.stretches:
            return
        busy, alone = self._flash.end_stretch()
        self.stretches[-1].flash_bytes_per_second = busy
        self.stretches[-1].flash_alone_bytes_per_second = alone

    def _run_beside(self, beside: Beside, run: Callable[[], object]) -> tuple[float, float]:
        """Seconds of a token, and of its experts."""
        for routed in self._routed:
            routed.in_memory = beside
        before, begin = self._beside_seconds(), time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
        for routed in self._routed:
            routed.in_memory = None
        return seconds, self._beside_seconds() - before

    def _beside_seconds(self) -> float:
        return sum(routed.beside_seconds for routed in self._routed)

    def _note(self, missed: list[int]) -> None:
        old, new, own = self._seen, self._look(), self.stretches[-1]
        own.missed.append(missed)
        own.experts_seconds += new.experts - old.experts
        own.waited_seconds += new.waited - old.waited
        own.stolen_seconds += new.stolen - old.stolen
        own.asking_seconds += new.times.asking - old.times.asking
        own.reading_seconds += new.times.reading - old.times.reading
        own.after_seconds += new.times.after - old.times.after
        own.hashing_seconds += new.times.hashing - old.times.hashing
        own.computing_seconds += new.times.computing - old.times.computing

    def _look(self) -> _Seen:
        times, waited = self._cache.kernel_times, self._cache.statistics.total.waited_seconds
        return _Seen(self._experts_seconds(), waited, _stolen_seconds(), times)


def _stolen_seconds() -> float:
    """Of all processors; 0 where the system does not say."""
    if not _STAT.exists():
        return 0.0
    return int(_STAT.read_text().split("\n", 1)[0].split()[_STOLEN]) / 100
