"""Who holds which experts of a layer, where several devices share them.

Knows: sets of experts as bytes on the wire, and whom a stage asks for each expert. Does not know: why they are where
they are (`coordinator.planning.experts`), links, or bytes of weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ProtocolError
from edge_runtime.protocol.expert_messages import ExpertShare

HERE = 0  # among the owners of a layer: this device


def pack_experts(experts: Iterable[int], count: int) -> bytes:
    """A set of 0 … count - 1: expert e is bit e % 8 (from the lowest) of byte e // 8."""
    chosen = np.zeros(count, bool)
    chosen[list(experts)] = True
    return np.packbits(chosen, bitorder="little").tobytes()


def unpack_experts(packed: bytes, count: int) -> tuple[int, ...]:
    """Ascending. Raises ProtocolError for a set of another size."""
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
    if len(packed) != -(-count // 8) or bits[count:].any():
        raise ProtocolError(f"a share of {len(packed)} bytes does not fit a layer of {count} experts")
    return tuple(int(expert) for expert in np.flatnonzero(bits))


@dataclass(frozen=True, slots=True, eq=False)
class LayerOwners:
    """`of[e]` is HERE, or i + 1 where devices[i] is asked for expert e."""

    devices: tuple[str, ...]
    of: NDArray[np.int16]  # [experts]


def held_by(
    shares: Sequence[ExpertShare], device_id: str, counts: Mapping[int, int]
) -> dict[int, tuple[int, ...]]:
    """Layer -> the experts that a device holds. `counts`: experts of each layer. Raises ProtocolError."""
    return {
        share.layer: unpack_experts(share.experts, _count(share.layer, counts))
        for share in shares
        if share.device_id == device_id
    }


def owners_of(
    shares: Sequence[ExpertShare], device_id: str, counts: Mapping[int, int]
) -> dict[int, LayerOwners]:
    """As `device_id` sees it: what it holds itself it asks nobody for, and of several others it asks the first.

    Raises ProtocolError for an expert that nobody holds, and for a layer without any.
    """
    devices = tuple(dict.fromkeys(s.device_id for s in shares if s.device_id != device_id))
    found = {layer: np.full(count, -1, np.int16) for layer, count in counts.items()}
    for number, device in reversed(list(enumerate((device_id, *devices)))):
        for layer, experts in held_by(shares, device, counts).items():
            found[layer][list(experts)] = number
    for layer, of in found.items():
        if (of < 0).any():
            raise ProtocolError(
                f"expert {int(np.flatnonzero(of < 0)[0])} of layer {layer} is on no device of the plan"
            )
    return {layer: LayerOwners(devices, of) for layer, of in found.items()}


@dataclass(frozen=True, slots=True, eq=False)
class LayerHolders:
    """`holds[i, e]`: devices[i] has expert e in memory."""

    devices: tuple[str, ...]
    holds: NDArray[np.bool_]  # [devices, experts]


def holders_of(
    shares: Sequence[ExpertShare], device_id: str, counts: Mapping[int, int]
) -> dict[int, LayerHolders]:
    """The others, as `device_id` sees them, for every layer. Raises ProtocolError for a share that fits no layer."""
    devices = tuple(dict.fromkeys(s.device_id for s in shares if s.device_id != device_id))
    found = {
        layer: LayerHolders(devices, np.zeros((len(devices), count), bool)) for layer, count in counts.items()
    }
    for number, device in enumerate(devices):
        for layer, experts in held_by(shares, device, counts).items():
            found[layer].holds[number, list(experts)] = True
    return found


def _count(layer: int, counts: Mapping[int, int]) -> int:
    if layer not in counts:
        raise ProtocolError(f"a share of layer {layer}, which has no experts here")
    return counts[layer]
