"""Experts asked from a peer, against all in one process: `python -m benchmarks.flash_two_agents [--json]`.

What `--split experts` costs, for devices that can't run layers of their own (`flash_halves`: those that can).
One process runs all layers and holds half of the experts, the other holds the other half and answers; rows travel over
a CURVE link on loopback, with the messages and the code of agents. Routing is that of the recorded trace. Who holds
what is the planner's answer for two alike devices with room for half each, and for the uses of the trace's prompt: what
is known before the first decoded token.

On a machine with as many cores as one process has threads, the two share what the one has to itself; the output says
how many of both there are. Knows: both arms. Does not know: how a plan is made.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection

from benchmarks.flash_arm import KV_BYTES, MEMORY, Notes, Order, Replay, _generate, _route
from benchmarks.random_moe import LARGE, TINY, random_moe
from benchmarks.report import Report, arguments, say
from coordinator.placement import model_profile
from coordinator.planning import place
from coordinator.planning.model import COORDINATOR, DeviceProfile, Link, Split
from edge_runtime.agent.expert_links import ExpertLinks, ExpertMessage
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.errors import TamperedError, TransportError
from edge_runtime.experts.flash_store import ExpertLayer, expert_layers
from edge_runtime.experts.lanes import open_for_reading, read_fully
from edge_runtime.experts.loads import ExpertLoads
from edge_runtime.experts.peer_runner import PeerExperts, PeerOptions
from edge_runtime.experts.peer_server import PeerServer
from edge_runtime.experts.peer_shares import owners_of, pack_experts
from edge_runtime.experts.peer_store import PeerStore
from edge_runtime.experts.trace import read_trace
from edge_runtime.protocol.expert_messages import ExpertShare
from edge_runtime.protocol.messages import Message, PeerEntry, PeerLeaseBody
from edge_runtime.transport.mesh import Mesh
from edge_runtime.trust.identity import KeyPair, SigningKey, device_id
from edge_runtime.trust.lease import sign_lease

HERE, THERE = "here", "there"
LOOPBACK = Link(1e-3, 1e9)
LEASE = 1
ARM_SECONDS = 120.0

Held = Mapping[int, Sequence[int]]  # layer -> experts


def two_agents(order: Order) -> dict[str, object]:
    """Both arms, one after the other; `remote_experts_ratio` is of decoded tokens per second."""
    memory = _alone(order)
    say(f"one process: {order.decode_tokens / memory.decode_seconds:.2f} tokens/s")
    halves = planned_halves(order)
    shared, uses = asyncio.run(_asker(order, halves))
    say(f"two processes: {order.decode_tokens / shared.decode_seconds:.2f} tokens/s")
    return {
        "remote_experts_ratio": memory.decode_seconds / shared.decode_seconds,
        "identical": shared.digest == memory.digest,
        "one_tokens_per_second": order.decode_tokens / memory.decode_seconds,
        "two_tokens_per_second": order.decode_tokens / shared.decode_seconds,
        "threads_of_each": order.threads,
        **uses,
    }


def planned_halves(order: Order) -> tuple[Held, Held]:
    """What the device that runs the layers holds, and the other."""
    bundle = Bundle.open(order.bundle)
    layers = expert_layers(bundle, bundle.manifest.layers)
    used = Replay(read_trace(order.trace)).prompt
    uses: list[tuple[int, ...]] = [()] * bundle.manifest.num_layers
    for layer in layers:
        counts = Counter(used[layer.layer])
        uses[layer.layer] = tuple(counts[expert] for expert in range(layer.experts))
    model = model_profile(bundle.manifest, order.decode_tokens, loads=ExpertLoads(bundle.digest, tuple(uses)))
    half_bytes = -(-sum(model.layer_expert_bytes) // 2)
    devices = [
        DeviceProfile(
            name, name, 2 * bundle.manifest.weight_bytes, 1e-3, 1e-3, 1e-3, "", expert_cache_bytes=half_bytes
        )
        for name in (HERE, THERE)
    ]
    links = {(device.device_id, COORDINATOR): LOOPBACK for device in devices}
    plan = place(devices, links, model, Split("experts", devices=(HERE, THERE)))
    here, there = (
        {held.layer: held.experts for held in plan.experts if held.device_id == name}
        for name in (HERE, THERE)
    )
    return here, there


def _layers(order: Order) -> tuple[ExpertLayer, ...]:
    bundle = Bundle.open(order.bundle)
    return expert_layers(bundle, bundle.manifest.layers)


def _alone(order: Order) -> Notes:
    command = [sys.executable, "-m", "benchmarks.flash_arm", json.dumps(asdict(order))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=ARM_SECONDS, check=True)
    return Notes(**json.loads(done.stdout.splitlines()[-1]))


def _filled(layers: Sequence[ExpertLayer], held: Held) -> PeerStore:
    """Raises TamperedError where a file does not hold what the manifest names."""
    store = PeerStore(layers, held)
    files = {layer.layer: open_for_reading(layer.path, direct=False) for layer in layers}
    for layer, expert in store.experts():
        data = bytearray(layer.stride_bytes)
        read_fully(files[layer.layer], memoryview(data), layer.offset(expert))
        if not store.put(layer.layer, expert, memoryview(data)):
            raise TamperedError(f"expert {expert} of layer {layer.layer} is damaged")
    return store


def _to(links: ExpertLinks) -> Callable[[str, Message, Sequence[memoryview]], None]:
    def arrived(source: str, message: Message, payloads: Sequence[memoryview]) -> None:
        if isinstance(message, ExpertMessage):
            links.arrived(source, message, payloads)

    return arrived


async def _no_relay(*_: object) -> None:
    raise TransportError("there is no coordinator to relay")


async def _asker(order: Order, halves: tuple[Held, Held]) -> tuple[Notes, dict[str, object]]:
    """The dense part and the first half, in this process; the other half is in a child."""
    async with holder_process(order, halves[1]) as (links, own, peer):
        store = await asyncio.to_thread(_filled, _layers(order), halves[0])
        return _run(order, store, links, {own: halves[0], peer: halves[1]}, own)


@asynccontextmanager
async def holder_process(order: Order, held: Held) -> AsyncIterator[tuple[ExpertLinks, str, str]]:
    """A child that holds these experts, and links over which it answers; this process's device id, and the child's."""
    signing, key = SigningKey.generate(), KeyPair.generate()
    own = device_id(key.public)
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    child = context.Process(target=_hold, args=(theirs, order, held, signing.public, own), daemon=True)
    child.start()
    links = ExpertLinks()
    try:
        peer_key, address = await asyncio.to_thread(pipe.recv)
        peer = device_id(peer_key)
        async with (
            Mesh(key, own, signing.public, _no_relay, on_message=_to(links)) as mesh,
            asyncio.TaskGroup() as tasks,
        ):
            links.opened(mesh, tasks)
            entries = {own: PeerEntry(own, key.public, mesh.data_address)}
            entries[peer] = PeerEntry(peer, peer_key, address)
            pipe.send(sign_lease(signing, PeerLeaseBody(LEASE, peer, (entries[own],))))
            mesh.apply_lease(sign_lease(signing, PeerLeaseBody(LEASE, own, (entries[peer],))))
            await asyncio.to_thread(pipe.recv)
            await links.reach([peer])
            links.begin(LEASE)
            yield links, own, peer
    finally:
        child.terminate()
        child.join()


def _run(
    order: Order, store: PeerStore, links: ExpertLinks, held: Mapping[str, Held], own: str
) -> tuple[Notes, dict[str, object]]:
    bundle = Bundle.open(order.bundle)
    counts = {layer.layer: layer.experts for layer in store.layers.values()}
    shares = [
        ExpertShare(device, layer, pack_experts(experts, counts[layer]))
        for device, of in held.items()
        for layer, experts in of.items()
    ]
    options = PeerOptions(store, owners_of(shares, own, counts), links)
    layers = LayerRange(0, bundle.manifest.num_layers - 1)
    stage = CpuStage.load(bundle, layers, threads=order.threads, kv_budget_bytes=KV_BYTES, experts=options)
    notes, replay = Notes(), Replay(read_trace(order.trace))
    _route(order, bundle, stage, replay, notes)
    try:
        _generate(order, stage, replay, notes)
        experts = stage.peer_experts
        if not isinstance(experts, PeerExperts):
            return notes, {}
        found = experts.statistics
        return notes, {
            "held_share": store.held_bytes / store.total_bytes,
            "local_use_share": found.local_uses / (found.local_uses + found.peer_uses),
            "requests": found.requests,
        }
    finally:
        stage.close()


def _hold(pipe: Connection, order: Order, held: Held, signing_key: bytes, asker: str) -> None:
    asyncio.run(_answer(pipe, order, held, signing_key, asker))


async def _answer(pipe: Connection, order: Order, held: Held, signing_key: bytes, asker: str) -> None:
    """Until the process is ended."""
    key, links = KeyPair.generate(), ExpertLinks()
    async with (
        Mesh(key, device_id(key.public), signing_key, _no_relay, on_message=_to(links)) as mesh,
        asyncio.TaskGroup() as tasks,
    ):
        links.opened(mesh, tasks)
        pipe.send((key.public, mesh.data_address))
        store = await asyncio.to_thread(_filled, _layers(order), held)
        mesh.apply_lease(await asyncio.to_thread(pipe.recv))
        activations = dict.fromkeys(held, "silu")
        links.begin(LEASE, PeerServer(store, activations, threads=order.threads), (asker,))
        pipe.send("ready")
        await asyncio.get_running_loop().create_future()


def main() -> None:
    from benchmarks.flash import QWEN

    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="a model of 3 MB: a smoke test")
    parser.add_argument("--threads", type=int, default=2, help="of each process (default 2)")
    parser.add_argument("--tokens", type=int, default=128, help="decoded (default 128)")
    given = parser.parse_args()
    report = Report("experts on two devices", only_json=given.json, threads=given.threads)
    bundle = str(random_moe(TINY if given.small else LARGE))
    order = Order(MEMORY, bundle, trace=str(QWEN), threads=given.threads, decode_tokens=given.tokens)
    report.end(two_agents(order))


if __name__ == "__main__":
    main()
