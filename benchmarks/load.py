"""Many users: `python -m benchmarks.load [--json] [--model tiny] [--only latency|open|overload]`, two 1-thread devices.

First, four sessions decode alone, then while a long prompt is prefilled: the 99th percentile of the time between a
session's tokens, one over the other. Then what these devices can do at all: a closed loop of eight requests at once.
Then requests arrive open-loop, whether or not earlier ones are done, with a stated share of that capacity as their
load: Gamma distributed times between arrivals with a coefficient of variation of 2 (bursts as in BurstGPT's traces),
log-normal lengths, a fixed seed. A session counts as starved if it got no token for longer than a stated time while
others together got many; waiting for the first token counts from the arrival. `--only overload` (not part of a run
without `--only`) offers more than the capacity: there some wait for long, in turn, or are refused at once, and nobody
who has begun starves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks import report
from benchmarks.arrivals import (
    BURSTINESS,
    Arrival,
    Capacity,
    arrivals,
    capacity,
    most_overtaken,
    offered,
    starved,
)
from benchmarks.clusters import Running, device, running
from benchmarks.models import MODELS, Model
from benchmarks.other_work import Patience
from benchmarks.samples import in_turns, listed, percentile
from benchmarks.streams import Prompts, Stream, stream
from edge_runtime.errors import CapacityError

PARTS = ("latency", "open", "overload")
DEFAULT_PARTS = ("latency", "open")
SESSIONS = 4
WARM_TOKENS = 4
AT_ONCE = 8  # of the closed loop
OFFERED_SHARE, OVERLOAD_SHARE = 0.7, 1.5  # of the capacity
STARVED_SECONDS = 15.0
STARVED_TOKENS = 32  # that others got meanwhile
SEED, CLOSED_SEED = 20, 21


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


async def closed_loop(cluster: Running, prompts: Prompts, wanted: Sequence[Arrival]) -> list[Stream]:
    """So many at once, the next one as soon as one ends."""
    waiting, ended = list(reversed(wanted)), list[Stream]()

    async def one_after_the_other() -> None:
        while waiting:
            ended.append(await asked(cluster, prompts, waiting.pop()))

    await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))
    return ended


async def asked(cluster: Running, prompts: Prompts, arrival: Arrival) -> Stream:
    return await stream(cluster.client, prompts.new(arrival.prompt_tokens), arrival.new_tokens)


@dataclass(frozen=True)
class Served:
    """What became of an open loop's requests."""

    streams: list[Stream]
    refused: int  # told at once that they are too many

    @property
    def rows_per_second(self) -> float:
        """Until the last one's end."""
        begin, end = min(each.started for each in self.streams), max(each.ended for each in self.streams)
        return sum(each.prompt_tokens + len(each.token_times) for each in self.streams) / (end - begin)


async def open_loop(cluster: Running, prompts: Prompts, wanted: Sequence[Arrival]) -> Served:
    begin = time.monotonic()

    async def one(arrival: Arrival) -> Stream | None:
        await asyncio.sleep(max(0.0, begin + arrival.at_seconds - time.monotonic()))
        try:
            return await asked(cluster, prompts, arrival)
        except CapacityError:
            return None

    found = await asyncio.gather(*(one(arrival) for arrival in wanted))
    streams = [each for each in found if each is not None]
    return Served(streams, len(found) - len(streams))


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


async def under_load(
    cluster: Running, model: Model, prompts: Prompts, shares: dict[str, float], page: report.Report
) -> dict[str, object]:
    """Figures of the closed loop, and of an open one for each share of its capacity, under that name."""
    report.say(f"closed loop: {model.load_closed_requests} requests, {AT_ONCE} at once")
    can_do = capacity(await closed_loop(cluster, prompts, _requests(model, CLOSED_SEED)))
    page.line(
        f"capacity, {AT_ONCE} requests at once: {can_do.new_tokens_per_second:.1f} new and "
        f"{can_do.prompt_tokens_per_second:.1f} prompt tokens/s"
    )
    figures: dict[str, object] = {
        "capacity_new_tokens_per_second": can_do.new_tokens_per_second,
        "capacity_prompt_tokens_per_second": can_do.prompt_tokens_per_second,
    }
    for name, share in shares.items():
        wanted = offered(_requests(model, SEED), share * can_do.rows_per_second)
        seconds = wanted[-1].at_seconds
        page.line(
            f"{name}: {len(wanted)} requests in {seconds:.0f} s, {share:g} of the capacity, in bursts"
            f" (coefficient of variation {BURSTINESS:g})"
        )
        served = await open_loop(cluster, prompts, wanted)
        prefix = name.replace(" ", "_")
        figures[f"{prefix}_offered_requests_per_second"] = len(wanted) / seconds
        figures |= open_loop_figures(served, can_do, name, page)
    return figures


def _requests(model: Model, seed: int) -> list[Arrival]:
    count = model.load_closed_requests if seed == CLOSED_SEED else model.load_requests
    return arrivals(seed, count, 1.0, model.load_prompt_tokens, model.load_new_tokens)


def open_loop_figures(served: Served, can_do: Capacity, name: str, page: report.Report) -> dict[str, object]:
    streams, prefix = served.streams, name.replace(" ", "_")
    first = [each.ttft_seconds for each in streams]
    _show(page, f"{name}: to the first token", first)
    _show(page, f"{name}: between tokens", [gap for each in streams for gap in each.gaps])
    _show(page, f"{name}: whole request", [each.ended - each.started for each in streams])
    utilisation = served.rows_per_second / can_do.rows_per_second
    waited = starved(streams, seconds=STARVED_SECONDS, tokens=STARVED_TOKENS)
    begun = starved(streams, seconds=STARVED_SECONDS, tokens=STARVED_TOKENS, once_begun=True)
    overtaken = most_overtaken(streams)
    page.line(
        f"{name}: {utilisation:.2f} of the capacity was used; {waited} waited for more than {STARVED_SECONDS:g} s, "
        f"{begun} of them after their first token; {served.refused} were refused; "
        f"at most {overtaken} that came later began before one"
    )
    return {
        f"{prefix}_starved": waited,
        f"{prefix}_starved_once_begun": begun,
        f"{prefix}_refused": served.refused,
        f"{prefix}_most_overtaken": overtaken,
        f"{prefix}_utilisation": utilisation,
        f"{prefix}_ttft_p50_seconds": percentile(first, 0.5),
        f"{prefix}_ttft_p99_seconds": percentile(first, 0.99),
    }


async def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=DEFAULT_PARTS, metavar="PART")
    arguments = parser.parse_args()
    model = MODELS[arguments.model]
    rounds = arguments.rounds or max(1, model.rounds // 2)
    page = report.Report(
        "load on two 1-thread devices",
        only_json=arguments.json,
        model=model,
        split=str(model.balanced),
        decoding_sessions=SESSIONS,
        long_prompt_tokens=model.long_prompt_tokens,
        rounds=rounds,
        requests=f"median prompt {model.load_prompt_tokens} and answer {model.load_new_tokens} tokens, seed {SEED}",
        starved_after=f"{STARVED_SECONDS:g} s while others get {STARVED_TOKENS} tokens",
        parts=" ".join(arguments.only),
    )
    prompts, patience = Prompts(model.shape.vocab_size), Patience(arguments.patience)
    devices = [device(model, "front", 1), device(model, "back", 1)]
    figures: dict[str, object] = {}
    shares = {"open loop": OFFERED_SHARE} if "open" in arguments.only else {}
    shares |= {"overload": OVERLOAD_SHARE} if "overload" in arguments.only else {}
    async with running(model, devices, split=model.balanced) as cluster:
        await stream(cluster.client, prompts.new(model.decode_prompt_tokens), 4)
        if "latency" in arguments.only:
            figures |= await latency(cluster, model, prompts, rounds, patience, page)
        if shares:
            await patience.wait()
            figures |= await under_load(cluster, model, prompts, shares, page)
    if "open" in arguments.only:
        figures |= {"starved": figures["open_loop_starved"], "offered_share": OFFERED_SHARE}
    page.end(figures)


def _show(page: report.Report, what: str, seconds: Sequence[float]) -> None:
    values = " ".join(
        f"p{share:.0%} {percentile(seconds, share):.3f}".replace("%", "") for share in (0.5, 0.9, 0.99)
    )
    page.line(f"{what:42} {values} s")


if __name__ == "__main__":
    asyncio.run(main())
