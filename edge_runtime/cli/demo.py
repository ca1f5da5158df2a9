"""`edge-runtime demo`: one model over three devices on this machine.

Three agent processes get a third of the layers each; the plan, its prediction, what was measured and the generated code
are shown, and the console stays open until Ctrl-C.
"""

from __future__ import annotations

import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edge_runtime.cli.answers import print_stream
from edge_runtime.cli.command import Command
from edge_runtime.cli.output import note, paint, result, result_json
from edge_runtime.cli.progress import format_amount

if TYPE_CHECKING:
    from edge_runtime.sdk.cluster import LocalCluster
    from edge_runtime.sdk.options import GenerateOptions
    from edge_runtime.sdk.results import Result

PROMPT = 'import os\nimport sys\n\n\nclass Queue:\n    """A queue of paths."""\n\n    def __init__(self'
OPTIONS: GenerateOptions = {
    "max_tokens": 160,
    "temperature": 0.7,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
    "seed": 6,
}
WARM_UP_TOKENS = 16


def _configure(parser: ArgumentParser) -> None:
    parser.add_argument("--prompt", default=PROMPT, help="the beginning of the code")
    parser.add_argument(
        "--once", action="store_true", help="end after one answer (also where there is no terminal)"
    )
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")


def _run(arguments: Namespace) -> int:
    from edge_runtime.sdk.cluster import DEMO, LocalCluster
    from edge_runtime.sdk.device_spec import DeviceSpec

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or nothing would be cleaned up
    say: Callable[[str], None] = note if arguments.json else result
    devices = [
        DeviceSpec("phone", memory="512MiB"),
        DeviceSpec("laptop", memory="1GiB"),
        DeviceSpec("mini-pc", memory="1GiB"),
    ]
    with LocalCluster(DEMO, devices=devices, split="even", on_progress=_progress) as cluster:
        status = cluster.status()
        _show_plan(status, cluster.pids, say)
        say(f"\n{paint('console', 'bold', sys.stdout)}  {cluster.url}/#key={cluster.api_key}\n")
        answer = _generate(cluster, arguments, say)
        plan = cluster.status()["plan"]
        say(
            f"\npredicted {plan['predicted_tokens_per_second']:,.1f} tokens/s,"
            f" measured {answer.timings.tokens_per_second:,.1f} tokens/s"
            f" over {len(answer.token_ids)} tokens, first after {answer.timings.ttft_seconds * 1e3:.0f} ms"
        )
        if arguments.json:
            result_json(demo_json(answer, status, cluster.pids))
        if not arguments.once and sys.stdin.isatty() and sys.stdout.isatty():
            _stay(cluster)
    return 0


def _generate(cluster: LocalCluster, arguments: Namespace, say: Callable[[str], None]) -> Result:
    client = cluster.client()
    # Its first pages, connections and kernels are touched once, before anything is measured.
    client.generate(arguments.prompt, max_tokens=WARM_UP_TOKENS, temperature=0)
    stream = client.stream(arguments.prompt, **OPTIONS)
    if arguments.json:
        answer = print_stream(stream, quiet=True)
        say(arguments.prompt + answer.text)
        return answer
    result(arguments.prompt, end="")
    return print_stream(stream)


def _progress(line: str) -> None:
    note(paint(line, "dim", sys.stderr))


def _show_plan(status: dict[str, Any], pids: dict[str, int], say: Callable[[str], None]) -> None:
    plan, total = status["plan"], status["model_weight_bytes"]
    say(
        f"\n{status['model']['name']}: {format_amount(total, 'B')} of weights"
        f" over {len(plan['stages'])} devices\n"
    )
    for name, first, last in plan["stages"]:
        device = next(each for each in status["devices"] if each["name"] == name)
        share = device["weight_bytes"] / total
        say(
            f"  {name:<8} layers {first}-{last}  {format_amount(device['weight_bytes'], 'B'):>8}"
            f" ({share:.0%})  pid {pids[name]}"
        )
    say("\nwhy this plan:")
    for reason in plan["reasons"]:
        say(f"  - {reason}")


def demo_json(answer: Result, status: dict[str, Any], pids: dict[str, int]) -> dict[str, object]:
    """The documented shape of `demo --json`."""
    plan = status["plan"]
    by_name = {device["name"]: device for device in status["devices"]}
    return {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "devices": [
            {
                "name": name,
                "pid": pids[name],
                "layers": [first, last],
                "weight_bytes": by_name[name]["weight_bytes"],
            }
            for name, first, last in plan["stages"]
        ],
        "model_weight_bytes": status["model_weight_bytes"],
        "predicted_tokens_per_second": plan["predicted_tokens_per_second"],
        "tokens_per_second": answer.timings.tokens_per_second,
    }


def _stay(cluster: LocalCluster) -> None:
    try:
        note(f"the cluster goes on serving at {cluster.url}; Ctrl-C ends it")
        signal.pause()
    except KeyboardInterrupt:
        note("\nstopping")


COMMAND = Command("demo", "run one model over three devices on this machine", _configure, _run)
