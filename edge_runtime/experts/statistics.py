"""What an expert cache did, by layer.

Knows: counting. Does not know: who reads it. Counted on the compute thread; other threads may read whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class LayerStatistics:
    hits: int = 0
    misses: int = 0
    read_bytes: int = 0
    waited_seconds: float = 0.0
    fewer_bits: int = 0  # hits and misses computed before all planes were there
    upgraded_bytes: int = 0  # planes read afterwards; not among `read_bytes`

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


class CacheStatistics:
    """A batch counts an expert once, however many rows want it."""

    def __init__(self, layers: Iterable[int]) -> None:
        self._layers = {layer: LayerStatistics() for layer in layers}

    def count(
        self,
        layer: int,
        *,
        hits: int,
        misses: int,
        read_bytes: int,
        waited_seconds: float,
        fewer_bits: int = 0,
    ) -> None:
        own = self._layers[layer]
        own.hits += hits
        own.misses += misses
        own.read_bytes += read_bytes
        own.waited_seconds += waited_seconds
        own.fewer_bits += fewer_bits

    def count_upgrade(self, layer: int, read_bytes: int) -> None:
        self._layers[layer].upgraded_bytes += read_bytes

    def reset(self) -> None:
        self._layers = {layer: LayerStatistics() for layer in self._layers}

    @property
    def layers(self) -> Mapping[int, LayerStatistics]:
        return self._layers

    @property
    def total(self) -> LayerStatistics:
        total = LayerStatistics()
        for own in self._layers.values():
            total.hits += own.hits
            total.misses += own.misses
            total.read_bytes += own.read_bytes
            total.waited_seconds += own.waited_seconds
            total.fewer_bits += own.fewer_bits
            total.upgraded_bytes += own.upgraded_bytes
        return total
