"""Why a plan is what it is, in sentences a person can read.

Knows: plans, costs, and what was found on the way. Does not know: how it was found.
"""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.planning.costs import Costs, Placement
from coordinator.planning.model import ModelProfile, Plan, StagePlan
from coordinator.planning.search import Found
from edge_runtime.core import LayerRange
from edge_runtime.errors import PlanError

# Measured by tests/engine/test_engine_wire_cuts.py and test_engine_kv_codes.py.
INT8_AGREEMENT = "the demo model picks the same token as with fp32 in 99.5 % of 200 steps"
INT8_KV_AGREEMENT = "approximate; the demo model picks the same token as with fp32 in all of 200 steps"


def mebibytes(size_bytes: float) -> str:
    return f"{size_bytes / (1 << 20):,.1f} MiB"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def rate(seconds_per_token: float) -> str:
    return f"{1 / seconds_per_token:,.1f} tokens/s" if seconds_per_token > 0 else "no measurable time"


def stage_reasons(stages: Sequence[StagePlan]) -> list[str]:
    """Who does what, and what it costs."""
    reasons = []
    for item, stage in enumerate(stages):
        last = item + 1 == len(stages)
        where = stages[0].name if last else stages[item + 1].name
        hop = "" if len(stages) == 1 else f", then {milliseconds(stage.hop_seconds)} to {where}"
        head = " and the head" if last else ""
        flash = ""
        if stage.expert_cache_bytes:
            flash = (
                f", experts on flash behind a cache of {mebibytes(stage.expert_cache_bytes)}"
                f" (about {milliseconds(stage.flash_seconds)} of it)"
            )
        reasons.append(
            f"{stage.name}: layers {stage.layers}{head}, {mebibytes(stage.weight_bytes)} of weights,"
            f" {milliseconds(stage.compute_seconds)} a token{flash}{hop}"
        )
    return reasons


def auto_reasons(costs: Costs, found: Found, chosen: Sequence[Placement]) -> list[str]:
    """One device or several, with both predictions."""
    single = None if found.single is None else costs.seconds_per_token(found.single)
    several = None if found.pipeline is None else costs.seconds_per_token(found.pipeline)
    if single is None:
        largest = max(costs.devices, key=lambda device: device.memory_free_bytes)
        return [
            f"no device holds the whole model: it needs {mebibytes(costs.needed_bytes(costs.all_layers))} with KV,"
            f" {largest.name} has the most with {mebibytes(largest.memory_free_bytes)}"
        ]
    alone = costs.devices[found.single[0].device].name if found.single else ""
    if several is None:
        return [f"{alone} alone: nothing else can take a share"]
    split = f"{len(found.pipeline or ())} devices"
    if len(chosen) == 1:
        return [
            f"one device is faster: {alone} alone {rate(single)}, the best split ({split}) {rate(several)}"
        ]
    return [f"splitting is faster: {split} {rate(several)}, the best one alone ({alone}) {rate(single)}"]


def shared_reason(shared: Plan, otherwise: Plan | None) -> str:
    """Why experts are in the memory of several devices, though nobody asked for it."""
    rate_then = f"{shared.predicted_tokens_per_second:,.1f} tokens/s"
    if otherwise is None:
        return f"no device or pipeline has room for all experts: they are shared, {rate_then}"
    return (
        f"experts in the memory of several devices: {rate_then}, {otherwise.predicted_tokens_per_second:,.1f} if the"
        " ones that memory lacks were read from flash"
    )


def fixed_reasons(costs: Costs, chosen: Sequence[Placement]) -> list[str]:
    """What the caller's own split costs against the best single device."""
    holders = [d for d in range(len(costs.devices)) if costs.fits(d, costs.all_layers)]
    if not holders or len(chosen) == 1:
        return []
    best = min(holders, key=lambda d: (costs.compute_seconds(d, costs.all_layers), costs.devices[d].name))
    alone, split = costs.compute_seconds(best, costs.all_layers), costs.seconds_per_token(chosen)
    verdict = "faster" if alone < split else "slower"
    return [
        f"{costs.devices[best].name} alone would be {verdict}: {rate(alone)}; split as asked {rate(split)}"
    ]


def guessed_links(costs: Costs, chosen: Sequence[Placement]) -> list[str]:
    if len(chosen) < 2:
        return []
    names = [costs.devices[p.device].name for p in chosen if not costs.is_linked(p.device)]
    return [f"no link of {name} was measured: 100 ms and 1 MB/s assumed" for name in names]


def numeric_reasons(costs: Costs, chosen: Sequence[Placement]) -> list[str]:
    profiles = [costs.devices[p.device] for p in chosen]
    reasons = [
        f"{profile.name} is not row-invariant: fixed chunks, no shared batches"
        for profile in profiles
        if not profile.row_invariant
    ]
    classes = {profile.numeric_class for profile in profiles}
    if len(classes) > 1:
        reasons.append(f"{len(classes)} numeric classes: tokens depend on which layers are where")
        reasons += [
            f"layers {placement.layers} are computed by {profile.numeric_class}"
            for placement, profile in zip(chosen, profiles, strict=True)
        ]
    return reasons


def format_reasons(model: ModelProfile, stages: int) -> list[str]:
    """What rows are between layers, and what a token costs on a link; how keys and values are kept."""
    return [*_wire_reasons(model, stages), *_kv_reasons(model)]


def _kv_reasons(model: ModelProfile) -> list[str]:
    if model.formats.kv == "fp32":
        return []
    size_bytes = model.kv_bytes_per_token_per_layer
    return [
        f"keys and values in {model.formats.kv}, {size_bytes:,} bytes a token and layer: {INT8_KV_AGREEMENT}"
    ]


def _wire_reasons(model: ModelProfile, stages: int) -> list[str]:
    wire, size_bytes = model.formats.wire, model.hidden_bytes_per_row
    cost = f", {size_bytes:,} bytes a token and hop" if stages > 1 else ""
    if wire == "fp32":
        return [f"rows travel in full precision (fp32){cost}"] if stages > 1 else []
    reasons = [f"rows are rounded to {wire} after every layer, cut or not{cost}"]
    if wire == "int8":
        reasons.append(f"int8 between layers is approximate: {INT8_AGREEMENT}")
    return reasons


def excluded_auto(costs: Costs, found: Found, chosen: Sequence[Placement]) -> dict[str, str]:
    """Why each of the others is left out."""
    used = {placement.device for placement in chosen}
    best = costs.seconds_per_token(chosen)
    reasons = {}
    for device, profile in enumerate(costs.devices):
        if device in used:
            continue
        alone = costs.all_layers
        if not holds_any_layer(costs, device):
            reasons[profile.name] = too_small_for_any(costs, device)
        elif device in found.seconds_with:
            reasons[profile.name] = (
                f"it would slow the pipeline: {rate(found.seconds_with[device])} at best with it,"
                f" {rate(best)} without"
            )
        elif len(chosen) == 1 and costs.fits(device, alone):
            seconds = costs.compute_seconds(device, alone)
            reasons[profile.name] = f"alone it would reach {rate(seconds)}, {rate(best)} without it"
        else:
            reasons[profile.name] = "no faster pipeline with it was found"
    return reasons


def excluded_fixed(costs: Costs, chosen: Sequence[Placement], considered: Sequence[int]) -> dict[str, str]:
    used = {placement.device for placement in chosen}
    reasons = {}
    for device, profile in enumerate(costs.devices):
        if device in used:
            continue
        if device not in considered:
            reasons[profile.name] = "spare: the split names other devices"
        elif not holds_any_layer(costs, device):
            reasons[profile.name] = too_small_for_any(costs, device)
        elif len(chosen) == costs.model.num_layers:
            reasons[profile.name] = f"spare: the model has only {costs.model.num_layers} layers"
        else:
            reasons[profile.name] = "spare: the split needs no more devices"
    return reasons


def holds_any_layer(costs: Costs, device: int) -> bool:
    return any(costs.fits(device, LayerRange(k, k)) for k in range(costs.model.num_layers))


def too_small_for_any(costs: Costs, device: int) -> str:
    least = min(costs.needed_bytes(LayerRange(k, k)) for k in range(costs.model.num_layers))
    profile = costs.devices[device]
    return (
        f"too little memory for one layer: it has {mebibytes(profile.memory_free_bytes)},"
        f" the smallest needs {mebibytes(least)} with KV"
    )


def does_not_fit(costs: Costs, considered: Sequence[int]) -> PlanError:
    """What is missing, in bytes where it is bytes."""
    needed = costs.needed_bytes(costs.all_layers)
    offered = sum(costs.devices[device].memory_free_bytes for device in considered)
    hint = "add a device, raise --memory, ask for less context, or export with --weights int4"
    devices = f"{len(considered)} device{'s' if len(considered) != 1 else ''}"
    if offered < needed:
        return PlanError(
            f"the model needs {mebibytes(needed)} for weights and KV, {devices} offer {mebibytes(offered)}:"
            f" {needed - offered} bytes short",
            hint=hint,
        )
    rooms = sorted((costs.devices[device].memory_free_bytes for device in considered), reverse=True)
    tightest = max(range(costs.model.num_layers), key=lambda k: costs.needed_bytes(LayerRange(k, k)))
    layer = LayerRange(tightest, tightest)
    return PlanError(
        f"no cut fits: {devices} offer {mebibytes(offered)} of the {mebibytes(needed)} needed, but layers can't be"
        f" divided; layer {tightest} alone needs {mebibytes(costs.needed_bytes(layer))}, the rooms are"
        f" {', '.join(mebibytes(room) for room in rooms[:4])}",
        hint=hint,
    )
