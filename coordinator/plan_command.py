"""`edge-runtime plan BUNDLE --devices devices.toml`: what the coordinator would do with these devices, offline.

Knows: the command line and how a plan is printed. Does not know: how to plan.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.cli.command import Command
from edge_runtime.cli.output import result, result_json

if TYPE_CHECKING:
    from coordinator.planning.model import Plan

_EXAMPLE = """
the devices file:
  [defaults]                     # of every device that does not say otherwise
  rtt = "5ms"                    # between the device and the coordinator
  bandwidth = "100Mbit/s"

  [[device]]
  name = "phone"
  memory = "512MiB"              # room for weights and KV
  weight_bandwidth = "6GB/s"     # or, measured: layer_decode, layer_prefill_row and head (durations)

  [[device]]
  name = "laptop"
  memory = "4GiB"
  weight_bandwidth = "20GB/s"
  host = "10.0.0.7"              # whoever names the same one shares its cores; without a name, it may

  [[link]]                       # only where two devices reach each other without the coordinator
  between = ["phone", "laptop"]
  rtt = "2ms"
  bandwidth = "40MB/s"
"""


def _configure(parser: ArgumentParser) -> None:
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLE
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory of the bundle")
    parser.add_argument(
        "--devices", type=Path, required=True, metavar="FILE", help="devices and links (TOML)"
    )
    parser.add_argument(
        "--split", default="auto", help="auto (default), even, experts, or ranges such as 0-3,4-7"
    )
    parser.add_argument("--order", default="", metavar="NAMES", help="device names in pipeline order")
    parser.add_argument(
        "--replicas",
        default="auto",
        metavar="auto|N",
        help="pipelines over different devices: as many as slow none of them (default), or N",
    )
    parser.add_argument(
        "--wire", choices=("fp32", "fp16", "int8"), default="fp32", help="rows between layers (default fp32)"
    )
    parser.add_argument(
        "--kv", choices=("fp32", "int8"), default="fp32", help="keys and values (default fp32)"
    )
    parser.add_argument("--kv-tokens", type=int, default=4096, help="KV room of each stage (default 4096)")
    parser.add_argument(
        "--expert-loads",
        type=Path,
        metavar="FILE",
        help="of `doctor experts --loads FILE`, for --split experts",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _run(arguments: Namespace) -> int:
    from coordinator.config import parse_split
    from coordinator.placement import layer_experts, model_profile
    from coordinator.planning import place_all
    from coordinator.planning.devices_toml import load_devices
    from edge_runtime.bundle import Bundle
    from edge_runtime.engine.base import StageFormats
    from edge_runtime.experts.loads import read_loads

    bundle = Bundle.open(arguments.bundle)
    manifest, loads = bundle.manifest, None
    if arguments.expert_loads is not None:
        loads = read_loads(arguments.expert_loads, str(bundle.digest), layer_experts(manifest))
    devices, links = load_devices(arguments.devices, manifest)
    split = parse_split(arguments.split, arguments.order, arguments.replicas)
    model = model_profile(
        manifest, max(arguments.kv_tokens, 1), StageFormats(kv=arguments.kv, wire=arguments.wire), loads
    )
    plans = place_all(devices, links, model, split)
    if arguments.json:
        result_json({**plan_json(plans[0]), "replicas": [plan_json(plan) for plan in plans[1:]]})
    else:
        result("\n\n".join(plan_text(plan) for plan in plans))
    return 0


def plan_json(plan: Plan) -> dict[str, object]:
    """The plan as JSON, its documented shape."""
    return {
        "stages": [
            {
                "name": stage.name,
                "layers": [stage.layers.first, stage.layers.last],
                "weight_bytes": stage.weight_bytes,
                "kv_tokens": stage.kv_tokens,
                "compute_seconds": stage.compute_seconds,
                "hop_seconds": stage.hop_seconds,
            }
            for stage in plan.stages
        ],
        "holders": [
            {"name": each.name, "experts": each.experts, "weight_bytes": each.weight_bytes}
            for each in plan.holders
        ],
        "predicted_tokens_per_second": _finite(plan.predicted_tokens_per_second),
        "predicted_prefill_tokens_per_second": _finite(plan.predicted_prefill_tokens_per_second),
        "prefill_chunk_tokens": plan.prefill_chunk_tokens,
        "reasons": list(plan.reasons),
        "excluded": dict(plan.excluded),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def plan_text(plan: Plan) -> str:
    """The plan for a person."""
    lines = [" -> ".join(f"{stage.name} [{stage.layers}]" for stage in plan.stages)]
    lines += [f"  + {holder.name}: {holder.experts} experts" for holder in plan.holders]
    lines.append(
        f"predicted: {plan.predicted_tokens_per_second:,.1f} tokens/s decoding,"
        f" {plan.predicted_prefill_tokens_per_second:,.0f} tokens/s prefill"
        f" in chunks of {plan.prefill_chunk_tokens}"
    )
    lines += ["", "why:", *(f"  - {reason}" for reason in plan.reasons)]
    if plan.excluded:
        lines += ["", "left out:", *(f"  - {name}: {reason}" for name, reason in plan.excluded.items())]
    return "\n".join(lines)


COMMAND = Command("plan", "show how a model would be placed on devices, offline", _configure, _run)
