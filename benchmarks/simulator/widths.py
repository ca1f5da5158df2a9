"""What side rows bring: tokens per second with one, two and three guesses for a position, same drafts, same luck.

    python -m benchmarks.simulator.widths [--tokens 800] [--rescue 0.4]

Knows: worlds of one acceptance and several delays. Does not know: how ids travel.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from benchmarks.simulator.model import plain_loop
from benchmarks.simulator.world import Faults, Setting, World
from edge_runtime.speculative.controller import Limits

WIDTHS = (1, 2, 3)
DELAYS_SECONDS = (0.05, 0.1, 0.2)
LUCK = (0, 1)


@dataclass(frozen=True, slots=True)
class WidthRate:
    """Means over LUCK. `rows_per_token`: started on one stage."""

    tokens_per_second: float
    rescued_fraction: float  # of misses
    rows_per_token: float
    up_bytes_per_token: float

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_second:.1f} tokens/s, {self.rescued_fraction:.2f} of misses saved, "
            f"{self.rows_per_token:.1f} rows and {self.up_bytes_per_token:.1f} bytes up per token"
        )


def measure(
    topology: str, acceptance: float, rescue: float, delay: float, width: int, tokens: int
) -> WidthRate:
    """Raises AssertionError where an id is not the plain loop's, or a stage was left without rows."""
    rates, saved, rows, sent = 0.0, 0.0, 0.0, 0.0
    for luck in LUCK:
        setting = Setting(
            new_tokens=tokens,
            topology=topology,
            loop_delay_seconds=delay,
            acceptance=acceptance,
            rescue=rescue,
            limits=Limits(max_width=width),
            faults=Faults(seed=luck),
        )
        world = World(setting).run()
        assert world.device is not None
        assert world.ids == plain_loop(setting.prompt, setting.max_rows, setting.sampling)
        assert world.sessions == 1
        counts = world.device.loop.counts
        rates += world.tokens_per_second
        saved += counts.rescued / counts.misses
        rows += world.rows_run / setting.stages / tokens
        sent += world.device.sent_bytes / tokens
    count = len(LUCK)
    return WidthRate(rates / count, saved / count, rows / count, sent / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=800)
    parser.add_argument("--rescue", type=float, default=0.4)
    parser.add_argument("--acceptance", type=float, default=0.74)
    options = parser.parse_args()
    for topology in ("ring", "site"):
        for delay in DELAYS_SECONDS:
            for width in WIDTHS:
                rate = measure(topology, options.acceptance, options.rescue, delay, width, options.tokens)
                print(f"{topology} R={delay * 1000:3.0f} ms, width {width}: {rate}", flush=True)


if __name__ == "__main__":
    main()
