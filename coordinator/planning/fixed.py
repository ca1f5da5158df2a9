"""Splits that the caller fixed: equal shares, or explicit layer ranges.

Knows: which devices a split names, and memory. Does not know: speed; the caller gave that choice up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from coordinator.planning.costs import Costs, Placement
from coordinator.planning.explain import mebibytes
from coordinator.planning.model import DeviceProfile, Split
from edge_runtime.core import LayerRange
from edge_runtime.errors import PlanError


def named_devices(devices: Sequence[DeviceProfile], split: Split) -> list[int]:
    """Indices of the devices the split names, in its order; of all, in theirs, where it names none."""
    if not split.devices:
        return list(range(len(devices)))
    if len(set(split.devices)) != len(split.devices):
        raise PlanError("the split names a device twice", hint="name each device once")
    by_name = {device.name: item for item, device in enumerate(devices)}
    missing = [name for name in split.devices if name not in by_name]
    if missing:
        raise PlanError(
            f"the split names {', '.join(missing)}, which can't be used now",
            hint=f"devices ready: {', '.join(sorted(by_name)) or 'none'}",
        )
    return [by_name[name] for name in split.devices]


def place_even(costs: Costs, order: Sequence[int]) -> tuple[Placement, ...] | None:
    """As many devices as possible, layer counts as equal as memory allows, the first ones larger; None: no fit."""
    candidates = list(order)
    while candidates:
        if len(candidates) <= costs.model.num_layers:
            found = _equal_shares(costs, tuple(candidates))
            if found is not None:
                return found
        # The one with the least memory is the one that is in the way; of several, the last.
        smallest = min(reversed(candidates), key=lambda d: costs.devices[d].memory_free_bytes)
        candidates.remove(smallest)
    return None


def _equal_shares(costs: Costs, devices: tuple[int, ...]) -> tuple[Placement, ...] | None:
    """Least sum of squared layer counts with every device used, in this order."""
    layers = costs.model.num_layers

    @cache
    def best(item: int, first: int) -> tuple[int, tuple[int, ...]] | None:
        """(sum of squares, where each stage ends) of devices[item:] over layers first.."""
        left = len(devices) - item
        if left == 1:
            whole = LayerRange(first, layers - 1)
            return (len(whole) ** 2, (layers - 1,)) if costs.fits(devices[item], whole) else None
        chosen: tuple[int, tuple[int, ...]] | None = None
        for last in range(layers - left, first - 1, -1):  # longest first: the first ones get the odd layers
            if not costs.fits(devices[item], LayerRange(first, last)):
                continue
            rest = best(item + 1, last + 1)
            if rest is not None:
                squares = (last - first + 1) ** 2 + rest[0]
                if chosen is None or squares < chosen[0]:
                    chosen = (squares, (last, *rest[1]))
        return chosen

    found = best(0, 0)
    if found is None:
        return None
    starts = (0, *(last + 1 for last in found[1]))
    return tuple(
        Placement(device, LayerRange(first, last))
        for device, first, last in zip(devices, starts, found[1], strict=False)
    )


def check_ranges(ranges: Sequence[LayerRange], num_layers: int) -> None:
    """They must cover every layer once, in order."""
    expected = 0
    for layers in ranges:
        if layers.first != expected:
            raise PlanError(
                f"range {layers} does not begin at layer {expected}",
                hint=f"ranges must cover layers 0-{num_layers - 1} in order, without holes or overlaps",
            )
        expected = layers.last + 1
    if expected != num_layers:
        raise PlanError(
            f"the ranges cover {expected} layers, the model has {num_layers}",
            hint=f"ranges must cover layers 0-{num_layers - 1} in order, without holes or overlaps",
        )


def place_ranges(costs: Costs, order: Sequence[int], split: Split) -> tuple[Placement, ...]:
    """Range i on device i of the split's order; without one, on the first devices that have room."""
    check_ranges(split.ranges, costs.model.num_layers)
    if len(order) < len(split.ranges):
        raise PlanError(
            f"{len(split.ranges)} ranges need as many devices; {len(order)} can be used now",
            hint="pair another device, or give fewer ranges",
        )
    if split.devices:
        for device, layers in zip(order, split.ranges, strict=False):
            if not costs.fits(device, layers):
                raise _too_small(costs, device, layers)
        return tuple(Placement(d, layers) for d, layers in zip(order, split.ranges, strict=False))
    owners = _matched(costs, order, split.ranges)
    return tuple(Placement(owner, layers) for owner, layers in zip(owners, split.ranges, strict=True))


def _matched(costs: Costs, order: Sequence[int], ranges: Sequence[LayerRange]) -> list[int]:
    """A device for every range, in order as long as there is room (augmenting paths otherwise)."""
    owner_of: dict[int, int] = {}  # device -> range

    def assign(item: int, seen: set[int]) -> bool:
        fitting = [d for d in order if d not in seen and costs.fits(d, ranges[item])]
        for device in [d for d in fitting if d not in owner_of]:
            owner_of[device] = item
            return True
        for device in fitting:
            seen.add(device)
            if assign(owner_of[device], seen):
                owner_of[device] = item
                return True
        return False

    for item, layers in enumerate(ranges):
        if not assign(item, set()):
            largest = max(order, key=lambda d: costs.devices[d].memory_free_bytes)
            raise _too_small(costs, largest, layers)
    device_of = {item: device for device, item in owner_of.items()}
    return [device_of[item] for item in range(len(ranges))]


def _too_small(costs: Costs, device: int, layers: LayerRange) -> PlanError:
    profile = costs.devices[device]
    needed = costs.needed_bytes(layers)
    return PlanError(
        f"layers {layers} need {mebibytes(needed)}, {profile.name} has {mebibytes(profile.memory_free_bytes)}:"
        f" {needed - profile.memory_free_bytes} bytes short",
        hint="give it fewer layers or more memory, or use split=auto",
    )
