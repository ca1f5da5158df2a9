"""Bringing a bundle's slices from the coordinator into the store on this device, a few chunks ahead of the disk.

Knows: the two transfer messages, resuming, and progress. Does not know: links (it is given a way to send), or what
the slices are for. The store checks every byte against the signed manifest.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import Executor
from typing import TypeVar

from edge_runtime.bundle.bundle import MANIFEST_FILE, MAX_MANIFEST_BYTES, SIGNATURE_FILE
from edge_runtime.bundle.store import BundleStore, PartialBundle
from edge_runtime.errors import BundleError, ConnectionClosed, TransportError
from edge_runtime.protocol.messages import MAX_CHUNK_BYTES, SliceChunk, SliceRequest

CHUNKS_AHEAD = 4  # requests in flight: hides a round trip, and holds at most this many chunks in memory
CHUNK_SECONDS = 30.0
MAX_FRUITLESS_TRIES = 5  # of one chunk, before the transfer is given up
MAX_SIGNATURE_BYTES = 4096

Result = TypeVar("Result")
Chunk = tuple[memoryview, int]  # bytes, total size of the slice
Progress = Callable[[str, int, int], None]  # activity, done bytes, total bytes
Ask = Callable[[SliceRequest], Awaitable[None]]
Key = tuple[str, str, int]  # bundle, slice, offset


class SliceChannel:
    """Matches requests with the chunks that answer them."""

    def __init__(self, ask: Ask, *, chunk_seconds: float = CHUNK_SECONDS) -> None:
        self._ask = ask
        self._chunk_seconds = chunk_seconds
        self._waiting: dict[Key, asyncio.Future[Chunk]] = {}

    async def ask(
        self, bundle: str, slice_key: str, offset_bytes: int, length_bytes: int = MAX_CHUNK_BYTES
    ) -> asyncio.Future[Chunk]:
        """Send a request; `answer` waits for what comes. Cancel the future when it is not wanted any more."""
        key = (bundle, slice_key, offset_bytes)
        future: asyncio.Future[Chunk] = asyncio.get_running_loop().create_future()
        self._waiting[key] = future
        future.add_done_callback(lambda done: self._forget(key, done))
        try:
            await self._ask(SliceRequest(bundle, slice_key, offset_bytes, length_bytes))
        except BaseException:
            future.cancel()
            raise
        return future

    async def answer(self, future: asyncio.Future[Chunk]) -> Chunk:
        """Raises BundleError (refused, malformed), ConnectionClosed, TransportError (no answer in time)."""
        try:
            async with asyncio.timeout(self._chunk_seconds):
                return await future
        except TimeoutError:
            raise TransportError(
                f"the coordinator sent no chunk for {self._chunk_seconds:g} s", hint="is it still running?"
            ) from None

    def _forget(self, key: Key, future: asyncio.Future[Chunk]) -> None:
        if self._waiting.get(key) is future:
            del self._waiting[key]

    def arrived(self, chunk: SliceChunk, payloads: Sequence[memoryview]) -> None:
        """A chunk nobody waits for any more is dropped."""
        future = self._waiting.get((chunk.bundle, chunk.slice, chunk.offset_bytes))
        if future is None or future.done():
            return
        if len(payloads) != 1 or chunk.total_bytes < 0 or len(payloads[0]) > MAX_CHUNK_BYTES:
            future.set_exception(BundleError(f"slice {chunk.slice[:80]}: the chunk is malformed"))
        else:
            future.set_result((payloads[0], chunk.total_bytes))

    def refused(self, reason: str, hint: str) -> bool:
        """The coordinator will not serve what was asked; False where nothing was asked."""
        return self._fail(BundleError(reason, hint=hint))

    def link_lost(self) -> None:
        self._fail(ConnectionClosed("the link to the coordinator broke"))

    def _fail(self, problem: Exception) -> bool:
        waiting = [future for future in self._waiting.values() if not future.done()]
        for future in waiting:
            future.set_exception(problem)
        return bool(waiting)


class SliceFetcher:
    def __init__(
        self,
        store: BundleStore,
        channel: SliceChannel,
        trusted: Collection[bytes],
        disk: Executor,
    ) -> None:
        """`trusted`: public keys of accepted signers. `disk` has one thread: what a cancelled transfer still writes is
        written before the next one looks where to go on."""
        self._store = store
        self._channel = channel
        self._trusted = trusted
        self._disk = disk
        self._one_at_a_time = asyncio.Lock()  # a plan and a measurement may want the same slice

    async def manifest(self, bundle: str) -> PartialBundle:
        """From the disk, or fetched and checked. Raises BundleError, TamperedError, TrustError."""
        if self._store.has(bundle):
            return await self._on_disk(lambda: self._store.partial(bundle))
        manifest = await self._read_all(bundle, MANIFEST_FILE, MAX_MANIFEST_BYTES)
        signature = await self._read_all(bundle, SIGNATURE_FILE, MAX_SIGNATURE_BYTES)
        return await asyncio.to_thread(self._store.begin, bundle, manifest, signature, trusted=self._trusted)

    async def slices(self, partial: PartialBundle, keys: Collection[str], progress: Progress) -> None:
        """Fetch what is missing of `keys`. Raises BundleError, TamperedError (names the slice), TransportError."""
        sizes = {key: partial.manifest.slices[key].size_bytes for key in keys}
        missing = await self._on_disk(lambda: partial.missing(keys))
        total_bytes = sum(sizes.values())
        done_bytes = total_bytes - sum(sizes[key] for key in missing)
        for key in missing:

            def here(bytes_here: int, before_bytes: int = done_bytes) -> None:
                progress("fetching", before_bytes + bytes_here, total_bytes)

            async with self._one_at_a_time:
                await self._slice(partial, key, here)
            done_bytes += sizes[key]
        progress("fetching", total_bytes, total_bytes)

    async def read(self, bundle: str, key: str, offset_bytes: int, length_bytes: int) -> bytes:
        """A piece of a slice, unchecked: for a caller who knows what it must hash to. Raises as `slices` does."""
        data = bytearray()
        tries = 0
        while len(data) < length_bytes:
            try:
                left_bytes = min(length_bytes - len(data), MAX_CHUNK_BYTES)
                future = await self._channel.ask(bundle, key, offset_bytes + len(data), left_bytes)
                chunk, _ = await self._channel.answer(future)
            except TransportError as problem:
                tries += 1
                _raise_unless_worth_a_try(problem, tries)
                continue
            if not chunk:
                raise BundleError(f"slice {key}: the sender's copy ends at byte {offset_bytes + len(data)}")
            data += chunk[: length_bytes - len(data)]
        return bytes(data)

    async def _slice(self, partial: PartialBundle, key: str, here: Callable[[int], None]) -> None:
        size_bytes = partial.manifest.slices[key].size_bytes
        tries = 0
        while await self._on_disk(lambda: partial.missing([key])):
            start_bytes = await self._on_disk(lambda: partial.received_bytes(key))
            try:
                await self._stream(partial, key, start_bytes, size_bytes, here)
            except TransportError as problem:
                here_bytes = await self._on_disk(lambda: partial.received_bytes(key))
                tries = 0 if here_bytes > start_bytes else tries + 1
                _raise_unless_worth_a_try(problem, tries)

    async def _stream(
        self, partial: PartialBundle, key: str, start_bytes: int, size_bytes: int, here: Callable[[int], None]
    ) -> None:
        """Chunks are asked for ahead and written in order."""
        bundle = str(partial.digest)
        offsets = deque(range(start_bytes, size_bytes, MAX_CHUNK_BYTES))
        asked: deque[tuple[int, asyncio.Future[Chunk]]] = deque()
        try:
            while offsets or asked:
                while offsets and len(asked) < CHUNKS_AHEAD:
                    asked.append((offsets[0], await self._channel.ask(bundle, key, offsets.popleft())))
                offset, future = asked[0]
                data, total = await self._channel.answer(future)
                asked.popleft()
                if total != size_bytes or len(data) != min(MAX_CHUNK_BYTES, size_bytes - offset):
                    raise BundleError(f"slice {key}: the sender's copy is not the size the manifest says")
                await self._on_disk(functools.partial(partial.write_chunk, key, offset, data))
                here(offset + len(data))
        finally:
            for _, future in asked:
                future.cancel()
                if not future.cancelled():
                    future.exception()  # seen: the first failure is the one that is told
        if start_bytes == size_bytes:  # all bytes were here, unchecked, when the agent was stopped
            await self._on_disk(lambda: partial.write_chunk(key, size_bytes, b""))

    async def _on_disk(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)

    async def _read_all(self, bundle: str, name: str, limit_bytes: int) -> bytes:
        data = bytearray()
        tries = 0
        while True:
            try:
                future = await self._channel.ask(bundle, name, len(data))
                chunk, total = await self._channel.answer(future)
            except TransportError as problem:
                tries += 1
                _raise_unless_worth_a_try(problem, tries)
                continue
            if not chunk or len(data) + len(chunk) > total or total > limit_bytes:
                raise BundleError(f"{name} of {bundle} is empty, too large or does not add up")
            data += chunk
            if len(data) == total:
                return bytes(data)


def _raise_unless_worth_a_try(problem: TransportError, tries: int) -> None:
    """A broken link ends the plan that wanted the slices; the next plan goes on where this one stopped."""
    if isinstance(problem, ConnectionClosed) or tries >= MAX_FRUITLESS_TRIES:
        raise problem
