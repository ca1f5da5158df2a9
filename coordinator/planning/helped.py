"""Experts on one device's flash, where the memory of others may be faster: who holds what, and what that would bring.

The device that runs the layers has all experts on flash and a cache in front; a miss goes where it is there first, as
its agent finds out while it runs (`edge_runtime.experts.flash_and_peers`). So holders need not have everything, and may
hold what another one holds.

They get what the cache will lack first: it keeps the busiest experts on its own. Each goes to whoever has the least to
do; what room is left holds second copies, the busiest first, so that two holders can share what many rows want.

Knows: bytes and loads. Does not know: what it brings (`help_seconds`), routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coordinator.planning import explain
from coordinator.planning.costs import Costs, Placement
from coordinator.planning.experts import (
    Expert,
    busiest_first,
    expert_bytes,
    holder_of,
    holds_of,
    lent_bytes,
    load,
    place_experts,
)
from coordinator.planning.fixed import named_devices
from coordinator.planning.help_seconds import Help, seconds_per_token, with_flash, without_choice
from coordinator.planning.model import DeviceProfile, Links, ModelProfile, Plan, Split
from edge_runtime.engine.numeric_class import is_early_class
from edge_runtime.errors import PlanError


def place_shared(devices: Sequence[DeviceProfile], links: Links, model: ModelProfile, split: Split) -> Plan:
    """Experts in the memory of several devices, or on flash where others help: the faster one, with both predictions.

    Raises PlanError where neither can be.
    """
    helped = place_helped(devices, links, model, split)
    try:
        spread = place_experts(devices, links, model, split)
    except PlanError:
        if helped is None:
            raise
        return helped
    if helped is None:
        return spread
    if spread.predicted_tokens_per_second >= helped.predicted_tokens_per_second:
        reason = f"slower: {helped.reasons[0]} ({helped.reasons[1]})"
        return replace(spread, reasons=(*spread.reasons, reason))
    seconds = 1 / spread.predicted_tokens_per_second if spread.predicted_tokens_per_second else 0.0
    reason = f"all experts in memory, spread over devices: {explain.rate(seconds)}"
    return replace(helped, reasons=(*helped.reasons, reason))


def place_helped(
    devices: Sequence[DeviceProfile], links: Links, model: ModelProfile, split: Split
) -> Plan | None:
    """The fastest over the named devices; the first named one runs the layers, where any is named.

    None: no device keeps experts on flash, or nobody else of its numeric class has memory for one.
    """
    if not any(model.layer_experts):
        return None
    named = [devices[item] for item in named_devices(devices, split)]
    costs = Costs(tuple(named), links, model)
    runners = range(1 if split.devices else len(named))
    found = [help_ for runner in runners if (help_ := help_for(costs, runner)) is not None]
    if not found:
        return None
    best = min(
        found, key=lambda each: (seconds_per_token(costs, each, with_flash), costs.devices[each.runner].name)
    )
    return _plan_of(costs, best)


def help_for(costs: Costs, runner: int) -> Help | None:
    profile, layers = costs.devices[runner], costs.all_layers
    cache = costs.expert_cache_bytes(runner, layers)
    if cache is None or not costs.fits(runner, layers) or is_early_class(profile.numeric_class):
        return None
    order = busiest_first(costs.model)
    near = _first_bytes(costs.model, order, cache)
    room = {
        device: lent_bytes(other, other.memory_free_bytes)
        for device, other in enumerate(costs.devices)
        if device != runner and other.numeric_class == profile.numeric_class
    }
    held = _dealt(costs, [*order[near:], *order[:near]], room)
    return Help(runner, held, frozenset(order[near:])) if held else None


def _first_bytes(model: ModelProfile, order: Sequence[Expert], size_bytes: int) -> int:
    """How many of them fit."""
    for count, expert in enumerate(order):
        size_bytes -= expert_bytes(model, expert[0])
        if size_bytes < 0:
            return count
    return len(order)


def _dealt(costs: Costs, order: Sequence[Expert], room: dict[int, int]) -> dict[int, list[Expert]]:
    """First copies, then second ones."""
    held: dict[int, list[Expert]] = {device: [] for device in room}
    work = dict.fromkeys(room, 0.0)
    first: dict[Expert, int] = {}
    for expert in (*order, *busiest_first(costs.model)):
        size = expert_bytes(costs.model, expert[0])
        able = [device for device in room if room[device] >= size and first.get(expert) != device]
        if not able:
            continue
        taker = min(able, key=lambda device: (work[device], device))
        first.setdefault(expert, taker)
        held[taker].append(expert)
        room[taker] -= size
        work[taker] += load(costs.model, expert) * costs.devices[taker].layer_decode_seconds
    return {device: experts for device, experts in held.items() if experts}


# ---------------------------------------------------------------- as a plan


def _plan_of(costs: Costs, help_: Help) -> Plan:
    alone = [Placement(help_.runner, costs.all_layers)]
    seconds = seconds_per_token(costs, help_, with_flash)
    dense = costs.compute_seconds(help_.runner, costs.all_layers) - costs.flash_seconds(
        help_.runner, costs.all_layers
    )
    (stage,) = costs.stages(alone)
    chunk = costs.chunk_tokens(alone)
    holders = tuple(holder_of(costs, device, experts) for device, experts in sorted(help_.held.items()))
    return Plan(
        stages=(replace(stage, compute_seconds=seconds, flash_seconds=seconds - dense),),
        predicted_tokens_per_second=1 / seconds if seconds > 0 else float("inf"),
        predicted_prefill_tokens_per_second=costs.prefill_tokens_per_second(alone, chunk),
        reasons=(*_reasons(costs, help_, seconds), *explain.format_reasons(costs.model, 1)),
        excluded=_excluded(costs, help_),
        prefill_chunk_tokens=chunk,
        formats=costs.model.formats,
        holders=holders,
        experts=tuple(holds_of(costs, help_.held)),
    )


def _reasons(costs: Costs, help_: Help, seconds: float) -> list[str]:
    runner, layers = costs.devices[help_.runner], costs.all_layers
    cache = explain.mebibytes(costs.expert_cache_bytes(help_.runner, layers) or 0)
    alone = costs.compute_seconds(help_.runner, layers)
    peers = seconds_per_token(costs, help_, without_choice)
    reasons = [
        f"{runner.name} runs all layers, experts on flash behind a cache of {cache}; what that lacks is read, or asked"
        f" of others who have it in memory, whichever is there first: {explain.rate(seconds)}",
        f"flash alone {explain.rate(alone)}; others alone, for all that they hold, {explain.rate(peers)}",
    ]
    for device, experts in sorted(help_.held.items()):
        holder = holder_of(costs, device, experts)
        reasons.append(
            f"{holder.name} holds {holder.experts} experts, {explain.mebibytes(holder.weight_bytes)}"
        )
    return reasons


def _excluded(costs: Costs, help_: Help) -> dict[str, str]:
    own = costs.devices[help_.runner].numeric_class
    return {
        profile.name: "its numeric class is another: tokens would depend on who computes an expert"
        if profile.numeric_class != own
        else "it has no memory for an expert"
        for device, profile in enumerate(costs.devices)
        if device != help_.runner and device not in help_.held
    }
