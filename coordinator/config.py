"""The settings of one coordinator, as one value.

Knows: names, defaults, and what the text of `--split` means. Does not know: where settings come from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from coordinator.decisions import Limits
from coordinator.planning.model import Split
from edge_runtime.core import LayerRange
from edge_runtime.engine.base import DEFAULT_FORMATS, StageFormats
from edge_runtime.errors import UsageError


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """Ports: 0 takes any free one."""

    bundle: Path
    state_directory: Path
    host: str = "127.0.0.1"
    port: int = 0  # of paired agents
    enroll_port: int = 0  # of agents that join
    split: Split = field(default_factory=Split)
    kv_tokens_wanted: int = 4096
    formats: StageFormats = DEFAULT_FORMATS
    expert_loads: Path | None = None  # which experts are busy, where that was measured
    max_waiting: int = 1024
    stall_seconds: float = 15.0  # silence of a pipeline with an open session before it is opened again
    drain_seconds: float = 5.0  # at the end, for streams that are running
    resume_seconds: float = 600.0  # how long a stream that broke may be resumed before it counts as cancelled
    keep_requests_seconds: float = 7 * 86400.0  # how long finished requests stay in the journal
    keep_requests: int = 100_000  # and how many of them
    limits: Limits = field(default_factory=Limits)


MAX_REPLICAS = 64


def parse_replicas(text: str) -> int:
    """`auto` (0) or how many pipelines are wanted."""
    if text == "auto":
        return 0
    if not text.isdecimal() or not 1 <= int(text) <= MAX_REPLICAS:
        raise UsageError(
            f"{text!r} is not a number of replicas", hint=f"use auto, or a number from 1 to {MAX_REPLICAS}"
        )
    return int(text)


def parse_split(text: str, devices: str = "", replicas: str = "auto") -> Split:
    """`auto`, `even`, `experts`, or `0-1,2-3,4-5`; `devices` are names in pipeline order, separated by commas."""
    names = tuple(name.strip() for name in devices.split(",") if name.strip())
    count = parse_replicas(replicas)
    if text in ("auto", "even", "experts"):
        return Split(text, (), names, count)
    try:
        pairs = [part.strip().partition("-") for part in text.split(",")]
        ranges = tuple(LayerRange(int(first), int(last or first)) for first, _, last in pairs)
    except ValueError:
        raise UsageError(
            f"{text!r} is not a split", hint="use auto, even, experts, or layer ranges such as 0-1,2-3,4-5"
        ) from None
    if names and len(names) != len(ranges):
        raise UsageError(f"{len(ranges)} layer ranges were given for {len(names)} devices")
    return Split("ranges", ranges, names, count)
