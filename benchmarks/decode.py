"""Decoding end to end against llama.cpp: `python -m benchmarks.decode [--json] [--model tiny] [--no-peers]`.

One device with 2 threads behind a real coordinator, over HTTP, one greedy request; llama.cpp decodes the same shape
with Q4_0 weights (its head has 6 bits, ours 8) through its C API, without any server. In turns, the ratio is the
median over neighbours. One thread and transformers (bfloat16) are there for information.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from benchmarks import report
from benchmarks.clusters import device, running
from benchmarks.models import MODELS, Model
from benchmarks.other_work import Patience
from benchmarks.peers.environment import PeerProcess, peers_python
from benchmarks.samples import Measure, in_turns, listed
from benchmarks.streams import Prompts, stream
from edge_runtime import AsyncClient

THREADS = (2, 1)


def ours(client: AsyncClient, model: Model, prompts: Prompts) -> Measure:
    async def once() -> float:
        prompt = prompts.new(model.decode_prompt_tokens)
        return (await stream(client, prompt, model.decode_tokens)).decode_tokens_per_second

    return once


def llamacpp(peer: PeerProcess, model: Model) -> Measure:
    async def once() -> float:
        answer = await peer.ask(what="decode", prompt=model.decode_prompt_tokens, tokens=model.decode_tokens)
        return model.decode_tokens / float(answer["seconds"])

    return once


async def main() -> None:
    arguments = report.arguments(__doc__).parse_args()
    model = MODELS[arguments.model]
    rounds = arguments.rounds or model.rounds
    page = report.Report(
        "decode, one request, tokens/s after the first token",
        only_json=arguments.json,
        model=model,
        prompt_tokens=model.decode_prompt_tokens,
        new_tokens=model.decode_tokens,
        rounds=rounds,
        temperature=0,
    )
    prompts = Prompts(model.shape.vocab_size)
    arms: dict[str, Measure] = {}
    async with AsyncExitStack() as stack:
        for threads in THREADS:
            cluster = await stack.enter_async_context(
                running(model, [device(model, f"cpu-{threads}", threads)], split="auto")
            )
            arms[f"ours, {threads} threads"] = ours(cluster.client, model, prompts)
            if not arguments.no_peers:
                peer = await stack.enter_async_context(
                    PeerProcess(peers_python(), "llamacpp.py", str(model.gguf()), "--threads", str(threads))
                )
                arms[f"llama.cpp, {threads} threads"] = llamacpp(peer, model)
        for arm in arms.values():
            await arm()  # warm
        found = await in_turns(arms, rounds, Patience(arguments.patience))
    for name in arms:
        page.line(f"{name:28} {listed(found.values(name), 2)}")
    figures: dict[str, object] = {
        "decode_vs_llamacpp": found.ratio("ours, 2 threads", "llama.cpp, 2 threads"),
        "decode_vs_llamacpp_1_thread": found.ratio("ours, 1 threads", "llama.cpp, 1 threads"),
        **{f"tokens_per_second {name}": found.median(name) for name in arms},
        "other_cores": found.other_cores,
    }
    if not arguments.no_peers:
        figures |= await for_information(page, model)
    page.line(f"vs llama.cpp: {figures['decode_vs_llamacpp']}")
    page.end(figures)


async def for_information(page: report.Report, model: Model) -> dict[str, object]:
    """transformers in our own environment, where it is installed."""
    name = "transformers bf16, 2 threads"
    try:
        peer = PeerProcess(
            Path(sys.executable), "transformers_cpu.py", str(model.checkpoint()), "--threads", "2"
        )
        async with peer:
            question = {"prompt": model.decode_prompt_tokens, "tokens": min(16, model.decode_tokens)}
            answer = await peer.ask(what="decode", **question)
            speed = question["tokens"] / float(answer["seconds"])
            page.line(f"{name:28} {speed:.2f}")
            return {f"tokens_per_second {name}": speed}
    except (RuntimeError, OSError) as problem:
        report.say(f"{name} was left out: {problem}")
        return {}


if __name__ == "__main__":
    asyncio.run(main())
