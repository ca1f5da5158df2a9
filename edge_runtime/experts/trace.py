"""Recorded routing: which experts each step asked for, layer after layer.

Knows: traces as values, and the CSV of public recordings (`turn,phase,step,layer,slot,expert,…`, `#` starts a header
line, phase 1 is decoding; gzip where the name ends in .gz). Does not know: caches.
"""

from __future__ import annotations

import gzip
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import UsageError

_COLUMNS = "turn,phase,step,layer,slot,expert"


@dataclass(frozen=True, slots=True)
class Access:
    """One layer of one batch: the distinct experts it needs, in the order they are first asked for."""

    step: int
    layer: int
    experts: tuple[int, ...]
    rows: tuple[int, ...]  # of each expert
    decode: bool


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """Accesses in the order they happened. A prompt is one batch: its rows are one access per layer."""

    layers: int
    experts: int
    top_k: int
    accesses: tuple[Access, ...]

    @property
    def keys(self) -> int:
        return self.layers * self.experts

    def key(self, layer: int, expert: int) -> int:
        return layer * self.experts + expert

    @property
    def decoded_tokens(self) -> int:
        return len({access.step for access in self.accesses if access.decode})


Row = tuple[int, int, int, int, int, int]  # turn, phase, step, layer, slot, expert


def read_trace(path: str | Path) -> RoutingTrace:
    """Raises UsageError with the line that can't be read."""
    path = Path(path)
    experts = 0
    rows: list[Row] = []
    for number, line in enumerate(_lines(path), start=1):
        if line.startswith("#"):
            for word in line.split():
                if word.startswith("n_expert="):
                    experts = _number(word.partition("=")[2], path, number)
        elif not line.startswith("turn") and line.strip():
            fields = line.split(",")
            if len(fields) < 6:
                raise UsageError(
                    f"{path}:{number} is not a row of a routing trace", hint=f"columns: {_COLUMNS},…"
                )
            turn, phase, step, layer, slot, expert = (_number(text, path, number) for text in fields[:6])
            rows.append((turn, phase, step, layer, slot, expert))
    if not rows:
        raise UsageError(f"{path} holds no routing", hint=f"columns: {_COLUMNS},…")
    return _of_rows(rows, experts)


def decode_routing(path: str | Path) -> list[list[tuple[int, ...]]]:
    """Decoded tokens only: experts in gate-rank order, by token and layer."""
    trace = read_trace(path)
    tokens: dict[int, list[tuple[int, ...]]] = {}
    for access in trace.accesses:
        if access.decode:
            tokens.setdefault(access.step, []).append(access.experts)
    return list(tokens.values())


def _of_rows(rows: list[Row], experts: int) -> RoutingTrace:
    def batch(row: Row) -> tuple[int, int, int, int]:
        turn, phase, step, layer, _, _ = row
        return turn, phase, step if phase else -1, layer

    accesses = []
    step, last = 0, (-1, -1, -1)
    for (turn, phase, token, layer), group in itertools.groupby(rows, key=batch):
        if (turn, phase, token) != last:
            step, last = step + 1, (turn, phase, token)
        rows_of = Counter(row[5] for row in group)
        accesses.append(Access(step, layer, tuple(rows_of), tuple(rows_of.values()), decode=phase == 1))
    layers = 1 + max(row[3] for row in rows)
    top_k = 1 + max(row[4] for row in rows)
    return RoutingTrace(layers, experts or 1 + max(row[5] for row in rows), top_k, tuple(accesses))


def _lines(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            yield from file
    except (OSError, UnicodeDecodeError, EOFError) as problem:
        raise UsageError(f"{path} can't be read: {problem}") from None


def _number(text: str, path: Path, line: int) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{path}:{line}: {text.strip()[:40]!r} is not a whole number") from None
