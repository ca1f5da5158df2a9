"""The bundle, served to devices in chunks.

The manifest is signed again by this coordinator: its key is the one that a device learnt when it was paired, so devices
need to trust no exporter. The exporter's own signature was checked when the bundle was opened here.

Knows: one bundle's files. Does not know: who asks, or links.
"""

from __future__ import annotations

import asyncio

from edge_runtime.bundle import Bundle, BundleSigningKey
from edge_runtime.bundle.bundle import MANIFEST_FILE, SIGNATURE_FILE
from edge_runtime.errors import ProtocolError
from edge_runtime.protocol.messages import MAX_CHUNK_BYTES, SliceChunk, SliceRequest

MAX_READS = 4  # at a time, over all devices: a flash drive answers no faster with more


class SliceServer:
    def __init__(self, bundle: Bundle, signing_secret: bytes) -> None:
        manifest, _ = bundle.read(MANIFEST_FILE, 0, 1 << 40)
        self._bundle = bundle
        self._signature = BundleSigningKey(signing_secret).sign(manifest)
        self._reads = asyncio.Semaphore(MAX_READS)

    async def answer(self, request: SliceRequest) -> tuple[SliceChunk, bytes]:
        """Raises ProtocolError for what no honest device asks."""
        self._check(request)
        start, end = request.offset_bytes, request.offset_bytes + request.length_bytes
        if request.slice == SIGNATURE_FILE:
            data, total_bytes = self._signature[start:end], len(self._signature)
        else:
            async with self._reads:
                data, total_bytes = await asyncio.to_thread(
                    self._bundle.read, request.slice, start, request.length_bytes
                )
        return SliceChunk(request.bundle, request.slice, start, total_bytes), data

    def _check(self, request: SliceRequest) -> None:
        if request.bundle != self._bundle.digest:
            raise ProtocolError(f"bundle {request.bundle[:80]!r} is not the one this coordinator serves")
        if request.slice not in self._bundle.manifest.slices and request.slice not in (
            MANIFEST_FILE,
            SIGNATURE_FILE,
        ):
            raise ProtocolError(f"the bundle has no slice {request.slice[:80]!r}")
        if request.offset_bytes < 0 or not 0 < request.length_bytes <= MAX_CHUNK_BYTES:
            raise ProtocolError(
                f"a chunk of {request.length_bytes} bytes at {request.offset_bytes} can't be served"
            )
