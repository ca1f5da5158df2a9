"""A line on stderr that says how far something is, and never goes backwards.

On a terminal the line is redrawn; elsewhere a new line is written at every tenth. Knows: fractions, bytes, time left.
Does not know: what is being done.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

_BAR_CELLS = 24
_REDRAW_SECONDS = 0.1


class Progress:
    """`with Progress("fetching", total=n, unit="B") as bar: bar.update(done)`; `total` 0 means unknown."""

    def __init__(
        self,
        label: str,
        *,
        total: int = 0,
        unit: str = "",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._total = total
        self._unit = unit
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started = clock()
        self._done = 0
        self._drawn_at = float("-inf")
        self._tenth = -1
        self._width = 0
        self._live = self._stream.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def done(self) -> int:
        return self._done

    def update(self, done: int, *, total: int | None = None, label: str | None = None) -> None:
        """Say that `done` of the whole is done. A smaller figure than the last one is ignored."""
        if total is not None:
            self._total = max(total, self._total)
        changed = label is not None and label != self._label
        if label is not None:
            self._label = label
        self._done = max(self._done, done)
        if self._live:
            now = self._clock()
            if changed or now - self._drawn_at >= _REDRAW_SECONDS or self._complete:
                self._drawn_at = now
                self._redraw()
        else:
            self._append(force=changed)

    def advance(self, amount: int) -> None:
        self.update(self._done + amount)

    def close(self) -> None:
        """Finish the line where it stands."""
        if self._live and self._width:
            self._redraw()
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0

    @property
    def _complete(self) -> bool:
        return self._total > 0 and self._done >= self._total

    def _fraction(self) -> float:
        return min(1.0, self._done / self._total) if self._total else 0.0

    def _line(self) -> str:
        if not self._total:
            return f"{self._label} {format_amount(self._done, self._unit)}".rstrip()
        amounts = f"{format_amount(self._done, self._unit)} of {format_amount(self._total, self._unit)}"
        return f"{self._label} {self._fraction():4.0%} {amounts}{self._time_left()}"

    def _time_left(self) -> str:
        elapsed = self._clock() - self._started
        if self._complete or not self._done or elapsed < 1.0:
            return ""
        seconds = elapsed * (self._total - self._done) / self._done
        return f", {format_seconds(seconds)} left"

    def _redraw(self) -> None:
        line = self._line()
        if self._total:
            filled = round(self._fraction() * _BAR_CELLS)
            line = f"[{'=' * filled}{' ' * (_BAR_CELLS - filled)}] {line}"
        self._stream.write("\r" + line.ljust(self._width))
        self._stream.flush()
        self._width = len(line)

    def _append(self, *, force: bool) -> None:
        tenth = int(self._fraction() * 10)
        if tenth > self._tenth or force:
            self._tenth = max(tenth, self._tenth)
            self._stream.write(self._line() + "\n")
            self._stream.flush()


def format_amount(amount: float, unit: str) -> str:
    """12.3 MiB for unit "B"; a plain number and its unit otherwise."""
    if unit != "B":
        return f"{amount:g} {unit}".rstrip()
    for prefix in ("", "Ki", "Mi", "Gi"):
        if amount < 1024:
            return f"{amount:.0f} B" if not prefix else f"{amount:.1f} {prefix}B"
        amount /= 1024
    return f"{amount:.1f} TiB"


def format_seconds(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02d} s"
