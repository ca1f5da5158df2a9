"""How busy others keep this machine while we measure.

Knows: the processor time of the machine and of our own processes (this one and all it started). Does not know: what is
measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

import psutil

QUIET_CORES = 0.1  # that others may use beside a sample
_LOOK_SECONDS = 1.0


class Patience:
    """Seconds that a benchmark may wait, all in all, for others to leave the machine alone."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    async def wait(self) -> None:
        while self._left > 0:
            others = OtherWork()
            await asyncio.sleep(_LOOK_SECONDS)
            self._left -= _LOOK_SECONDS
            if others.cores() <= QUIET_CORES:
                return


class OtherWork:
    """From its making on: cores that were busy, less ours."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._busy, self._ours = _busy_seconds(), _our_seconds()

    def cores(self) -> float:
        seconds = max(time.monotonic() - self._begin, 1e-3)
        return max(0.0, _busy_seconds() - self._busy - (_our_seconds() - self._ours)) / seconds


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _our_seconds() -> float:
    """A process that ends takes its time with it: it then counts as others'."""
    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total
