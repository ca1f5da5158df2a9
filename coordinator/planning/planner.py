"""`place` makes a plan, `replan` mends one. Pure: values in, a Plan with its reasons out.

Knows: what auto, even and explicit ranges mean. Does not know: clocks, sockets, how profiles were measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from coordinator.planning import explain
from coordinator.planning.costs import Costs, Placement
from coordinator.planning.fixed import named_devices, place_even, place_ranges
from coordinator.planning.helped import place_shared
from coordinator.planning.model import DeviceProfile, Links, ModelProfile, Plan, Split
from coordinator.planning.search import search
from edge_runtime.errors import PlanError

GAIN = 1.2  # how much faster another plan must be predicted to load it in the place of one that serves


def place(devices: Sequence[DeviceProfile], links: Links, model: ModelProfile, split: Split) -> Plan:
    """The plan for these devices, in joining order. Raises PlanError with what is missing."""
    if not devices:
        raise PlanError("there is no device to plan for", hint="pair one: `edge-runtime devices --help`")
    if model.num_layers == 0:
        raise PlanError("the model has no layers")
    if split.kind == "auto":
        return _place_auto_or_share(devices, links, model, split)
    if split.kind == "even":
        return _place_even(devices, links, model, split)
    if split.kind == "ranges":
        return _place_ranges(devices, links, model, split)
    if split.kind == "experts":
        return place_shared(devices, links, model, split)
    raise PlanError(
        f"there is no split {split.kind!r}", hint="use auto, even, experts, or ranges such as 0-3,4-7"
    )


def replan(
    previous: Plan, devices: Sequence[DeviceProfile], links: Links, model: ModelProfile, split: Split
) -> Plan:
    """After a member was lost: survivors keep their layers, a spare of the same numeric class takes the lost ones.

    Where that can't be done, a fresh plan over whoever is there.
    """
    mended = _mended(previous, devices, links, model)
    if mended is not None:
        return mended
    present = {device.name for device in devices}
    return place(
        devices,
        links,
        model,
        replace(split, devices=tuple(name for name in split.devices if name in present)),
    )


def improved(
    previous: Plan, devices: Sequence[DeviceProfile], links: Links, model: ModelProfile, split: Split
) -> Plan | None:
    """A plan that is worth a reload while nobody waits, or None.

    The split that was asked for, where `previous` is a fallback; else what is GAIN times as fast on today's figures.
    """
    if split.kind != "auto" and not previous.is_fallback:
        return None
    try:
        plan = place(devices, links, model, split)
    except PlanError:
        return None
    same_stages = [(s.device_id, s.layers) for s in plan.stages] == [
        (s.device_id, s.layers) for s in previous.stages
    ]
    if same_stages and plan.experts == previous.experts:
        return None
    if split.kind != "auto":
        return replace(plan, reasons=("the split that was asked for is possible again", *plan.reasons))
    before = (
        previous.predicted_tokens_per_second if previous.holders else _today(previous, devices, links, model)
    )
    if before is None or plan.predicted_tokens_per_second < GAIN * before:
        return None
    reason = (
        f"planned again while nobody waited: {plan.predicted_tokens_per_second:,.1f} tokens/s predicted,"
        f" {before:,.1f} before (at least {GAIN - 1:.0%} more is worth a reload)"
    )
    return replace(plan, reasons=(reason, *plan.reasons))


def _today(
    previous: Plan, devices: Sequence[DeviceProfile], links: Links, model: ModelProfile
) -> float | None:
    """Tokens per second of its placements, as predicted from what is measured now."""
    index = {device.device_id: item for item, device in enumerate(devices)}
    if any(stage.device_id not in index for stage in previous.stages):
        return None
    costs = Costs(tuple(devices), links, model)
    seconds = costs.seconds_per_token([Placement(index[s.device_id], s.layers) for s in previous.stages])
    return 1 / seconds if seconds > 0 else float("inf")


def _place_auto_or_share(
    devices: Sequence[DeviceProfile], links: Links, model: ModelProfile, split: Split
) -> Plan:
    """Where experts would have to be read from flash, or would not fit at all, other devices' memory may be faster."""
    problem: PlanError | None = None
    plan: Plan | None = None
    try:
        plan = _place_auto(devices, links, model, split)
    except PlanError as error:
        problem = error
    if plan is not None and not any(stage.expert_cache_bytes for stage in plan.stages):
        return plan
    try:
        shared = place_shared(devices, links, model, replace(split, devices=()))
    except PlanError:
        shared = None
    if shared is None or (
        plan is not None and shared.predicted_tokens_per_second < GAIN * plan.predicted_tokens_per_second
    ):
        if plan is None:
            assert problem is not None
            raise problem
        return plan
    reason = explain.shared_reason(shared, plan)
    return replace(shared, reasons=(reason, *shared.reasons))


def _place_auto(devices: Sequence[DeviceProfile], links: Links, model: ModelProfile, split: Split) -> Plan:
    # By name, so that equal choices do not depend on who joined first.
    named = [devices[item] for item in named_devices(devices, split)]
    costs = Costs(tuple(sorted(named, key=lambda device: (device.name, device.device_id))), links, model)
    found = search(costs)
    chosen = found.single or found.pipeline
    if chosen is None:
        raise explain.does_not_fit(costs, range(len(costs.devices)))
    if found.pipeline and costs.seconds_per_token(found.pipeline) < costs.seconds_per_token(chosen) * (
        1 - 1e-9
    ):
        chosen = found.pipeline
    excluded = explain.excluded_auto(costs, found, chosen)
    spare = {device.name: "spare: the split names other devices" for device in devices if device not in named}
    return plan_of(costs, chosen, explain.auto_reasons(costs, found, chosen), {**excluded, **spare})


def _place_even(devices: Sequence[DeviceProfile], links: Links, model: ModelProfile, split: Split) -> Plan:
    costs = Costs(tuple(devices), links, model)
    order = named_devices(devices, split)
    if not split.devices:
        order.sort(key=lambda item: (devices[item].name, devices[item].device_id))
    chosen = place_even(costs, order)
    if chosen is None:
        raise explain.does_not_fit(costs, order)
    counts = ", ".join(str(len(placement.layers)) for placement in chosen)
    reasons = [f"split evenly as asked: {counts} layers", *explain.fixed_reasons(costs, chosen)]
    return plan_of(costs, chosen, reasons, explain.excluded_fixed(costs, chosen, order))


def _place_ranges(devices: Sequence[DeviceProfile], links: Links, model: ModelProfile, split: Split) -> Plan:
    costs = Costs(tuple(devices), links, model)
    order = named_devices(devices, split)
    chosen = place_ranges(costs, order, split)
    ranges = ", ".join(str(placement.layers) for placement in chosen)
    reasons = [f"layer ranges as asked: {ranges}", *explain.fixed_reasons(costs, chosen)]
    return plan_of(costs, chosen, reasons, explain.excluded_fixed(costs, chosen, order))


def _mended(
    previous: Plan, devices: Sequence[DeviceProfile], links: Links, model: ModelProfile
) -> Plan | None:
    if previous.holders or not previous.stages or previous.stages[-1].layers.last != model.num_layers - 1:
        return None
    costs = Costs(tuple(devices), links, model)
    index = {device.device_id: item for item, device in enumerate(devices)}
    owners = [index.get(stage.device_id) for stage in previous.stages]
    lost = [item for item, owner in enumerate(owners) if owner is None]
    if len(lost) == len(owners):
        return None
    spares = [item for item in range(len(devices)) if item not in owners]
    for item in lost:
        stage = previous.stages[item]
        able = [
            spare
            for spare in spares
            if devices[spare].numeric_class == stage.numeric_class and costs.fits(spare, stage.layers)
        ]
        if not able:
            return None
        taker = min(able, key=lambda spare: costs.compute_seconds(spare, stage.layers))
        owners[item] = taker
        spares.remove(taker)
    chosen = tuple(
        Placement(owner, stage.layers)
        for owner, stage in zip(owners, previous.stages, strict=True)
        if owner is not None
    )
    if not all(costs.fits(placement.device, placement.layers) for placement in chosen):
        return None
    reasons = [
        f"{devices[chosen[item].device].name} takes layers {previous.stages[item].layers}"
        f" over from {previous.stages[item].name}; the others keep theirs"
        for item in lost
    ] or ["every device keeps its layers"]
    excluded = {devices[spare].name: "spare: the pipeline was mended without it" for spare in spares}
    return plan_of(costs, chosen, reasons, excluded)


def plan_of(
    costs: Costs, chosen: Sequence[Placement], reasons: Sequence[str], excluded: Mapping[str, str]
) -> Plan:
    """These placements as a plan, with what they cost."""
    stages = costs.stages(chosen)
    seconds = costs.seconds_per_token(chosen)
    chunk = costs.chunk_tokens(chosen)
    return Plan(
        stages=stages,
        predicted_tokens_per_second=1 / seconds if seconds > 0 else float("inf"),
        predicted_prefill_tokens_per_second=costs.prefill_tokens_per_second(chosen, chunk),
        reasons=(
            *reasons,
            *explain.stage_reasons(stages),
            *explain.guessed_links(costs, chosen),
            *explain.numeric_reasons(costs, chosen),
            *explain.format_reasons(costs.model, len(chosen)),
        ),
        excluded=excluded,
        prefill_chunk_tokens=chunk,
        formats=costs.model.formats,
    )
