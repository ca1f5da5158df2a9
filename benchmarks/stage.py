"""One stage with the whole model, without a cluster: `python -m benchmarks.stage [--json] [--no-peers]`.

Decoding (median of some steps after a short prompt) and prefill, for each executor with 1 and 2 threads, in turns with
llama.cpp's C API on the same shape; and what each executor adds to a process, in resident memory.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial

import numpy as np

from benchmarks import report
from benchmarks.models import MODELS, Model
from benchmarks.peers.environment import PeerProcess, peers_python
from benchmarks.samples import Measure, in_turns, listed
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import Batch, Span
from edge_runtime.engine.cpu import CpuStage

EXECUTORS = ("native", "onnx")
THREADS = (1, 2)
DECODE_STEPS = 32
CHUNK_TOKENS = 128
SESSION = SessionId(1)

RESIDENT = """
import sys
from edge_runtime.agent.memory import resident_bytes
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.executors import import_executor
path, executor = sys.argv[1:]
import_executor(executor)
before = resident_bytes()
bundle = Bundle.open(path)
last = bundle.manifest.num_layers - 1
stage = CpuStage.load(bundle, LayerRange(0, last), threads=2, kv_budget_bytes=64 << 20, executor=executor)
print(before, resident_bytes())
"""


class Solo:
    """A stage that holds everything, and random prompts for it."""

    def __init__(self, model: Model, executor: str, threads: int) -> None:
        bundle = Bundle.open(model.bundle())
        layers = LayerRange(0, bundle.manifest.num_layers - 1)
        rows = max(model.prefill_tokens, model.decode_prompt_tokens + DECODE_STEPS)
        kv_bytes = 2 * rows * len(layers) * bundle.manifest.model.kv_bytes_per_token_per_layer + (1 << 20)
        self._stage = CpuStage.load(
            bundle, layers, threads=threads, kv_budget_bytes=kv_bytes, executor=executor
        )
        self._vocab_size = bundle.manifest.model.vocab_size
        self._rng = np.random.default_rng(1)
        self._model = model

    def _run(self, base: int, ids: Sequence[int], logit_rows: int) -> int:
        logits = self._stage.run(Batch((Span(SESSION, base, tuple(ids), logit_rows),), None))
        return int(np.argmax(logits[-1])) if logit_rows else 0

    def _prompt(self, tokens: int) -> list[int]:
        self._stage.drop(SESSION)
        self._stage.open(SESSION, tokens + DECODE_STEPS)
        return [int(i) for i in self._rng.integers(3, self._vocab_size, tokens)]

    async def decode_tokens_per_second(self) -> float:
        prompt = self._prompt(self._model.decode_prompt_tokens)
        token, seconds = self._run(0, prompt, 1), []
        for row in range(len(prompt), len(prompt) + DECODE_STEPS):
            begin = time.perf_counter()
            token = self._run(row, [token], 1)
            seconds.append(time.perf_counter() - begin)
        return 1 / statistics.median(seconds)

    async def prefill_tokens_per_second(self) -> float:
        prompt = self._prompt(self._model.prefill_tokens)
        begin = time.perf_counter()
        for base in range(0, len(prompt), CHUNK_TOKENS):
            chunk = prompt[base : base + CHUNK_TOKENS]
            self._run(base, chunk, int(base + len(chunk) == len(prompt)))
        return len(prompt) / (time.perf_counter() - begin)


async def peer_rate(peer: PeerProcess, what: str, prompt: int, tokens: int) -> float:
    answer = await peer.ask(what=what, prompt=prompt, tokens=tokens)
    return (tokens if what == "decode" else prompt) / float(answer["seconds"])


def resident_mib(model: Model, executor: str) -> float:
    """What loading adds to a fresh process that has imported the executor."""
    command = [sys.executable, "-c", RESIDENT, str(model.bundle()), executor]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return (int(output[1]) - int(output[0])) / (1 << 20)


async def main() -> None:
    arguments = report.arguments(__doc__).parse_args()
    model = MODELS[arguments.model]
    rounds = arguments.rounds or model.rounds
    page = report.Report(
        "one stage with the whole model, tokens/s",
        only_json=arguments.json,
        model=model,
        prefill_tokens=model.prefill_tokens,
        chunk_tokens=CHUNK_TOKENS,
        decode_steps=DECODE_STEPS,
        rounds=rounds,
    )
    decode: dict[str, Measure] = {}
    prefill: dict[str, Measure] = {}
    async with AsyncExitStack() as stack:
        for threads in THREADS:
            for executor in EXECUTORS:
                solo = Solo(model, executor, threads)
                decode[f"{executor} {threads}"] = solo.decode_tokens_per_second
                prefill[f"{executor} {threads}"] = solo.prefill_tokens_per_second
            if not arguments.no_peers:
                peer = await stack.enter_async_context(
                    PeerProcess(peers_python(), "llamacpp.py", str(model.gguf()), "--threads", str(threads))
                )
                rate = partial(peer_rate, peer)
                name = f"llamacpp {threads}"
                decode[name] = partial(rate, "decode", model.decode_prompt_tokens, DECODE_STEPS)
                prefill[name] = partial(rate, "prefill", model.prefill_tokens, 0)
        figures: dict[str, object] = {}
        for what, arms in (("decode", decode), ("prefill", prefill)):
            for arm in arms.values():
                await arm()  # warm
            found = await in_turns(arms, rounds, tries=2)
            for name in arms:
                page.line(f"{what:8}{name:12} {listed(found.values(name))}")
                figures[f"{what}_{name.replace(' ', '_threads')}"] = found.median(name)
            for threads in THREADS:
                for other in ("onnx", "llamacpp"):
                    name = f"{what}_native_vs_{other}_threads{threads}"
                    figures[name] = found.ratio(f"native {threads}", f"{other} {threads}")
            figures[f"{what}_other_cores"] = found.other_cores
    for executor in EXECUTORS:
        figures[f"resident_mib_{executor}"] = resident_mib(model, executor)
        page.line(f"{executor}: {figures[f'resident_mib_{executor}']:.0f} MiB")
    page.end(figures)


if __name__ == "__main__":
    asyncio.run(main())
