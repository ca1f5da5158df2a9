"""What the planner predicts and what comes: one cluster per plan, the coordinator's own prediction beside HTTP's clock.

Predictions are read as the plan was made, from what devices measured when they started, and again before each measured
request (one has gone before, from which the coordinator knows how long steps take). The error is that of the median
over requests of prediction / speed. Knows: a list of plans over small devices. Does not know: how predictions are made.
"""

from __future__ import annotations

import asyncio
import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.clusters import Running, device, running
from benchmarks.models import Model
from benchmarks.other_work import Patience
from benchmarks.report import say
from benchmarks.samples import Measure, in_turns
from benchmarks.streams import Prompts, stream
from edge_runtime import DeviceSpec

RUNS = 3
HEARTBEATS_SECONDS = 2.5  # in which every device has said how long its steps take


@dataclass(frozen=True)
class PlanResult:
    """`requests`: (predicted just before, measured), tokens/s of one session."""

    name: str
    first_predicted: float  # before any request
    requests: tuple[tuple[float, float], ...]

    @property
    def predicted(self) -> float:
        return statistics.median(predicted for predicted, _ in self.requests)

    @property
    def measured(self) -> float:
        return statistics.median(measured for _, measured in self.requests)

    @property
    def error(self) -> float:
        return statistics.median(predicted / measured for predicted, measured in self.requests) - 1

    def __str__(self) -> str:
        return (
            f"plan {self.name:44} predicted {self.predicted:6.2f} (at first {self.first_predicted:6.2f}), "
            f"measured {self.measured:6.2f}, {self.error:+.1%}"
        )


@dataclass
class Foretold:
    """A measurement of a cluster's speed, and what was predicted of it each time; every try of it counts."""

    cluster: Running
    measure: Measure
    requests: list[tuple[float, float]] = field(default_factory=list)

    async def once(self) -> float:
        before = await predicted(self.cluster)
        self.requests.append((before, await self.measure()))
        return self.requests[-1][1]


def plan_errors(plans: Sequence[PlanResult]) -> list[float]:
    return [abs(plan.error) for plan in plans]


def first_plan_errors(plans: Sequence[PlanResult]) -> list[float]:
    return [abs(plan.first_predicted / plan.measured - 1) for plan in plans]


async def predicted(cluster: Running) -> float:
    """Tokens per second of one session, as the coordinator has it now."""
    return float((await cluster.plan())["predicted_tokens_per_second"])


async def measure_plans(model: Model, prompts: Prompts, patience: Patience) -> list[PlanResult]:
    """Plans that differ in devices, threads, cuts and links, each in a cluster of its own."""
    results = []
    for name, devices, split in _plans(model):
        await patience.wait()  # devices measure themselves when they start
        async with running(model, devices, split=split) as cluster:
            at_first = await predicted(cluster)
            measure = functools.partial(_once, cluster, model, prompts)
            await measure()  # warm
            await asyncio.sleep(HEARTBEATS_SECONDS)
            foretold = Foretold(cluster, measure)
            await in_turns({name: foretold.once}, RUNS, patience)
        results.append(PlanResult(name, at_first, tuple(foretold.requests)))
        say(str(results[-1]))
    return results


async def _once(cluster: Running, model: Model, prompts: Prompts) -> float:
    prompt = prompts.new(model.decode_prompt_tokens)
    return (await stream(cluster.client, prompt, model.decode_tokens)).decode_tokens_per_second


def _plans(model: Model) -> list[tuple[str, list[DeviceSpec], str | list[tuple[int, int]]]]:
    last = model.shape.layers - 1
    quarter, half = (last + 1) // 4, (last + 1) // 2

    def one(name: str, *, reachable: bool = True) -> DeviceSpec:
        return device(model, name, 1, reachable=reachable)

    two = device(model, "wide", 2)
    return [
        ("one device, 2 threads", [two], "auto"),
        ("the planner's choice of 1, 1 and 2 threads", [one("a"), one("b"), two], "auto"),
        ("two devices, a quarter and the rest", [one("a"), one("b")], [(0, quarter - 1), (quarter, last)]),
        (
            "two devices, all but a quarter and the rest",
            [one("a"), one("b")],
            [(0, last - quarter), (last - quarter + 1, last)],
        ),
        ("two devices, 2 threads and 1", [two, one("a")], [(0, half - 1), (half, last)]),
        ("three devices, evenly", [one("a"), one("b"), one("c")], "even"),
        ("two devices, through the relay", [one("a", reachable=False), one("b", reachable=False)], "even"),
    ]
