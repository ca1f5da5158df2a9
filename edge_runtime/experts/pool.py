"""Memory that layers with experts of one size share: an arena, which expert is in which slot, how much of it is there.

Knows: slots, and the kernel's view of them. Does not know: reading, batches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from edge_kernels.experts import ExpertWeights

from edge_runtime.bundle.manifest import plane_of
from edge_runtime.experts.arena import Arena
from edge_runtime.experts.flash_store import ExpertLayer
from edge_runtime.experts.planes import PlaneTable
from edge_runtime.experts.slot_table import make_slots
from edge_runtime.experts.start_bits import ALL_BITS, start_planes


class Pool:
    """`start_planes`: what must be there before an expert is used: all `planes`, unless `start_bits` asks for less."""

    def __init__(
        self, layers: Sequence[ExpertLayer], budget_bytes: int, policy: str, *, start_bits: int = ALL_BITS
    ) -> None:
        slot_bytes = layers[0].stride_bytes
        experts = sum(layer.experts for layer in layers)
        slots = min(experts, budget_bytes // slot_bytes)
        self.arena = Arena(slots, slot_bytes)
        self.table = make_slots(slots, experts, policy)
        self.planes = PlaneTable(slots, layers[0].planes)
        self.start_planes = start_planes(layers[0].plane_bits, start_bits)
        self.first_key: dict[int, int] = {}
        # By layer, for each number of planes from one to all.
        self.weights: dict[int, tuple[ExpertWeights, ...]] = {}
        self._layers = list(layers)
        self._starts: list[int] = []
        key = 0
        for layer in layers:
            self._starts.append(key)
            self.first_key[layer.layer] = key
            key += layer.experts
            self.weights[layer.layer] = tuple(
                self._weights(layer, planes) for planes in range(1, layer.planes + 1)
            )

    @property
    def is_lossy(self) -> bool:
        """Experts may be used before they are complete."""
        return self.start_planes < self.planes.planes

    def who(self, slot: int) -> tuple[ExpertLayer, int]:
        """The (layer, expert) in a slot that has one."""
        key = self.table.key(slot)
        index = bisect_right(self._starts, key) - 1
        return self._layers[index], key - self._starts[index]

    def _weights(self, layer: ExpertLayer, planes: int) -> ExpertWeights:
        prefix = f"nested{layer.plane_bits[planes - 1]}"
        return ExpertWeights(
            buffer=self.arena.bytes,
            format=layer.format if planes == layer.planes else prefix,
            num_experts=self.table.slots,
            hidden=layer.hidden,
            intermediate=layer.intermediate,
            stride_bytes=layer.stride_bytes,
            offsets={part: at for part, at in layer.offsets.items() if plane_of(part) < planes},
        )


def make_pools(
    layers: Sequence[ExpertLayer], budget_bytes: int, policy: str, *, start_bits: int = ALL_BITS
) -> dict[int, Pool]:
    """Each kind of expert gets its share of the budget, and at least one token's experts. By layer."""
    by_size: dict[tuple[int, ...], list[ExpertLayer]] = {}
    for layer in layers:
        by_size.setdefault(layer.plane_bytes, []).append(layer)
    total_bytes = sum(layer.total_bytes for layer in layers)
    cycle_bytes = sum(layer.token_bytes for layer in layers)
    spare_bytes = max(0, budget_bytes - cycle_bytes)
    pools: dict[int, Pool] = {}
    for same in by_size.values():
        own_bytes = sum(layer.total_bytes for layer in same)
        own_cycle_bytes = sum(layer.token_bytes for layer in same)
        rest_bytes = max(1, total_bytes - cycle_bytes)
        share_bytes = own_cycle_bytes + spare_bytes * (own_bytes - own_cycle_bytes) // rest_bytes
        pool = Pool(same, share_bytes, policy, start_bits=start_bits)
        pools.update((layer.layer, pool) for layer in same)
    return pools
