"""Ids with drafts against the ids of the plain loop: drafters, windows, samplings, faults, one by one and together.

Knows: settings and how ids are compared. Does not know: how they come about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from benchmarks.simulator.model import DialDrafter, plain_loop
from benchmarks.simulator.world import Faults, Setting, World
from edge_runtime.core import SamplingParams
from edge_runtime.speculative.controller import Limits
from edge_runtime.speculative.drafters.base import Drafter
from edge_runtime.speculative.drafters.suffix import SuffixDrafter

SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "sampled": SamplingParams(temperature=0.8, seed=71),
    "filtered": SamplingParams(temperature=1.2, top_k=20, top_p=0.9, seed=72),
    "penalised": SamplingParams(temperature=1.0, presence_penalty=0.4, frequency_penalty=0.2, seed=73),
}
ALL_AT_ONCE = Faults(lost=0.1, repeated=0.1, late=0.2, reconnect_seconds=0.9, replan_seconds=2.3)
FAULTS = {
    "none": Faults(),
    "lost": Faults(lost=0.05),
    "repeated and overtaken": Faults(repeated=0.2, late=0.2),
    "reconnected": Faults(reconnect_seconds=0.7),
    "replanned": Faults(replan_seconds=1.3),
    "all at once": ALL_AT_ONCE,
}
DRAFTERS = ("right", "wrong", "mixed", "suffix")
LIMITS = (
    Limits(),
    Limits(max_window=3),
    Limits(max_width=3),
    Limits(max_window=16, max_chunk=1),
    Limits(max_window=6, max_width=2),
)


@dataclass(frozen=True, slots=True)
class Compared:
    """Of one run. `accepted` of the tokens came from drafts; `poisoned` rows were NaN before they were written anew."""

    tokens: int
    differing: int
    accepted: int
    leases: int
    poisoned: int = 0


def cases(new_tokens: int) -> Iterator[tuple[str, Setting]]:
    """A name and a setting each; every pair of sampling and fault, with drafters, limits and places taking turns."""
    for number, (sampling, faults) in enumerate(product(SAMPLINGS, FAULTS)):
        for turn in range(2):
            at = 2 * number + turn
            drafter = DRAFTERS[(at + at // 4) % len(DRAFTERS)]
            topology = ("ring", "site")[turn]
            yield (
                f"{drafter}, {sampling}, {faults}, {topology}",
                Setting(
                    new_tokens=new_tokens,
                    topology=topology,
                    stages=3,
                    loop_delay_seconds=0.06,
                    acceptance={"right": 1.0, "wrong": 0.0}.get(drafter, 0.8),
                    sampling=SAMPLINGS[sampling],
                    limits=LIMITS[at % len(LIMITS)],
                    faults=replace(FAULTS[faults], seed=at),
                ),
            )


def compare(drafter: str, setting: Setting) -> Compared:
    """Raises TimeoutError where the run stands still."""
    wanted = plain_loop(setting.prompt, setting.max_rows, setting.sampling)
    return compared(World(setting, drafter_of(drafter, setting)).run(), wanted)


def compared(world: World, wanted: Sequence[int]) -> Compared:
    """Of a world that has run, with `wanted`: the prompt and the plain ids."""
    given = len(world.setting.prompt)
    assert world.device is not None
    return Compared(
        world.setting.new_tokens,
        differing(world.ids[given:], wanted[given:]),
        world.device.loop.counts.accepted,
        world.leases,
        sum(stage.rows_poisoned for stage in world.stages.values()),
    )


def drafter_of(name: str, setting: Setting) -> Drafter:
    if name == "suffix":
        return SuffixDrafter()
    return DialDrafter(setting.acceptance, setting.sampling, setting.faults.seed)


def figures(new_tokens: int, say: Callable[[str], None]) -> dict[str, int]:
    done = []
    for name, setting in cases(new_tokens):
        one = compare(name.partition(",")[0], setting)
        done.append(one)
        say(
            f"{name}: {one.tokens} ids, {one.accepted} drafted, {one.leases} new leases, {one.differing} differ"
        )
    return totals(done, "identity")


def totals(done: Sequence[Compared], name: str) -> dict[str, int]:
    """Sums over the runs; those that say how hard it was made carry `name`."""
    return {
        "identical_tokens": sum(one.tokens - one.differing for one in done),
        "differing_tokens": sum(one.differing for one in done),
        f"{name}_drafted_tokens": sum(one.accepted for one in done),
        f"{name}_new_leases": sum(one.leases for one in done),
    }


def differing(ids: Sequence[int], wanted: Sequence[int]) -> int:
    """Missing ones, too."""
    same = sum(one == other for one, other in zip(ids, wanted, strict=False))
    return max(len(ids), len(wanted)) - same
