"""Prefill, end to end: `python -m benchmarks.prefill [--json] [--model tiny] [--no-peers]`.

Time to the first token over HTTP of prompts nobody sent before: one device with 2 threads against llama.cpp (its C
API, Q4_0, no server), two 1-thread devices against one, and a second request that shares a long prefix with the
first. Every prompt is new, so that no cache of prefixes helps but where one is measured. The two devices have as many
layers each: of a prompt only the last row goes through the head, so this is the split that balances prefill.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from benchmarks import report
from benchmarks.clusters import Running, device, running
from benchmarks.models import MODELS, Model
from benchmarks.other_work import Patience
from benchmarks.peers.environment import PeerProcess, peers_python
from benchmarks.samples import Measure, in_turns, listed, median
from benchmarks.streams import Prompts, stream

BIG, SOLO, SPLIT = "one device, 2 threads", "one device, 1 thread", "two devices, 1 thread"
PEER = "llama.cpp, 2 threads"
EVEN = "even"


class Bench:
    def __init__(self, model: Model) -> None:
        self.model = model
        self.prompts = Prompts(model.shape.vocab_size)

    def ttft(self, cluster: Running) -> Measure:
        async def once() -> float:
            return (await stream(cluster.client, self.prompts.new(self.model.prefill_tokens), 1)).ttft_seconds

        return once

    def peer(self, process: PeerProcess) -> Measure:
        async def once() -> float:
            return float((await process.ask(what="prefill", prompt=self.model.prefill_tokens))["seconds"])

        return once

    async def prefix_ratio(self, cluster: Running) -> tuple[float, float]:
        """(TTFT of the first request, of the second) where both begin alike."""
        prefix = self.prompts.new(self.model.prefix_tokens)
        seconds = []
        for _ in range(2):
            prompt = [*prefix, *self.prompts.new(self.model.prefix_new_tokens)]
            seconds.append((await stream(cluster.client, prompt, 1)).ttft_seconds)
        return seconds[0], seconds[1]


async def main() -> None:
    arguments = report.arguments(__doc__).parse_args()
    model = MODELS[arguments.model]
    rounds = arguments.rounds or model.rounds
    page = report.Report(
        "prefill, seconds to the first token",
        only_json=arguments.json,
        model=model,
        prompt_tokens=model.prefill_tokens,
        prefix_tokens=model.prefix_tokens,
        new_tokens_after_prefix=model.prefix_new_tokens,
        rounds=rounds,
        split=EVEN,
    )
    bench = Bench(model)
    arms: dict[str, Measure] = {}
    async with AsyncExitStack() as stack:
        big = await stack.enter_async_context(running(model, [device(model, "cpu-2", 2)]))
        solo = await stack.enter_async_context(running(model, [device(model, "solo", 1)]))
        pair = [device(model, "front", 1), device(model, "back", 1)]
        split = await stack.enter_async_context(running(model, pair, split=EVEN))
        arms = {BIG: bench.ttft(big), SOLO: bench.ttft(solo), SPLIT: bench.ttft(split)}
        if not arguments.no_peers:
            peer = await stack.enter_async_context(
                PeerProcess(peers_python(), "llamacpp.py", str(model.gguf()), "--threads", "2")
            )
            arms = {BIG: arms[BIG], PEER: bench.peer(peer), SOLO: arms[SOLO], SPLIT: arms[SPLIT]}
        for cluster in (big, solo, split):
            await stream(cluster.client, bench.prompts.new(model.decode_prompt_tokens), 4)  # warm
        found = await in_turns(arms, rounds, Patience(arguments.patience))
        pairs = [await bench.prefix_ratio(big) for _ in range(max(1, rounds // 2))]
    for name in arms:
        speed = model.prefill_tokens / (found.median(name) or 1)
        page.line(f"{name:24} {listed(found.values(name), 3)} s, {speed:.1f} tokens/s")
    page.line("shared prefix, first and second: " + ", ".join(f"{a:.3f} {b:.3f} s" for a, b in pairs))
    page.end(
        {
            "prefill_vs_llamacpp": found.ratio(PEER, BIG),  # of seconds: inverse of tokens/s
            "ttft_split_vs_solo": found.ratio(SPLIT, SOLO),
            "prefix_ttft_ratio": median([second / first for first, second in pairs]),
            **{f"ttft_seconds {name}": found.median(name) for name in arms},
            "other_cores": found.other_cores,
        }
    )


if __name__ == "__main__":
    asyncio.run(main())
