"""Rates over a grid of acceptance and delay, against the formula of the streamed pipeline, plain decoding and others.

    limit(a, L) = 1 / (tau + (1 - a) (L + (c - 1) Td / 2))      tau = max(Td, s(c) / c), c = ceil(s / Td)

a is the acceptance asked for or, where it is higher, the one that came out, so that luck never flatters.

Knows: worlds and what they cost. Does not know: how ids travel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from benchmarks.simulator.baselines import Costs, best, pearl, synchronous
from benchmarks.simulator.world import ROW_SECONDS, STEP_SECONDS, Setting, World

ACCEPTANCES = (0.74, 0.85, 0.93)
DELAYS_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.2)
DRAFT_SECONDS = 0.004  # a laptop
TOPOLOGIES = ("ring", "site")


@dataclass(frozen=True, slots=True)
class Rate:
    """One cell, in tokens per second."""

    topology: str
    acceptance: float
    delay_seconds: float
    ours: float
    limit: float
    plain: float  # streamed by a target that decodes by itself
    loop: float  # one token per loop: sampled beyond the delay
    synchronous: float
    pearl: float
    late_fraction: float
    wasted_fraction: float

    def line(self) -> str:
        return (
            f"{self.topology} a={self.acceptance} R={self.delay_seconds * 1000:3.0f} ms: {self.ours:5.1f} tokens/s, "
            f"{self.ours / self.limit:.2f} of the limit, {self.ours / self.loop:4.1f} x loop, "
            f"{self.ours / self.plain:.2f} x plain, {self.ours / self.synchronous:.2f} x in turns, "
            f"{self.ours / self.pearl:.2f} x PEARL; "
            f"rows wasted {self.wasted_fraction:.2f}, late {self.late_fraction:.3f}"
        )


def limit(acceptance: float, loop_seconds: float) -> float:
    """Tokens per second of the streamed pipeline (research note, section 5)."""
    chunk = ceil(STEP_SECONDS / DRAFT_SECONDS)
    tau = max(DRAFT_SECONDS, (STEP_SECONDS + chunk * ROW_SECONDS) / chunk)
    return 1 / (tau + (1 - acceptance) * (loop_seconds + (chunk - 1) * DRAFT_SECONDS / 2))


def measure(topology: str, acceptance: float, delay: float, tokens: int) -> Rate:
    setting = Setting(
        new_tokens=tokens,
        topology=topology,
        loop_delay_seconds=delay,
        acceptance=acceptance,
        draft_seconds=DRAFT_SECONDS,
    )
    world = World(setting).run()
    assert world.device is not None
    right = max(acceptance, 1 - world.device.loop.counts.misses / tokens)
    costs = Costs(right, delay, DRAFT_SECONDS, lambda rows: 4 * (STEP_SECONDS + rows * ROW_SECONDS))
    return Rate(
        topology,
        acceptance,
        delay,
        world.tokens_per_second,
        limit(right, world.loop_seconds),
        _plain(topology, delay),
        _plain("ring", delay),
        best(synchronous, costs)[0],
        best(pearl, costs)[0],
        world.rows_late / world.rows_run,
        1 - 4 * len(world.ids) / world.rows_run,
    )


def grid(tokens: int, say: Callable[[str], None]) -> list[Rate]:
    rates = []
    for topology in TOPOLOGIES:
        for acceptance in ACCEPTANCES:
            for delay in DELAYS_SECONDS:
                rates.append(measure(topology, acceptance, delay, tokens))
                say(rates[-1].line())
    return rates


def figures(rates: list[Rate]) -> dict[str, float]:
    """Under the names of the benchmark's JSON. "plain" is the ring's own turn where the delay lies inside it."""
    middle = next(
        rate for rate in rates if (rate.topology, rate.acceptance, rate.delay_seconds) == ("ring", 0.85, 0.1)
    )
    return {
        "sim_limit_fraction_min": min(rate.ours / rate.limit for rate in rates),
        "sim_vs_ar_min": min(rate.ours / rate.plain for rate in rates),
        "sim_speedup_a85_r100": middle.ours / middle.loop,
        "sim_vs_synchronous_min": min(rate.ours / rate.synchronous for rate in rates),
        "sim_vs_pearl_min": min(rate.ours / rate.pearl for rate in rates),
        "late_rows_fraction": max(rate.late_fraction for rate in rates),
        "sim_wasted_rows_fraction_a85_r100": middle.wasted_fraction,
    }


def _plain(topology: str, delay: float) -> float:
    setting = Setting(new_tokens=50, topology=topology, loop_delay_seconds=delay, draft_seconds=None)
    return World(setting).run().tokens_per_second
