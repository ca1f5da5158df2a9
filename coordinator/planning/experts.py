"""Experts spread over devices, and everything else on one of them: for a model whose experts no device can hold.

The device that runs the layers asks the others for each row's experts and computes its own meanwhile, so what costs is
a round trip in every layer that needs one. ExFlow's objective (Yao et al. 2024, as few tokens as possible leave a
device) becomes here: as few layers as possible that ask. The device keeps the busiest experts of every layer, or all
experts of some layers, whichever is faster: a token uses several experts of a layer, and one of them elsewhere is
enough to ask, so that half of each layer, used alike, helps hardly any token. The others are dealt to those who hold
experts for it, each to whoever has the least to do (longest processing time first). Of devices of another numeric class
none is asked: tokens would depend on who holds what.

Knows: bytes, loads, links. Does not know: routing, or how loads were measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coordinator.planning import explain
from coordinator.planning.costs import Costs, Placement
from coordinator.planning.fixed import named_devices
from coordinator.planning.model import (
    DeviceProfile,
    ExpertsHeld,
    HolderPlan,
    Links,
    ModelProfile,
    Plan,
    Split,
    StagePlan,
)
from edge_runtime.errors import PlanError

Expert = tuple[int, int]  # layer, number


@dataclass(frozen=True, slots=True)
class Spread:
    """Who holds what. Devices are indices into Costs.devices."""

    runner: int
    held: dict[int, list[Expert]]  # by device, the runner included


def place_experts(devices: Sequence[DeviceProfile], links: Links, model: ModelProfile, split: Split) -> Plan:
    """The fastest spread over the named devices; the first named one runs the layers, where any is named.

    Raises PlanError with the bytes that are missing.
    """
    if not any(model.layer_experts):
        raise PlanError(
            "this model has no experts that could be shared",
            hint="use split=auto; a mixture of experts shares where its bundle has a digest of every expert",
        )
    named = [devices[item] for item in named_devices(devices, split)]
    costs = Costs(tuple(named), links, model)
    runners = range(1 if split.devices else len(named))
    orders = (busiest_first(model), layer_by_layer(model))
    spreads = [spread_over(costs, runner, order) for runner in runners for order in orders]
    found = [spread for spread in spreads if spread is not None]
    if not found:
        raise _does_not_fit(costs, runners)
    best = min(
        found, key=lambda spread: (seconds_per_token(costs, spread), costs.devices[spread.runner].name)
    )
    return _plan_of(costs, best)


def spread_over(costs: Costs, runner: int, order: Sequence[Expert]) -> Spread | None:
    """With the layers on `runner`, which keeps the first of `order`; None: the others don't have room for the rest."""
    room = {runner: _room_bytes(costs, runner)}
    numeric_class = costs.devices[runner].numeric_class
    for device, profile in enumerate(costs.devices):
        if device != runner and profile.numeric_class == numeric_class:
            room[device] = lent_bytes(profile, profile.memory_free_bytes)
    if room[runner] < 0:
        return None
    held: dict[int, list[Expert]] = {device: [] for device in room}
    work = dict.fromkeys(room, 0.0)
    for expert in order:
        size = expert_bytes(costs.model, expert[0])
        able = [device for device in room if room[device] >= size]
        if not able:
            return None
        taker = runner if runner in able else min(able, key=lambda device: (work[device], device))
        held[taker].append(expert)
        room[taker] -= size
        work[taker] += load(costs.model, expert) * costs.devices[taker].layer_decode_seconds
    return Spread(runner, {device: experts for device, experts in held.items() if experts})


def busiest_first(model: ModelProfile) -> list[Expert]:
    """Equal ones in turn over the layers, so that every layer has some of its experts near."""
    everyone = [(layer, number) for layer, count in enumerate(model.layer_experts) for number in range(count)]
    return sorted(everyone, key=lambda expert: (-load(model, expert), expert[1], expert[0]))


def layer_by_layer(model: ModelProfile) -> list[Expert]:
    """The smallest layers first, of which more are held whole; of each the busiest first."""
    return sorted(busiest_first(model), key=lambda expert: (model.layer_expert_bytes[expert[0]], expert[0]))


def load(model: ModelProfile, expert: Expert) -> float:
    """Share of its layer's uses; all alike where nothing was measured."""
    layer, number = expert
    if model.expert_loads:
        return model.expert_loads[layer][number]
    return 1.0 / model.layer_experts[layer]


def expert_bytes(model: ModelProfile, layer: int) -> int:
    count = model.layer_experts[layer]
    return -(-model.layer_expert_bytes[layer] // count) if count else 0


def seconds_per_token(costs: Costs, spread: Spread) -> float:
    """The layers' own work, and in each the longer of its near experts and of asking for the others."""
    layers = costs.all_layers
    total = costs.compute_seconds(spread.runner, layers) - costs.flash_seconds(spread.runner, layers)
    return total + sum(_asking_seconds(costs, spread, layer) for layer in range(costs.model.num_layers))


def _asking_seconds(costs: Costs, spread: Spread, layer: int) -> float:
    """How much longer than alone a layer takes: the way to whoever is asked; what is computed there is saved here."""
    uses = top_k(costs.model, layer)
    slowest = 0.0
    for device, experts in spread.held.items():
        if device == spread.runner:
            continue
        share = sum(load(costs.model, expert) for expert in experts if expert[0] == layer)
        if not share:
            continue
        link = costs.link(spread.runner, device)
        row_bytes = 2 * costs.model.hidden_bytes_per_row
        chance = 1.0 - (1.0 - min(1.0, share)) ** uses
        slowest = max(slowest, chance * (link.rtt_seconds + row_bytes / link.bytes_per_second))
    return slowest


def top_k(model: ModelProfile, layer: int) -> int:
    size = expert_bytes(model, layer)
    return max(1, model.layer_cycle_bytes[layer] // size) if size else 1


def _room_bytes(costs: Costs, runner: int) -> int:
    """For experts, beside the other weights and the KV wanted."""
    layers = costs.all_layers
    dense = costs.needed_bytes(layers) - costs.expert_bytes(layers)
    profile = costs.devices[runner]
    return lent_bytes(profile, profile.memory_free_bytes - dense)


def lent_bytes(profile: DeviceProfile, free_bytes: int) -> int:
    """Less where the device was told how much memory experts may take."""
    return min(free_bytes, profile.expert_cache_bytes or free_bytes)


def _plan_of(costs: Costs, spread: Spread) -> Plan:
    seconds = seconds_per_token(costs, spread)
    alone = [Placement(spread.runner, costs.all_layers)]
    chunk = costs.chunk_tokens(alone)
    stage = _stage(costs, spread, seconds)
    holders = tuple(holder_of(costs, device, experts) for device, experts in sorted(spread.held.items()))
    return Plan(
        stages=(stage,),
        predicted_tokens_per_second=1 / seconds if seconds > 0 else float("inf"),
        predicted_prefill_tokens_per_second=costs.prefill_tokens_per_second(alone, chunk),
        reasons=(*_reasons(costs, spread, seconds), *explain.format_reasons(costs.model, 1)),
        excluded=_excluded(costs, spread),
        prefill_chunk_tokens=chunk,
        formats=costs.model.formats,
        holders=tuple(holder for holder in holders if holder.device_id != stage.device_id),
        experts=tuple(holds_of(costs, spread.held)),
    )


def _stage(costs: Costs, spread: Spread, seconds: float) -> StagePlan:
    profile, layers = costs.devices[spread.runner], costs.all_layers
    own_bytes = _bytes_of(costs, spread.held.get(spread.runner, []))
    weight_bytes = costs.weight_bytes(layers) - costs.expert_bytes(layers) + own_bytes
    token_bytes = costs.model.kv_bytes_per_token_per_layer * len(layers)
    left_bytes = profile.memory_free_bytes - weight_bytes
    return StagePlan(
        device_id=profile.device_id,
        name=profile.name,
        layers=layers,
        weight_bytes=weight_bytes,
        kv_tokens=left_bytes // token_bytes if token_bytes else costs.model.kv_tokens_wanted,
        compute_seconds=seconds,
        hop_seconds=0.0,
        numeric_class=profile.numeric_class,
    )


def holder_of(costs: Costs, device: int, experts: Sequence[Expert]) -> HolderPlan:
    profile = costs.devices[device]
    return HolderPlan(profile.device_id, profile.name, len(experts), _bytes_of(costs, experts))


def _bytes_of(costs: Costs, experts: Sequence[Expert]) -> int:
    return sum(expert_bytes(costs.model, layer) for layer, _ in experts)


def holds_of(costs: Costs, held: Mapping[int, Sequence[Expert]]) -> list[ExpertsHeld]:
    """By device, then layer."""
    found = []
    for device, experts in sorted(held.items()):
        for layer in sorted({layer for layer, _ in experts}):
            numbers = tuple(sorted(number for at, number in experts if at == layer))
            of = costs.model.layer_experts[layer]
            found.append(ExpertsHeld(costs.devices[device].device_id, layer, numbers, of))
    return found


def _reasons(costs: Costs, spread: Spread, seconds: float) -> list[str]:
    runner = costs.devices[spread.runner].name
    near = sum(load(costs.model, expert) for expert in spread.held.get(spread.runner, []))
    share = near / sum(1 for count in costs.model.layer_experts if count)
    measured = "measured" if costs.model.expert_loads else "experts counted alike: no routing was measured"
    reasons = [
        f"{runner} runs all layers and asks others for the experts it has no room for, {explain.rate(seconds)};"
        f" {share:.0%} of their uses find the expert there ({measured})"
    ]
    for device, experts in sorted(spread.held.items()):
        size = explain.mebibytes(_bytes_of(costs, experts))
        reasons.append(f"{costs.devices[device].name} holds {len(experts)} experts, {size}")
    if len(spread.held) == 1:
        reasons.append(f"all experts fit on {runner}: nobody else is needed")
    return reasons


def _excluded(costs: Costs, spread: Spread) -> dict[str, str]:
    own = costs.devices[spread.runner].numeric_class
    return {
        profile.name: "its numeric class is another: tokens would depend on who holds an expert"
        if profile.numeric_class != own
        else "no expert is left for it"
        for device, profile in enumerate(costs.devices)
        if device not in spread.held and device != spread.runner
    }


def _does_not_fit(costs: Costs, runners: Sequence[int]) -> PlanError:
    best = max(runners, key=lambda device: _room_bytes(costs, device))
    room = _room_bytes(costs, best)
    name = costs.devices[best].name
    if room < 0:
        return PlanError(
            f"no device has room for what all layers need beside experts: {name} is {-room} bytes short",
            hint="give it more memory, or use split=auto",
        )
    numeric_class = costs.devices[best].numeric_class
    others = [
        lent_bytes(profile, profile.memory_free_bytes)
        for device, profile in enumerate(costs.devices)
        if device != best and profile.numeric_class == numeric_class
    ]
    total = costs.expert_bytes(costs.all_layers)
    return PlanError(
        f"the experts need {explain.mebibytes(total)}; {name} has room for {explain.mebibytes(room)} and the others"
        f" of its numeric class for {explain.mebibytes(sum(others))}",
        hint="pair another device, or give agents more --memory",
    )
