"""Misses to flash alone, against flash and a peer's memory: `python -m benchmarks.flash_helped [--json]`.

One process runs all layers with a cache of 25 % of the experts; another holds three of four in memory and answers over
a CURVE link on loopback, with the messages and the code of agents. Routing is that of the recorded trace. First with
the flash of this machine; then with flash that takes ten times as long for a third of the tokens, in both arms (reads
by lanes that sleep): where do misses go before, meanwhile and after?

On a machine with as many cores as one process has threads, the peer computes at this one's expense.

Knows: the arms and what they note. Does not know: how it is decided (`edge_runtime.experts.miss_split`).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from benchmarks.flash_arm import KV_BYTES, MEMORY, SESSION, Notes, Order, Replay, _route
from benchmarks.flash_two_agents import holder_process
from benchmarks.random_moe import LARGE, TINY, random_moe
from benchmarks.report import Report, arguments, say
from edge_runtime.agent.expert_links import ExpertLinks
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange
from edge_runtime.engine.base import Batch, Span
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.experts.cache import CacheOptions
from edge_runtime.experts.flash_and_peers import FlashAndPeers, HelpedOptions
from edge_runtime.experts.flash_store import expert_layers
from edge_runtime.experts.lanes import read_into
from edge_runtime.experts.peer_shares import LayerHolders
from edge_runtime.experts.trace import read_trace

CACHE_SHARE = 0.25
SLOWER = 10.0
PHASES = ("before", "slow", "after")


class SlowingFlash:
    """Reads that take `SLOWER` times as long while `is_slow`."""

    def __init__(self) -> None:
        self.is_slow = False

    def read(self, descriptor: int, target: memoryview, offset_bytes: int) -> int:
        begin = time.perf_counter()
        count = read_into(descriptor, target, offset_bytes)
        if self.is_slow:
            time.sleep((SLOWER - 1) * (time.perf_counter() - begin))
        return count


@dataclass
class Arm:
    """By phase: tokens/s, and of the uses that memory lacked, the share that the peer computed."""

    tokens_per_second: dict[str, float] = field(default_factory=dict)
    asked_share: dict[str, float] = field(default_factory=dict)
    prefill_seconds: float = 0.0
    digest: str = ""


def helped(order: Order) -> dict[str, object]:
    return asyncio.run(_helped(order))


async def _helped(order: Order) -> dict[str, object]:
    bundle = Bundle.open(order.bundle)
    layers = expert_layers(bundle, bundle.manifest.layers)
    held = {layer.layer: [expert for expert in range(layer.experts) if expert % 4] for layer in layers}
    budget_bytes = int(CACHE_SHARE * sum(layer.total_bytes for layer in layers))
    arms: dict[str, Arm] = {}
    async with holder_process(order, held) as (links, _, peer):
        holders = {
            layer.layer: LayerHolders((peer,), np.isin(range(layer.experts), held[layer.layer])[None])
            for layer in layers
        }
        for flash, slowing in (("this flash", None), ("slowing flash", SlowingFlash())):
            for name in ("alone", "both"):
                options = CacheOptions(budget_bytes, lanes=order.lanes)
                if slowing is not None:
                    options = CacheOptions(budget_bytes, lanes=order.lanes, read=slowing.read)
                asked = {} if name == "alone" else holders
                arm = _run(order, bundle, options, asked, links, slowing)
                arms[f"{flash}, {name}"] = arm
                say(f"{flash}, {name}: {_rounded(arm.tokens_per_second)} {_rounded(arm.asked_share)}")
    return {
        "identical": len({arm.digest for arm in arms.values()}) == 1,
        "tokens_per_second": {name: _rounded(arm.tokens_per_second) for name, arm in arms.items()},
        "asked_share": {name: _rounded(arm.asked_share) for name, arm in arms.items() if "both" in name},
        "prefill_seconds": {name: round(arm.prefill_seconds, 2) for name, arm in arms.items()},
    }


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {key: round(value, 2) for key, value in values.items()}


def _run(
    order: Order,
    bundle: Bundle,
    options: CacheOptions,
    holders: Mapping[int, LayerHolders],
    links: ExpertLinks,
    slowing: SlowingFlash | None,
) -> Arm:
    """Without holders: flash alone."""
    experts = HelpedOptions(options, holders, links) if holders else options
    stage = CpuStage.load(
        bundle,
        LayerRange(0, bundle.manifest.num_layers - 1),
        threads=order.threads,
        kv_budget_bytes=KV_BYTES,
        experts=experts,
    )
    source = stage.peer_experts if isinstance(stage.peer_experts, FlashAndPeers) else None
    if source is not None:
        source.open()
    replay = Replay(read_trace(order.trace))
    _route(order, bundle, stage, replay, Notes())
    try:
        return _generate(order, stage, replay, slowing)
    finally:
        stage.close()


def _generate(order: Order, stage: CpuStage, replay: Replay, slowing: SlowingFlash | None) -> Arm:
    arm, found = Arm(), hashlib.sha256()
    ids = np.random.default_rng(1).integers(1, stage.model.vocab_size, order.prompt_tokens).tolist()
    stage.open(SESSION, order.prompt_tokens + order.decode_tokens)

    def step(base: int, rows: list[int]) -> int:
        logits = stage.run(Batch((Span(SESSION, base, tuple(rows), 1),), None))
        found.update(logits.tobytes())
        return int(logits[-1].argmax())

    replay.token = -1
    begin = time.perf_counter()
    token = step(0, ids)
    arm.prefill_seconds = time.perf_counter() - begin
    each = order.decode_tokens // len(PHASES)
    for number, phase in enumerate(PHASES):
        if slowing is not None:
            slowing.is_slow = phase == "slow"
        before, begin = _counted(stage), time.perf_counter()
        for index in range(number * each, (number + 1) * each):
            replay.token = index
            token = step(order.prompt_tokens + index, [token])
        arm.tokens_per_second[phase] = each / (time.perf_counter() - begin)
        asked, read = (now - old for now, old in zip(_counted(stage), before, strict=True))
        arm.asked_share[phase] = asked / max(1, asked + read)
    if slowing is not None:
        slowing.is_slow = False
    stage.drop(SESSION)
    arm.digest = found.hexdigest()
    return arm


def _counted(stage: CpuStage) -> tuple[int, int]:
    """Uses that a peer computed, experts read."""
    source = stage.peer_experts
    asked = source.statistics.asked_uses if isinstance(source, FlashAndPeers) else 0
    assert stage.experts is not None
    return asked, stage.experts.statistics.total.misses


def main() -> None:
    from benchmarks.flash import QWEN

    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="a model of 3 MB: a smoke test")
    parser.add_argument("--threads", type=int, default=2, help="of each process (default 2)")
    parser.add_argument("--tokens", type=int, default=126, help="decoded (default 126)")
    given = parser.parse_args()
    report = Report("misses to flash or a peer", only_json=given.json, threads=given.threads)
    bundle = str(random_moe(TINY if given.small else LARGE))
    order = Order(MEMORY, bundle, trace=str(QWEN), threads=given.threads, decode_tokens=given.tokens)
    report.end(helped(order))


if __name__ == "__main__":
    main()
