"""Several pipelines at once, over disjoint devices: more sessions a second, and one to go on with when another dies.

With `replicas = 0` (auto) the fastest pipeline comes first and others are added only where they cost it nothing: on
hosts that no pipeline uses (measured profiles can't tell that two agents share cores), in the same numeric class (a
request must not mean something else by chance), at a speed worth having. With `replicas = N` devices are divided so
that all N exist and together bring the most tokens per second.

Knows: which devices are left, and what each set of them can do. Does not know: how one pipeline is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache

from coordinator.planning.costs import Costs, Placement
from coordinator.planning.explain import rate
from coordinator.planning.fixed import named_devices
from coordinator.planning.model import DeviceProfile, Links, ModelProfile, Plan, Split
from coordinator.planning.planner import place, plan_of
from coordinator.planning.search import MAX_EXACT, best_of_every_set
from edge_runtime.errors import PlanError

LEAST_SPEED_SHARE = (
    0.25  # of the first pipeline's: an automatic replica that is slower would be a bad surprise
)
_LOOPBACK = ("127.", "localhost", "[::1]", "::1")


def place_all(
    devices: Sequence[DeviceProfile], links: Links, model: ModelProfile, split: Split
) -> tuple[Plan, ...]:
    """The first pipeline and its replicas, fastest first. Raises PlanError where not even one fits."""
    plans = _first_plans(devices, links, model, split)
    refusal = ""
    while split.replicas == 0 or len(plans) < split.replicas:
        try:
            plans = (*plans, place_another(plans, devices, links, model, split))
        except PlanError as problem:
            refusal = problem.message
            break
    return _explained(plans, devices, split, refusal)


def _explained(
    plans: Sequence[Plan], devices: Sequence[DeviceProfile], split: Split, refusal: str
) -> tuple[Plan, ...]:
    """With why there are as many as there are; nobody who serves in one of them is left out."""
    used = {stage.name for plan in plans for stage in plan.stages}
    used |= {holder.name for plan in plans for holder in plan.holders}
    told = []
    for number, plan in enumerate(plans, 1):
        reasons = list(plan.reasons)
        if len(plans) > 1:
            together = sum(each.predicted_tokens_per_second for each in plans)
            reasons.insert(
                0, f"pipeline {number} of {len(plans)} over other devices: {together:,.1f} tokens/s in all"
            )
        if number == 1 and refusal and (split.replicas > len(plans) or _has_spares(plan, used)):
            reasons.append(f"no {'further ' if len(plans) > 1 else ''}replica: {refusal}")
        why = {device.name: refusal or "no pipeline needs it" for device in devices if number == 1}
        excluded = {name: reason for name, reason in {**why, **plan.excluded}.items() if name not in used}
        told.append(replace(plan, reasons=tuple(reasons), excluded=excluded))
    return tuple(told)


def _has_spares(plan: Plan, used: set[str]) -> bool:
    return any(name not in used for name in plan.excluded)


def place_another(
    plans: Sequence[Plan], devices: Sequence[DeviceProfile], links: Links, model: ModelProfile, split: Split
) -> Plan:
    """One more beside `plans`, over the devices they don't use. Raises PlanError that says why not."""
    taken = {device_id for plan in plans for device_id in plan.everyone}
    free = [device for device in devices if device.device_id not in taken]
    if not free:
        raise PlanError("every device is in a pipeline already")
    if split.replicas == 0:
        if split.kind != "auto":
            raise PlanError("the split was asked for as it is", hint="ask for replicas, too")
        free = _apart(free, [device for device in devices if device.device_id in taken])
        classes = {stage.numeric_class for stage in plans[0].stages}
        free = [device for device in free if device.numeric_class in classes]
        if not free:
            raise PlanError("the devices that stand by are of another numeric class")
    # Names are for the first pipeline: whoever is not in it may be in another.
    plan = place(free, links, model, replace(split, devices=()))
    if split.replicas == 0:
        _check_worth(plan, plans[0])
    return plan


def _apart(free: Iterable[DeviceProfile], members: Iterable[DeviceProfile]) -> list[DeviceProfile]:
    """Those that surely share no machine with the members."""
    hosts = {machine_of(member.host) for member in members}
    apart = [
        device for device in free if device.host and "" not in hosts and machine_of(device.host) not in hosts
    ]
    if not apart:
        raise PlanError("the devices that stand by may share a machine with it, and would slow it")
    return apart


def machine_of(host: str) -> str:
    return "127.0.0.1" if host.startswith(_LOOPBACK) else host


def _check_worth(plan: Plan, first: Plan) -> None:
    if plan.class_map != first.class_map:
        raise PlanError("the devices that stand by would give layers another numeric class")
    if plan.predicted_tokens_per_second < LEAST_SPEED_SHARE * first.predicted_tokens_per_second:
        raise PlanError(
            f"it would reach {plan.predicted_tokens_per_second:,.1f} tokens/s,"
            f" the first pipeline {first.predicted_tokens_per_second:,.1f}"
        )


# ---------------------------------------------------------------- a number that was asked for


def _first_plans(
    devices: Sequence[DeviceProfile], links: Links, model: ModelProfile, split: Split
) -> tuple[Plan, ...]:
    if split.replicas < 2:
        return (place(devices, links, model, split),)
    if split.kind == "experts":
        return (place(devices, links, model, split),)  # others come one by one, out of whoever is left
    if split.kind == "auto":
        return _divided(devices, links, model, split) or (place(devices, links, model, split),)
    return _dealt(devices, links, model, split)


def _divided(
    devices: Sequence[DeviceProfile], links: Links, model: ModelProfile, split: Split
) -> tuple[Plan, ...]:
    """As many pipelines as asked for or possible, with the most tokens per second together; () for many devices."""
    named = sorted(
        (devices[item] for item in named_devices(devices, split)), key=lambda d: (d.name, d.device_id)
    )
    if len(named) > MAX_EXACT:
        return ()
    costs = Costs(tuple(named), links, model)
    chosen = _best_partition(best_of_every_set(costs), split.replicas)
    chosen = sorted(chosen, key=costs.seconds_per_token)
    return tuple(plan_of(costs, placements, _reasons(costs, placements), {}) for placements in chosen)


def _reasons(costs: Costs, placements: Sequence[Placement]) -> list[str]:
    names = " and ".join(costs.devices[placement.device].name for placement in placements)
    return [
        f"devices were divided for the replicas asked for: {names} {rate(costs.seconds_per_token(placements))}"
    ]


def _best_partition(
    found: Mapping[int, tuple[float, tuple[Placement, ...]]], wanted: int
) -> list[tuple[Placement, ...]]:
    """Disjoint sets out of `found` (bit set of devices -> seconds, placements): most of them, then fastest together."""
    everyone = 0
    for used in found:
        everyone |= used

    @cache
    def best(left: int, count: int) -> tuple[int, float, tuple[int, ...]]:
        """(pipelines, tokens per second together, their sets) out of the devices `left`."""
        if not left or not count:
            return (0, 0.0, ())
        lowest = left & -left
        options = [best(left & ~lowest, count)]  # without this device
        for used, (seconds, _) in found.items():
            if used & lowest and used & ~left == 0:
                number, total, sets = best(left & ~used, count - 1)
                options.append((number + 1, total + 1 / max(seconds, 1e-9), (used, *sets)))
        return max(options, key=lambda option: option[:2])

    return [found[used][1] for used in best(everyone, wanted)[2]]


def _dealt(
    devices: Sequence[DeviceProfile], links: Links, model: ModelProfile, split: Split
) -> tuple[Plan, ...]:
    """A split that was asked for, on one group of devices after the other, in their order."""
    order = [devices[item] for item in named_devices(devices, split)]
    order += [device for device in devices if device not in order]
    size = len(split.ranges) if split.kind == "ranges" else -(-len(order) // split.replicas)
    if not split.devices and split.kind == "even":
        order.sort(key=lambda device: (device.name, device.device_id))
    plans: list[Plan] = []
    for number in range(split.replicas):
        group = order[number * size : (number + 1) * size]
        names = tuple(device.name for device in group)
        try:
            plans.append(place(group, links, model, replace(split, devices=names)))
        except PlanError:
            if not plans:
                return (place(devices, links, model, split),)
            break
    return tuple(plans)
