"""What is measured between a product's tokens, and what of the time is the product's.

Before every fourth token two are computed with all experts in memory, of which the second counts: the first one finds
helper threads asleep and caches cold, as the arm in memory never does. After a stretch of tokens flash is read as they
did. None of this is the product's time, and none of it changes what is in its cache.

Knows: a stage with an expert cache. Does not know: arms, the limit's formula.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_kernels.flash import FlashTimes

from benchmarks.flash_beside import PROMPT, STRETCH_TOKENS, FlashBeside
from benchmarks.flash_limit import Stretch
from benchmarks.memory_beside import MemoryBeside
from edge_runtime.experts.cache import ExpertCache

MEMORY_EVERY_TOKENS = 4
_STAT = Path("/proc/stat")
_STOLEN = 8  # place of the host's share in its first line, in hundredths of a second


class Routed(Protocol):
    """Experts of a layer in a benchmark: `in_memory` runs them, where it is set."""

    in_memory: MemoryBeside | None


@dataclass(frozen=True)
class _Seen:
    """Running totals, in seconds."""

    at: float
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

    def prompt(self) -> None:
        self._flash.follow(PROMPT)

    def before(self, token: int, run: Callable[[], object]) -> None:
        """`run`: a token at the position of `token`, whose rows are written anew afterwards."""
        begin = time.perf_counter()
        if token % STRETCH_TOKENS == 0:
            self.stretches.append(Stretch())
        if token % MEMORY_EVERY_TOKENS == 0:
            self._memory.choose()
            self._in_memory(run)
            self.stretches[-1].memory_tokens.append(self._in_memory(run))
        self._seen = self._look()
        self.aside_seconds += time.perf_counter() - begin

    def after(self, token: int, missed: list[int]) -> None:
        self._note(missed)
        begin = time.perf_counter()
        self._flash.follow(token)
        if (token + 1) % STRETCH_TOKENS == 0:
            self.stretches[-1].flash_bytes_per_second = self._flash.bytes_per_second[-1]
        self.aside_seconds += time.perf_counter() - begin

    def close(self) -> None:
        self._flash.close()

    def _in_memory(self, run: Callable[[], object]) -> tuple[float, float]:
        """Seconds of a token, and of its experts."""
        for routed in self._routed:
            routed.in_memory = self._memory
        before, begin = self._memory.seconds, time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
        for routed in self._routed:
            routed.in_memory = None
        return seconds, self._memory.seconds - before

    def _note(self, missed: list[int]) -> None:
        old, new, own = self._seen, self._look(), self.stretches[-1]
        own.missed.append(missed)
        own.seconds += new.at - old.at
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
        return _Seen(time.perf_counter(), self._experts_seconds(), waited, _stolen_seconds(), times)


def _stolen_seconds() -> float:
    """Of all processors; 0 where the system does not say."""
    if not _STAT.exists():
        return 0.0
    return int(_STAT.read_text().split("\n", 1)[0].split()[_STOLEN]) / 100
