"""Slices come from a coordinator that is slow, breaks off, lies, or is fine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.agent.slice_fetcher import SliceChannel, SliceFetcher
from edge_runtime.bundle import Bundle, BundleSigningKey, BundleStore, BundleWriter
from edge_runtime.bundle.manifest import Block, Manifest, ModelInfo, Slice, Tensor
from edge_runtime.bundle.operations import Operation
from edge_runtime.errors import BundleError, ConnectionClosed, TamperedError, TransportError, TrustError
from edge_runtime.protocol.messages import MAX_CHUNK_BYTES, SliceChunk, SliceRequest

KEY = BundleSigningKey(bytes(range(32)))
KEYS = ("embedding", "tokenizer")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("fetch") / "bundle"
    weights = np.random.default_rng(0).random((700, 1000), np.float32)  # 2.7 MiB: three chunks
    writer = BundleWriter(path)
    with writer.slice("embedding") as out:
        part = out.add(weights)
    writer.add_file("tokenizer", b"{}")
    embed = Operation("embedding", "/model/embed", (), ("hidden",), {"weight": "w"}, {"factor": 1.0})

    def build(slices: Mapping[str, Slice]) -> Manifest:
        return Manifest(
            ModelInfo("tiny", "test", "generator", 1000, 700, 16, 8, (0,), -1, "fp32"),
            Block("embedding", (embed,), (), ("embedding",), weights.nbytes),
            (Block("layers.0", (), (), (), 0),),
            Block("head", (), (), (), 0),
            {"w": Tensor("fp32", (700, 1000), {"data": part})},
            slices,
            {},
            "tokenizer",
            "",
            {},
        )

    writer.finish(build, KEY)
    return Bundle.open(path)


class Coordinator:
    """Serves a bundle; `mischief` sees every request first and may answer differently (True: it has dealt with it)."""

    def __init__(self, bundle: Bundle, mischief: Callable[[SliceRequest], bool] = lambda r: False) -> None:
        self.bundle = bundle
        self.mischief = mischief
        self.requests: list[SliceRequest] = []
        self.channel = SliceChannel(self.ask, chunk_seconds=5.0)

    async def ask(self, request: SliceRequest) -> None:
        self.requests.append(request)
        if not self.mischief(request):
            self.serve(request)

    def serve(self, request: SliceRequest, change: Callable[[bytes], bytes] = lambda data: data) -> None:
        data, total = self.bundle.read(request.slice, request.offset_bytes, request.length_bytes)
        chunk = SliceChunk(request.bundle, request.slice, request.offset_bytes, total)
        asyncio.get_running_loop().call_soon(self.channel.arrived, chunk, [memoryview(change(data))])

    async def fetch(self, store: BundleStore, progress: list[tuple[str, int, int]] | None = None) -> Bundle:
        with ThreadPoolExecutor(1) as disk:
            fetcher = SliceFetcher(store, self.channel, {KEY.public_bytes}, disk)
            partial = await fetcher.manifest(str(self.bundle.digest))
            await fetcher.slices(
                partial, KEYS, lambda *step: None if progress is None else progress.append(step)
            )
        return partial.open()


async def test_a_bundle_arrives_whole_with_growing_progress(bundle: Bundle, tmp_path: Path) -> None:
    coordinator, progress = Coordinator(bundle), []
    copy = await coordinator.fetch(BundleStore(tmp_path), progress)
    copy.verify(KEYS)
    done = [step[1] for step in progress]
    assert done == sorted(done)
    assert done[-1] == progress[-1][2] == sum(bundle.manifest.slices[key].size_bytes for key in KEYS)


async def test_what_is_here_is_not_asked_for_again(bundle: Bundle, tmp_path: Path) -> None:
    store = BundleStore(tmp_path)
    await Coordinator(bundle).fetch(store)
    again = Coordinator(bundle)
    await again.fetch(store)
    assert again.requests == []


async def test_the_next_plan_goes_on_where_a_broken_link_stopped(bundle: Bundle, tmp_path: Path) -> None:
    def break_off(request: SliceRequest) -> bool:
        if request.offset_bytes == MAX_CHUNK_BYTES:
            asyncio.get_running_loop().call_later(0.01, coordinator.channel.link_lost)
        return request.offset_bytes >= MAX_CHUNK_BYTES

    store = BundleStore(tmp_path)
    coordinator = Coordinator(bundle, break_off)
    with pytest.raises(ConnectionClosed):
        await coordinator.fetch(store)
    again = Coordinator(bundle)
    (await again.fetch(store)).verify(KEYS)
    asked = [r.offset_bytes for r in again.requests if r.slice == "embedding"]
    assert asked == [MAX_CHUNK_BYTES, 2 * MAX_CHUNK_BYTES]


async def test_a_chunk_that_got_lost_is_asked_for_again(bundle: Bundle, tmp_path: Path) -> None:
    def lose_one(request: SliceRequest) -> bool:
        lost.append(request)
        return len(lost) in (2, 4)

    lost: list[SliceRequest] = []
    coordinator = Coordinator(bundle, lose_one)
    coordinator.channel = SliceChannel(coordinator.ask, chunk_seconds=0.1)
    (await coordinator.fetch(BundleStore(tmp_path))).verify(KEYS)
    places = [(request.slice, request.offset_bytes) for request in lost]
    assert places.count(places[1]) > 1
    assert places.count(places[3]) > 1


async def test_a_part_that_was_complete_but_unchecked_is_checked(bundle: Bundle, tmp_path: Path) -> None:
    store = BundleStore(tmp_path)
    data, _ = bundle.read("embedding", 0, 1 << 30)
    name = bundle.manifest.slices["embedding"].digest.removeprefix("sha256:")
    (store.slice_directory / f"{name}.part").write_bytes(data)
    coordinator = Coordinator(bundle)
    (await coordinator.fetch(store)).verify(KEYS)
    assert not [r for r in coordinator.requests if r.slice == "embedding"]


async def test_a_tampered_slice_is_refused_by_name(bundle: Bundle, tmp_path: Path) -> None:
    def tamper(request: SliceRequest) -> bool:
        if request.slice != "embedding" or request.offset_bytes == 0:
            return False
        coordinator.serve(request, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
        return True

    coordinator = Coordinator(bundle, tamper)
    with pytest.raises(TamperedError, match="slice embedding"):
        await coordinator.fetch(BundleStore(tmp_path))


async def test_a_bundle_of_another_signer_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    coordinator = Coordinator(bundle)
    with ThreadPoolExecutor(1) as disk:
        fetcher = SliceFetcher(BundleStore(tmp_path), coordinator.channel, {bytes(32)}, disk)
        with pytest.raises(TrustError):
            await fetcher.manifest(str(bundle.digest))


async def test_a_refusal_is_passed_on(bundle: Bundle, tmp_path: Path) -> None:
    def refuse(request: SliceRequest) -> bool:
        asyncio.get_running_loop().call_soon(coordinator.channel.refused, "there is no such bundle", "")
        return True

    coordinator = Coordinator(bundle, refuse)
    with pytest.raises(BundleError, match="no such bundle"):
        await coordinator.fetch(BundleStore(tmp_path))
    assert coordinator.channel.refused("again", "") is False


async def test_a_silent_coordinator_is_given_up(bundle: Bundle, tmp_path: Path) -> None:
    coordinator = Coordinator(bundle, lambda request: True)
    coordinator.channel = SliceChannel(coordinator.ask, chunk_seconds=0.001)
    with pytest.raises(TransportError, match="no chunk"):
        await coordinator.fetch(BundleStore(tmp_path))


@pytest.mark.parametrize("payloads", [[], [b"a", b"b"], [bytes(MAX_CHUNK_BYTES + 1)]])
async def test_a_malformed_chunk_is_refused(bundle: Bundle, tmp_path: Path, payloads: list[bytes]) -> None:
    def malformed(request: SliceRequest) -> bool:
        chunk = SliceChunk(request.bundle, request.slice, request.offset_bytes, 10)
        views = [memoryview(p) for p in payloads]
        asyncio.get_running_loop().call_soon(coordinator.channel.arrived, chunk, views)
        return True

    coordinator = Coordinator(bundle, malformed)
    with pytest.raises(BundleError):
        await coordinator.fetch(BundleStore(tmp_path))
