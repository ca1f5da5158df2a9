"""Several devices as one: `python -m benchmarks.pipeline [--json] [--model tiny] [--no-peers] [--only PART …]`.

Two 1-thread agents on loopback (real processes, CURVE, HTTP) against one 1-thread device, against llama.cpp's RPC
backend with two 1-thread servers, with four sessions at once, and over a link of 20 ms; then what the planner
predicted for each plan beside what was measured, and what an agent holds in memory beyond weights and KV.

`hop_ms_p50` is taken from notes of the agents (`timed_agent.py`): end of one stage's compute to the start of the next
one's, both directions; the larger of the two medians is reported.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from benchmarks import report
from benchmarks.clusters import Running, device, running
from benchmarks.models import MODELS, Model
from benchmarks.other_work import Patience
from benchmarks.peers.environment import PeerProcess, peers_python
from benchmarks.plans import (
    HEARTBEATS_SECONDS,
    Foretold,
    PlanResult,
    first_plan_errors,
    measure_plans,
    plan_errors,
    predicted,
)
from benchmarks.samples import Measure, Samples, in_turns, listed, percentile
from benchmarks.shaping_proxy import Shape
from benchmarks.steps import Step, described, ring_hops, row_hops
from benchmarks.streams import Prompts, stream, together, total_tokens_per_second

SOLO, PAIR, FOUR, WAN, RPC = (
    "one device",
    "two devices",
    "two devices, 4 sessions",
    "two devices, 20 ms apart",
    "llama.cpp RPC, two servers",
)
PARTS = {"pair": PAIR, "four": FOUR, "wan": WAN, "rpc": RPC, "plans": None}  # and the arm of each
ON_THE_PAIR = frozenset(("pair", "four"))
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
    bench: Bench, rounds: int, patience: Patience, parts: Collection[str]
) -> tuple[Samples, list[PlanResult], Running | None]:
    """The arms of these parts and one device, in turns; what was planned for them; the pair, with its notes read."""
    model = bench.model
    pair: Running | None = None
    arms: dict[str, Measure] = {}
    async with AsyncExitStack() as stack:
        solo = await stack.enter_async_context(running(model, [device(model, "solo", 1)]))
        arms[SOLO] = bench.one(solo)
        if ON_THE_PAIR.intersection(parts):
            devices = [device(model, "front", 1), device(model, "back", 1)]
            pair = await stack.enter_async_context(running(model, devices, split=model.balanced))
            on_the_pair = {PAIR: bench.one(pair), FOUR: bench.four(pair)}
            arms.update((name, arm) for name, arm in on_the_pair.items() if name in map(PARTS.get, parts))
        if "wan" in parts:
            far = [device(model, "near", 1), device(model, "far", 1)]
            shape = Shape(RTT_SECONDS / 2)
            arms[WAN] = bench.one(
                await stack.enter_async_context(running(model, far, split=model.balanced, shape=shape))
            )
        if "rpc" in parts:
            command = (str(model.gguf()), "--threads", "1", "--rpc", "2")
            peer = await stack.enter_async_context(PeerProcess(peers_python(), "llamacpp.py", *command))
            arms[RPC] = rpc(peer, model)
        planned = {SOLO: ("one device, 1 thread", solo)}
        if pair is not None and PAIR in arms:
            planned[PAIR] = (f"two devices, {model.balanced}", pair)
        at_first = {arm: await predicted(cluster) for arm, (_, cluster) in planned.items()}
        for arm in arms.values():
            await arm()  # warm
        await asyncio.sleep(HEARTBEATS_SECONDS)
        foretold = {arm: Foretold(cluster, arms[arm]) for arm, (_, cluster) in planned.items()}
        arms.update((arm, each.once) for arm, each in foretold.items())
        found = await in_turns(arms, rounds, patience)
        plans = [
            PlanResult(name, at_first[arm], tuple(foretold[arm].requests))
            for arm, (name, _) in planned.items()
        ]
    return found, plans, pair


def agent_overhead_mib(bench: Bench, pair: Running) -> float | None:
    """Resident memory beyond weights and the KV committed at that moment, the most of any agent."""
    found = []
    for name, notes in bench.overhead_bytes.items():
        steps = pair.steps[name]
        for when, size_bytes in notes:
            before = [step.kv_committed_bytes for step in steps if step.end <= when]
            found.append((size_bytes - (before[-1] if before else 0)) / MIB)
    return max(found, default=None)


def pair_figures(
    bench: Bench, found: Samples, pair: Running, line: Callable[[str], None]
) -> dict[str, object]:
    """What the pair's notes say: hops with one session, steps with four, memory."""
    figures: dict[str, object] = {}
    steps = [pair.steps[name] for name in ("front", "back")]
    if found.values(PAIR):
        stages = [within(each, found.windows(PAIR)) for each in steps]
        rows, ring = 1e3 * statistics.median(row_hops(stages)), 1e3 * statistics.median(ring_hops(stages))
        for name, hops in (
            ("rows to the next stage", row_hops(stages)),
            ("ids back to stage 1", ring_hops(stages)),
        ):
            p50, p99 = 1e3 * statistics.median(hops), 1e3 * percentile(hops, 0.99)
            line(f"hop, {name:28} p50 {p50:.3f} ms, p99 {p99:.3f} ms")
        figures = {"hop_ms_p50": max(rows, ring), "hop_rows_ms_p50": rows, "hop_ids_ms_p50": ring}
    for arm in (PAIR, FOUR):
        for name, each in zip(("front", "back"), steps, strict=True):
            if found.values(arm):
                line(f"{arm}, {name}: {described(within(each, found.windows(arm)))}")
    return {**figures, "agent_overhead_mib": agent_overhead_mib(bench, pair)}


def wan_efficiency(found: Samples, line: Callable[[str], None]) -> float | None:
    """Measured over 1 / (one device's seconds per token + the delay), of neighbours in a round."""
    speed, solo_speed = found.median(WAN), found.median(SOLO)
    if speed is None or solo_speed is None:
        return None
    line(f"20 ms apart: {speed:.2f} of {1 / (1 / solo_speed + RTT_SECONDS):.2f} tokens/s (medians)")
    return found.compared(WAN, SOLO, lambda far, solo: far * (1 / solo + RTT_SECONDS))


def flags() -> argparse.Namespace:
    parser = report.arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), metavar="PART")
    found = parser.parse_args()
    if found.no_peers:
        found.only = tuple(part for part in found.only if part != "rpc")
    return found


async def main() -> None:
    arguments = flags()
    model, parts = MODELS[arguments.model], arguments.only
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
        parts=" ".join(parts),
    )
    bench, patience = Bench(model, Prompts(model.shape.vocab_size)), Patience(arguments.patience)
    found, plans, pair = await compare(bench, rounds, patience, parts)
    for name in found.by_arm:
        page.line(f"{name:28} {listed(found.values(name), 2)}")
    figures = pair_figures(bench, found, pair, page.line) if pair is not None else {}
    if "plans" in parts:
        plans += await measure_plans(bench.model, bench.prompts, patience)
    for plan in plans:
        page.line(str(plan))
    page.end(
        {
            "pipeline_vs_solo": found.ratio(PAIR, SOLO),
            "pipeline_vs_llamacpp_rpc": found.ratio(PAIR, RPC),
            "four_sessions_vs_solo": found.ratio(FOUR, SOLO),
            **figures,
            "wan_efficiency": wan_efficiency(found, page.line),
            "plan_error_max": max(plan_errors(plans)),
            "plan_error_median": statistics.median(plan_errors(plans)),
            "plan_error_max_at_first": max(first_plan_errors(plans)),
            "plans": len(plans),
            **{f"tokens_per_second {name}": found.median(name) for name in found.by_arm},
            "other_cores": found.other_cores,
        }
    )


if __name__ == "__main__":
    asyncio.run(main())
