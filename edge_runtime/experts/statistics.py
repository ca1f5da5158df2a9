"""What an expert cache did, by layer.

Knows: counting. Does not know: who reads it. Counted on the compute thread; other threads may read whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields


@dataclass(slots=True)
class LayerStatistics:
    hits: int = 0
    misses: int = 0
    read_bytes: int = 0
    waited_seconds: float = 0.0
    fewer_bits: int = 0  # hits and misses computed before all planes were there
    upgraded_bytes: int = 0  # planes read afterwards; not among `read_bytes`
    compared: int = 0  # experts that rows chose here while a guess was compared with it
    named_by_gate: int = 0  # of these, in the top k guessed from the layer before (`next_gate`, `affinity`)
    named_by_affinity: int = 0
    read_ahead: int = 0  # experts read because they were guessed; a hit where it was used
    read_ahead_bytes: int = 0  # not among `read_bytes`
    used_ahead: int = 0  # of those read, used by the step they were read for

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    @property
    def gate_recall(self) -> float:
        """Share of the chosen experts that the guess named; 0 also where none was compared."""
        return self.named_by_gate / max(1, self.compared)

    @property
    def affinity_recall(self) -> float:
        return self.named_by_affinity / max(1, self.compared)


_COUNTED = tuple(field.name for field in fields(LayerStatistics))


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

    def count_guesses(self, layer: int, *, compared: int, by_gate: int, by_affinity: int) -> None:
        """`layer`: which the guess was about."""
        own = self._layers[layer]
        own.compared += compared
        own.named_by_gate += by_gate
        own.named_by_affinity += by_affinity

    def count_ahead(self, layer: int, *, read: int = 0, read_bytes: int = 0, used: int = 0) -> None:
        own = self._layers[layer]
        own.read_ahead += read
        own.read_ahead_bytes += read_bytes
        own.used_ahead += used

    def reset(self) -> None:
        self._layers = {layer: LayerStatistics() for layer in self._layers}

    @property
    def layers(self) -> Mapping[int, LayerStatistics]:
        return self._layers

    @property
    def total(self) -> LayerStatistics:
        total = LayerStatistics()
        for own in self._layers.values():
            for name in _COUNTED:
                setattr(total, name, getattr(total, name) + getattr(own, name))
        return total
