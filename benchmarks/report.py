"""What every benchmark says about itself: the machine, the model, the settings, the load; and its last line as JSON.

Knows: text and JSON. Does not know: what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

Figures = dict[str, float | int | None]

_STARTED = time.monotonic()


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The flags that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="only the JSON object on stdout")
    parser.add_argument("--model", choices=("llama-1b", "tiny"), default="llama-1b", help="tiny is for tests")
    parser.add_argument(
        "--rounds", type=int, default=0, metavar="N", help="of interleaved runs (0: as planned)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="to wait, in all, for other programs to leave the machine alone",
    )
    parser.add_argument("--no-peers", action="store_true", help="leave out the other programs")
    return parser


def say(line: str) -> None:
    """Progress: on stderr, with the seconds since the start."""
    print(f"[{time.monotonic() - _STARTED:6.1f} s] {line}", file=sys.stderr, flush=True)


class Report:
    """`with Report(…) as report:` prints the heading; `report.line(…)` a finding; `report.end(figures)` the JSON."""

    def __init__(self, title: str, *, only_json: bool, **settings: object) -> None:
        self._only_json = only_json
        self._load_before = load_average()
        self.line(f"# {title}")
        self.line(machine())
        self.line(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items()))

    def line(self, text: str) -> None:
        print(text, file=sys.stderr if self._only_json else sys.stdout, flush=True)

    def end(self, figures: Mapping[str, object]) -> None:
        """The figures beside the load they were measured under: others' work on this machine shows there."""
        after = load_average()
        self.line(f"load average {self._load_before:.2f} before, {after:.2f} after")
        rounded = {name: _rounded(value) for name, value in figures.items()}
        loads = {"load_before": self._load_before, "load_after": after}
        print(json.dumps({**rounded, **loads, "cpu": cpu_name(), "cores": os.cpu_count()}), flush=True)


def machine() -> str:
    return (
        f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, ONNX Runtime {version('onnxruntime')}, "
        f"edge-runtime {version('edge-runtime')}"
    )


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def load_average() -> float:
    """Of the last minute; a benchmark's own work counts, too."""
    return round(os.getloadavg()[0], 2)


def _rounded(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value
