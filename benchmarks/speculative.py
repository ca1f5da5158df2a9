"""Drafting far from the target: `python -m benchmarks.speculative [--json] [--only PART …] [--tokens N]`.

Parts: `simulator`, rates under a virtual clock with the real protocol code; `identity`, ids under faults there, and
`layers`, the same with real layers and samplers; `coupling` and `real`, which are benchmarks of their own
(`speculative_coupling`, `speculative_real`), run as people run them. A part that fails is said; its figures are null.

Knows: parts and the names of their figures. Does not know: how anything is measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec

from benchmarks import report
from benchmarks.models import TINY
from benchmarks.simulator import cpu_identity, identity, rates, saturation
from edge_runtime.bundle.bundle import Bundle

Figures = dict[str, float | int | None]

SHARED_SECONDS = 4.0  # simulated, of a target that many share
PROGRAM_SECONDS = 1800  # of a part that runs as a program
NAMES: dict[str, tuple[str, ...]] = {
    "simulator": (
        "sim_limit_fraction_min",
        "sim_vs_ar_min",
        "sim_speedup_a85_r100",
        "sim_vs_synchronous_min",
        "sim_vs_pearl_min",
        "sim_wasted_rows_fraction_a85_r100",
        "sim_saturated_wasted_rows_fraction",
        "sim_saturated_goodput_ratio_min",
        "sim_shared_goodput_ratio_min",
        "sim_beside_flood_fraction",
        "sim_late_rows_fraction",
    ),
    "identity": (
        "identical_tokens",
        "differing_tokens",
        "identity_drafted_tokens",
        "identity_new_leases",
    ),
    "layers": (
        "identical_tokens",
        "differing_tokens",
        "layers_drafted_tokens",
        "layers_new_leases",
        "layers_poisoned_rows",
    ),
    "coupling": ("coupling_efficiency_t1",),
    "real": (
        "real_speedup_code",
        "real_speedup_edit",
        "real_in_turns_speedup_code",
        "real_in_turns_speedup_edit",
        "real_speedup_known",
        "real_acceptance_code",
        "real_acceptance_edit",
        "bytes_up_per_token",
        "bytes_down_per_token",
        "socket_bytes_up_per_token",
        "socket_bytes_down_per_token",
        "ids_per_draft_frame",
        "wasted_rows_fraction",
        "real_late_rows_fraction",
        "identical_tokens",
        "differing_tokens",
    ),
}
ADDED = ("identical_tokens", "differing_tokens")  # of all parts that compare ids
LATE = "late_rows_fraction"  # the worse of simulated and real
LATE_PARTS = ("sim_late_rows_fraction", "real_late_rows_fraction")
LAYERS_TOKENS = 420  # of each request through real layers: 20 160 in all


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="only the JSON object on stdout")
    parser.add_argument("--only", nargs="+", choices=tuple(NAMES), default=tuple(NAMES), metavar="PART")
    parser.add_argument("--tokens", type=int, default=500, metavar="N", help="of each simulated request")
    return parser


def program(module: str) -> Figures:
    """The last line of a benchmark that runs as a program. Raises RuntimeError with what it said where it failed."""
    if find_spec(module) is None:
        raise RuntimeError("it is not part of this checkout")
    command = [sys.executable, "-m", module, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=PROGRAM_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"python -m {module} ended with status {done.returncode}; it says why above")
    found: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measured(part: str, tokens: int, line: Callable[[str], None]) -> Figures:
    match part:
        case "simulator":
            found: Figures = dict(rates.figures(rates.grid(tokens, line)))
            shared = saturation.figures(SHARED_SECONDS, line)
            return {f"sim_{LATE}": found.pop(LATE, None), **found, **shared}
        case "identity":
            return dict(identity.figures(tokens, line))
        case "layers":
            return dict(cpu_identity.figures(Bundle.open(TINY.bundle()), LAYERS_TOKENS, line))
        case _:
            return program(f"benchmarks.speculative_{part}")


def join(parts: dict[str, Figures]) -> Figures:
    """Every name of every part, null where its part gave none; compared ids add up."""
    joined: Figures = {name: None for names in NAMES.values() for name in names}
    for part, figures in parts.items():
        for name in NAMES[part]:
            value, before = figures.get(name), joined[name]
            if value is not None:
                joined[name] = value + before if name in ADDED and before is not None else value
    late = [value for name in LATE_PARTS if (value := joined[name]) is not None]
    return {**joined, LATE: max(late, default=None)}


def main() -> None:
    flags = arguments().parse_args()
    cells = len(rates.TOPOLOGIES) * len(rates.ACCEPTANCES) * len(rates.DELAYS_SECONDS)
    ours = report.Report(
        "Drafts on the device, verification far away",
        only_json=flags.json,
        parts=" ".join(flags.only),
        tokens=flags.tokens,
        simulated_cells=cells,
        simulated_target="4 stages of 10 ms + 0.05 ms a row",
        draft_ms=1000 * rates.DRAFT_SECONDS,
    )
    done: dict[str, Figures] = {}
    for part in flags.only:
        report.say(part)
        try:
            done[part] = measured(part, flags.tokens, ours.line)
        except (RuntimeError, TimeoutError, AssertionError, ValueError, subprocess.TimeoutExpired) as problem:
            ours.line(f"{part}: no figures: {problem}")
    ours.end(join(done))


if __name__ == "__main__":
    main()
