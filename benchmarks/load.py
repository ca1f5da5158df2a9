"""Many users: `python -m benchmarks.load [--json] [--model tiny] [--only latency|open]`, two 1-thread devices.

First, four sessions decode alone, then while a long prompt is prefilled: the 99th percentile of the time between a
session's tokens, one over the other. Then requests arrive open-loop, whether or not earlier ones are done: Gamma
distributed times between arrivals with a coefficient of variation of 2 (bursts as in BurstGPT's traces), log-normal
lengths, a fixed seed. A session counts as starved if it got no token for longer than a stated time while others
together got many; waiting for the first token counts from the arrival.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from benchmarks import report
from benchmarks.clusters import Running, device, running
from benchmarks.models import MODELS, Model
from benchmarks.other_work import Patience
from benchmarks.samples import in_turns, listed, percentile
from benchmarks.streams import Prompts, Stream, stream

PARTS = ("latency", "open")
SESSIONS = 4
WARM_TOKENS = 4
BURSTINESS = 2.0  # coefficient of variation of the times between arrivals; 1 would be Poisson
STARVED_SECONDS = 15.0
STARVED_TOKENS = 32  # that others got meanwhile
SEED = 20


@dataclass(frozen=True)
class Arrival:
    at_seconds: float
    prompt_tokens: int
    new_tokens: int


def arrivals(seed: int, count: int, per_second: float, prompt_tokens: int, new_tokens: int) -> list[Arrival]:
    """Means as given; the same for the same seed."""
    rng = np.random.default_rng(seed)
    shape = 1 / BURSTINESS**2
    times = np.cumsum(rng.gamma(shape, 1 / (shape * per_second), count))
    prompts = rng.lognormal(np.log(prompt_tokens), 0.6, count)
    outputs = rng.lognormal(np.log(new_tokens), 0.4, count)
    return [
        Arrival(float(at), int(np.clip(prompt, 4, 4 * prompt_tokens)), int(np.clip(new, 4, 4 * new_tokens)))
        for at, prompt, new in zip(times, prompts, outputs, strict=True)
    ]


def starved(streams: Sequence[Stream], *, seconds: float, tokens: int) -> int:
    """Sessions with a silence of more than `seconds` in which others together got at least `tokens`."""
    everything = sorted(at for each in streams for at in each.token_times)
    count = 0
    for each in streams:
        times = [each.started, *each.token_times]
        silences = [(a, b) for a, b in pairwise(times) if b - a > seconds]
        count += any(bisect_right(everything, b) - bisect_right(everything, a) > tokens for a, b in silences)
    return count


async def gaps_during_prefill(
    cluster: Running, model: Model, prompts: Prompts
) -> tuple[list[float], list[float]]:
    """Seconds between tokens of four sessions (alone, while a long prompt is prefilled)."""
    sessions = [Stream(model.decode_prompt_tokens, 0.0) for _ in range(SESSIONS)]
    async with asyncio.TaskGroup() as tasks:
        running_sessions = [
            tasks.create_task(
                stream(cluster.client, prompts.new(each.prompt_tokens), model.load_session_tokens, each)
            )
            for each in sessions
        ]
        for each in sessions:
            await each.until(WARM_TOKENS)
        begin = time.monotonic()
        for each in sessions:
            await each.until(len(each.token_times) + model.load_alone_tokens)
        middle = time.monotonic()
        long = await stream(cluster.client, prompts.new(model.long_prompt_tokens), 1)
        if any(task.done() for task in running_sessions):
            report.say("a session ended before the long prompt was prefilled")
        for task in running_sessions:
            task.cancel()
    report.say(
        f"prefill of {model.long_prompt_tokens} tokens beside {SESSIONS} sessions: {long.ttft_seconds:.1f} s"
    )
    return _gaps(sessions, begin, middle), _gaps(sessions, middle, long.token_times[0])


def _gaps(streams: Sequence[Stream], begin: float, end: float) -> list[float]:
    """Of tokens that arrived in between."""
    return [
        later - earlier
        for each in streams
        for earlier, later in pairwise(each.token_times)
        if begin < later <= end
    ]


async def open_loop(cluster: Running, prompts: Prompts, wanted: Sequence[Arrival]) -> list[Stream]:
    begin = time.monotonic()

    async def one(arrival: Arrival) -> Stream:
        await asyncio.sleep(max(0.0, begin + arrival.at_seconds - time.monotonic()))
        return await stream(cluster.client, prompts.new(arrival.prompt_tokens), arrival.new_tokens)

    return list(await asyncio.gather(*(one(arrival) for arrival in wanted)))


async def latency(
    cluster: Running, model: Model, prompts: Prompts, rounds: int, patience: Patience, page: report.Report
) -> dict[str, object]:
    """Figures of four sessions beside a prefill."""
    alone: list[float] = []
    beside: list[float] = []

    async def latency_ratio() -> float:
        quiet, busy = await gaps_during_prefill(cluster, model, prompts)
        alone.extend(quiet)
        beside.extend(busy)
        return percentile(busy, 0.99) / percentile(quiet, 0.99)

    arm = "p99 between tokens beside a prefill, over alone"
    found = await in_turns({arm: latency_ratio}, rounds, patience, tries=1)
    _show(page, "between tokens, 4 sessions alone", alone)
    _show(page, "the same while a long prompt is prefilled", beside)
    page.line(f"ratios of p99: {listed(found.values(arm), 2)}")
    return {
        "itl_p99_during_prefill_vs_alone": found.median(arm),
        "itl_p99_seconds_alone": percentile(alone, 0.99),
        "itl_p99_seconds_during_prefill": percentile(beside, 0.99),
    }


def open_loop_figures(streams: Sequence[Stream], page: report.Report) -> dict[str, object]:
    first = [each.ttft_seconds for each in streams]
    _show(page, "open loop: to the first token", first)
    _show(page, "open loop: between tokens", [gap for each in streams for gap in each.gaps])
    _show(page, "open loop: whole request", [each.ended - each.started for each in streams])
    begin, end = min(each.started for each in streams), max(each.ended for each in streams)
    throughput = sum(len(each.token_times) for each in streams) / (end - begin)
    prefilled = sum(each.prompt_tokens for each in streams) / (end - begin)
    page.line(f"open loop: {throughput:.1f} new and {prefilled:.1f} prompt tokens/s over {end - begin:.0f} s")
    return {
        "starved": starved(streams, seconds=STARVED_SECONDS, tokens=STARVED_TOKENS),
        "open_loop_ttft_p50_seconds": percentile(first, 0.5),
        "open_loop_ttft_p99_seconds": percentile(first, 0.99),
        "open_loop_tokens_per_second": throughput,
    }


async def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    arguments = parser.parse_args()
    model = MODELS[arguments.model]
    rounds = arguments.rounds or max(1, model.rounds // 2)
    wanted = arrivals(
        SEED, model.load_requests, model.load_per_second, model.load_prompt_tokens, model.load_new_tokens
    )
    page = report.Report(
        "load on two 1-thread devices",
        only_json=arguments.json,
        model=model,
        split=str(model.balanced),
        decoding_sessions=SESSIONS,
        long_prompt_tokens=model.long_prompt_tokens,
        rounds=rounds,
        open_loop=f"{len(wanted)} requests, {model.load_per_second:g}/s, coefficient of variation {BURSTINESS:g}, "
        f"median prompt {model.load_prompt_tokens} and answer {model.load_new_tokens} tokens, seed {SEED}",
        starved_after=f"{STARVED_SECONDS:g} s while others get {STARVED_TOKENS} tokens",
        parts=" ".join(arguments.only),
    )
    prompts, patience = Prompts(model.shape.vocab_size), Patience(arguments.patience)
    devices = [device(model, "front", 1), device(model, "back", 1)]
    figures: dict[str, object] = {}
    async with running(model, devices, split=model.balanced) as cluster:
        await stream(cluster.client, prompts.new(model.decode_prompt_tokens), 4)
        if "latency" in arguments.only:
            figures |= await latency(cluster, model, prompts, rounds, patience, page)
        if "open" in arguments.only:
            await patience.wait()
            report.say("open loop")
            figures |= open_loop_figures(await open_loop(cluster, prompts, wanted), page)
    page.end(figures)


def _show(page: report.Report, what: str, seconds: Sequence[float]) -> None:
    values = " ".join(
        f"p{share:.0%} {percentile(seconds, share):.3f}".replace("%", "") for share in (0.5, 0.9, 0.99)
    )
    page.line(f"{what:42} {values} s")


if __name__ == "__main__":
    asyncio.run(main())
