"""Several devices as one: `python -m benchmarks.pipeline [--json] [--model tiny] [--no-peers]`.

Two 1-thread agents on loopback (real processes, CURVE, HTTP) against one 1-thread device, against llama.cpp's RPC
backend with two 1-thread servers, with four sessions at once, and over a link of 20 ms; then what the planner
predicted for each plan beside what was measured, and what an agent holds in memory beyond weights and KV.

`hop_ms_p50` is taken from notes of the agents (`timed_agent.py`): end of one stage's compute to the start of the next
one's, both directions; the larger of the two medians is reported.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from benchmarks import report
from benchmarks.clusters import Running, device, running
from benchmarks.models import MODELS, Model
from benchmarks.other_work import Patience
from benchmarks.peers.environment import PeerProcess, peers_python
from benchmarks.plans import PlanResult, measure_plans, plan_errors
from benchmarks.samples import Measure, Samples, in_turns, listed, percentile
from benchmarks.shaping_proxy import Shape
from benchmarks.steps import Step, ring_hops, row_hops
from benchmarks.streams import Prompts, stream, together, total_tokens_per_second

SOLO, PAIR, FOUR, WAN, RPC = (
    "one device",
    "two devices",
    "two devices, 4 sessions",
    "two devices, 20 ms apart",
    "llama.cpp RPC, two servers",
)
RTT_SECONDS = 0.020
SESSIONS = 4
MIB = 1 << 20


@dataclass
class Bench:
    """What is measured of the clusters while they run."""

    model: Model
    prompts: Prompts
    overhead_bytes: dict[str, list[tuple[float, int]]] = field(default_factory=dict)  # (when, RSS - weights)

    def one(self, cluster: Running) -> Measure:
        async def once() -> float:
            prompt = self.prompts.new(self.model.decode_prompt_tokens)
            return (await stream(cluster.client, prompt, self.model.decode_tokens)).decode_tokens_per_second

        return once

    def four(self, cluster: Running) -> Measure:
        async def once() -> float:
            prompts = [self.prompts.new(self.model.decode_prompt_tokens) for _ in range(SESSIONS)]
            found = asyncio.create_task(together(cluster.client, prompts, self.model.decode_tokens))
            await self.note_memory(cluster)
            return total_tokens_per_second(await found)

        return once

    async def note_memory(self, cluster: Running) -> None:
        weights = await cluster.weight_bytes()
        now = time.monotonic()
        for name, rss_bytes in cluster.rss_bytes().items():
            self.overhead_bytes.setdefault(name, []).append((now, rss_bytes - weights[name]))


def rpc(peer: PeerProcess, model: Model) -> Measure:
    async def once() -> float:
        answer = await peer.ask(what="decode", prompt=model.decode_prompt_tokens, tokens=model.decode_tokens)
        return model.decode_tokens / float(answer["seconds"])

    return once


def within(steps: Sequence[Step], windows: Sequence[tuple[float, float]]) -> list[Step]:
    return [step for step in steps if any(begin <= step.begin <= end for begin, end in windows)]


async def compare(
    bench: Bench, rounds: int, patience: Patience, *, peers: bool
) -> tuple[Samples, list[PlanResult], Running]:
    """All arms in turns; the plans among them; the pair, with its notes read."""
    model = bench.model
    async with AsyncExitStack() as stack:
        solo = await stack.enter_async_context(running(model, [device(model, "solo", 1)]))
        devices = [device(model, "front", 1), device(model, "back", 1)]
        pair = await stack.enter_async_context(running(model, devices, split=model.balanced))
        far = [device(model, "near", 1), device(model, "far", 1)]
        wan = await stack.enter_async_context(
            running(model, far, split=model.balanced, shape=Shape(RTT_SECONDS / 2))
        )
        arms: dict[str, Measure] = {
            SOLO: bench.one(solo),
            PAIR: bench.one(pair),
            FOUR: bench.four(pair),
            WAN: bench.one(wan),
        }
        if peers:
            command = (str(model.gguf()), "--threads", "1", "--rpc", "2")
            arms[RPC] = rpc(
                await stack.enter_async_context(PeerProcess(peers_python(), "llamacpp.py", *command)), model
            )
        for arm in arms.values():
            await arm()  # warm
        found = await in_turns(arms, rounds, patience)
        plans = [
            PlanResult("one device, 1 thread", await predicted(solo), found.median(SOLO) or 0.0),
            PlanResult(f"two devices, {model.balanced}", await predicted(pair), found.median(PAIR) or 0.0),
        ]
    return found, plans, pair


async def predicted(cluster: Running) -> float:
    return float((await cluster.plan())["predicted_tokens_per_second"])


def agent_overhead_mib(bench: Bench, pair: Running) -> float:
    """Resident memory beyond weights and the KV committed at that moment, the most of any agent."""
    most = 0.0
    for name, notes in bench.overhead_bytes.items():
        steps = pair.steps[name]
        for when, size_bytes in notes:
            before = [step.kv_committed_bytes for step in steps if step.end <= when]
            most = max(most, (size_bytes - (before[-1] if before else 0)) / MIB)
    return most


async def main() -> None:
    arguments = report.arguments(__doc__).parse_args()
    model = MODELS[arguments.model]
    rounds = arguments.rounds or model.rounds
    page = report.Report(
        "pipelines of 1-thread devices, tokens/s after the first token",
        only_json=arguments.json,
        model=model,
        prompt_tokens=model.decode_prompt_tokens,
        new_tokens=model.decode_tokens,
        rounds=rounds,
        temperature=0,
        split=str(model.balanced),
        far_link=f"{1e3 * RTT_SECONDS:.0f} ms round trip",
    )
    bench, patience = Bench(model, Prompts(model.shape.vocab_size)), Patience(arguments.patience)
    found, plans, pair = await compare(bench, rounds, patience, peers=not arguments.no_peers)
    for name in found.by_arm:
        page.line(f"{name:28} {listed(found.values(name), 2)}")
    stages = [within(pair.steps[name], found.windows(PAIR)) for name in ("front", "back")]
    rows, ring = row_hops(stages), ring_hops(stages)
    for name, hops in (("rows to the next stage", rows), ("ids back to stage 1", ring)):
        page.line(
            f"hop, {name:28} p50 {1e3 * statistics.median(hops):.3f} ms, p99 {1e3 * percentile(hops, 0.99):.3f} ms"
        )
    plans += await measure_plans(bench.model, bench.prompts, patience)
    for plan in plans:
        page.line(str(plan))
    solo_seconds = 1 / (found.median(SOLO) or 1.0)
    wan_speed = found.median(WAN) or 0.0
    wan_limit = 1 / (solo_seconds + RTT_SECONDS)
    page.line(f"20 ms apart: {wan_speed:.2f} of {wan_limit:.2f} tokens/s")
    page.end(
        {
            "pipeline_vs_solo": found.ratio(PAIR, SOLO),
            "pipeline_vs_llamacpp_rpc": found.ratio(PAIR, RPC),
            "four_sessions_vs_solo": found.ratio(FOUR, SOLO),
            "hop_ms_p50": 1e3 * max(statistics.median(rows), statistics.median(ring)),
            "hop_rows_ms_p50": 1e3 * statistics.median(rows),
            "hop_ids_ms_p50": 1e3 * statistics.median(ring),
            "wan_efficiency": wan_speed / wan_limit,
            "plan_error_max": max(plan_errors(plans)),
            "plan_error_median": statistics.median(plan_errors(plans)),
            "plans": len(plans),
            "agent_overhead_mib": agent_overhead_mib(bench, pair),
            **{f"tokens_per_second {name}": found.median(name) for name in found.by_arm},
            "other_cores": found.other_cores,
        }
    )


if __name__ == "__main__":
    asyncio.run(main())
