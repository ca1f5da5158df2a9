"""Writing a bundle, one slice at a time, with nothing but the current array in memory.

Knows: alignment, hashing while writing, naming by content, signing. Does not know: where weights come from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from edge_runtime.bundle.bundle import MANIFEST_FILE, SIGNATURE_FILE, SLICE_DIRECTORY
from edge_runtime.bundle.checks import check_manifest
from edge_runtime.bundle.hashing import sha256_digest
from edge_runtime.bundle.json_codec import to_canonical_json
from edge_runtime.bundle.manifest import SLICE_ALIGNMENT_BYTES, Manifest, Part, Slice
from edge_runtime.bundle.signing import BundleSigningKey
from edge_runtime.core import Digest


class SliceWriter:
    """Appends arrays to one slice."""

    def __init__(self, key: str, file: BinaryIO) -> None:
        self.key = key
        self.size_bytes = 0
        self._file = file
        self._sha256 = hashlib.sha256()
        self._blake3 = blake3()

    def add(
        self, array: NDArray[np.generic] | bytes, *, alignment_bytes: int = SLICE_ALIGNMENT_BYTES
    ) -> Part:
        """Append, aligned, and say where it is. Bytes become a uint8 array."""
        if isinstance(array, bytes):
            array = np.frombuffer(array, np.uint8)
        self.pad(alignment_bytes)
        offset_bytes = self.size_bytes
        self._write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return Part(self.key, offset_bytes, str(array.dtype), tuple(array.shape))

    def pad(self, alignment_bytes: int = SLICE_ALIGNMENT_BYTES) -> None:
        if rest := -self.size_bytes % alignment_bytes:
            self._write(bytes(rest))

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._blake3.update(data)
        self.size_bytes += len(data)

    def result(self) -> Slice:
        return Slice(Digest("sha256:" + self._sha256.hexdigest()), self._blake3.hexdigest(), self.size_bytes)


class BundleWriter:
    """Writes slices, then the signed manifest. The directory is a bundle only once `finish` has returned."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._slices: dict[str, Slice] = {}
        (self.path / SLICE_DIRECTORY).mkdir(parents=True, exist_ok=True)

    @property
    def slices(self) -> Mapping[str, Slice]:
        return self._slices

    @contextmanager
    def slice(self, key: str) -> Iterator[SliceWriter]:
        """`with writer.slice("layers.3") as out: part = out.add(array)`; the file gets its name at the end."""
        if key in self._slices:
            raise ValueError(f"slice {key} was written already")
        temporary = self.path / SLICE_DIRECTORY / f".{key}.writing"
        try:
            with temporary.open("wb") as file:
                out = SliceWriter(key, file)
                yield out
                out.pad()
            entry = out.result()
            temporary.rename(self.path / SLICE_DIRECTORY / entry.digest.removeprefix("sha256:"))
        finally:
            temporary.unlink(missing_ok=True)
        self._slices[key] = entry

    def add_file(self, key: str, data: bytes) -> None:
        """A slice that is one plain file (the tokenizer), unpadded."""
        entry = Slice(sha256_digest(data), blake3(data).hexdigest(), len(data))
        (self.path / SLICE_DIRECTORY / entry.digest.removeprefix("sha256:")).write_bytes(data)
        self._slices[key] = entry

    def finish(self, build: Callable[[Mapping[str, Slice]], Manifest], key: BundleSigningKey) -> Digest:
        """Build the manifest from the slices written, check it, sign it, write both. Returns the bundle's digest."""
        manifest = build(dict(self._slices))
        check_manifest(manifest)
        data = to_canonical_json(manifest)
        (self.path / SIGNATURE_FILE).write_bytes(key.sign(data))
        (self.path / MANIFEST_FILE).write_bytes(data)
        return sha256_digest(data)
