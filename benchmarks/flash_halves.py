"""Two agents with half of the experts each against one with all: `python -m benchmarks.flash_halves [--json]`.

The whole product on one machine: coordinators, agents, CURVE links on loopback, HTTP. One device has memory for the
model; two others have memory for half of its experts each and keep them there. Who holds what is the planner's own
answer (`--split auto`): whole layers with their experts. Dense weights are few, so a row changes devices once a token
and not once a layer (ExFlow's objective, where a device's room is counted over all layers). What a row costs that asks
a peer for single experts is measured by `flash_two_agents`. Gates are the model's own: with everything in memory it
does not matter which experts they choose.

Knows: both clusters and their requests, in turns. Does not know: how a plan is made.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from benchmarks.other_work import Patience
from benchmarks.random_moe import LARGE, TINY, random_moe
from benchmarks.report import Report, arguments, say
from benchmarks.samples import in_turns
from benchmarks.streams import Prompts
from edge_runtime import AsyncClient, DeviceSpec, LocalCluster
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import Manifest
from edge_runtime.experts.flash_store import expert_bytes

ONE, TWO = "one device", "two devices"
ROUNDS = 4
PROMPT_TOKENS, NEW_TOKENS = 28, 96
KV_TOKENS = 4096  # that a coordinator wants room for
MARGIN_BYTES, SMALL_MARGIN_BYTES = 64 << 20, 512 << 20  # a small model is split evenly, wherever it has room
START_SECONDS = 300.0  # in which agents fetch what they hold


class Arm:
    """One cluster: its speed, and the ids it gave for the prompts that all arms get."""

    def __init__(self, client: AsyncClient, vocab_size: int) -> None:
        self.ids: list[tuple[int, ...]] = []
        self._client, self._prompts = client, Prompts(vocab_size)

    async def once(self) -> float:
        """Decoded tokens per second of one greedy request."""
        ids: list[int] = []
        times: list[float] = []
        prompt = self._prompts.new(PROMPT_TOKENS)
        stream = self._client.stream(prompt, max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
        async with stream as tokens:
            async for token in tokens:
                ids.append(token.id)
                times.append(time.monotonic())
        self.ids.append(tuple(ids))
        return (len(times) - 1) / (times[-1] - times[0])


def halves(rounds: int, threads: int, patience: Patience, *, small: bool) -> dict[str, Any]:
    """`two_agents_ratio` is of decoded tokens per second; `held_shares`: of all experts' bytes, by device."""
    return asyncio.run(_halves(rounds, threads, patience, small=small))


async def _halves(rounds: int, threads: int, patience: Patience, *, small: bool) -> dict[str, Any]:
    path = random_moe(TINY if small else LARGE)
    manifest = Bundle.open(path).manifest
    experts = expert_bytes(manifest, 0, manifest.num_layers - 1)
    layers = manifest.num_layers
    model_bytes = manifest.weight_bytes + layers * KV_TOKENS * manifest.model.kv_bytes_per_token_per_layer

    margin_bytes = SMALL_MARGIN_BYTES if small else MARGIN_BYTES

    def device(name: str, memory_bytes: int) -> DeviceSpec:
        return DeviceSpec(name, memory=memory_bytes + margin_bytes, threads=threads, expert_cache="all")

    half = model_bytes // 2 + model_bytes // layers  # a layer more: the head has to go somewhere
    devices = {ONE: [device("whole", model_bytes)], TWO: [device("front", half), device("back", half)]}
    async with AsyncExitStack() as stack:
        arms: dict[str, Arm] = {}
        held: list[float] = []
        for name, specs in devices.items():
            say(f"starting {', '.join(spec.name for spec in specs)}")
            cluster = LocalCluster(
                path,
                devices=specs,
                split="even" if small else "auto",
                replicas=1,
                start_timeout_seconds=START_SECONDS,
            )
            await stack.enter_async_context(cluster)
            client = await stack.enter_async_context(cluster.async_client())
            plan = (await client.status())["plan"]
            held = _held_shares(plan["stages"], manifest, experts)
            say(f"{name}: {plan['stages']}")
            arms[name] = Arm(client, manifest.model.vocab_size)
            await arms[name].once()  # warm
        found = await in_turns({name: arm.once for name, arm in arms.items()}, rounds, patience)
    least = min(len(arm.ids) for arm in arms.values())  # a sample taken again is one request more
    return {
        "two_agents_ratio": found.ratio(TWO, ONE),
        "identical": arms[ONE].ids[:least] == arms[TWO].ids[:least],
        "tokens_compared": least * NEW_TOKENS,
        "one_tokens_per_second": found.median(ONE),
        "two_tokens_per_second": found.median(TWO),
        "held_shares": held,
        "threads_of_each": threads,
        "other_cores": found.other_cores,
    }


def _held_shares(stages: Sequence[Sequence[Any]], manifest: Manifest, total_bytes: int) -> list[float]:
    return [expert_bytes(manifest, int(first), int(last)) / total_bytes for _, first, last in stages]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="a model of 3 MB: a smoke test")
    parser.add_argument("--threads", type=int, default=2, help="of each agent (default 2)")
    given = parser.parse_args()
    rounds = given.rounds or (1 if given.small else ROUNDS)
    report = Report(
        "half of the experts on each of two agents",
        only_json=given.json,
        threads=given.threads,
        rounds=rounds,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        temperature=0,
    )
    report.end(halves(rounds, given.threads, Patience(given.patience), small=given.small))


if __name__ == "__main__":
    main()
