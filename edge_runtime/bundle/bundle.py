"""An opened bundle: a checked manifest over mapped slices.

Knows: files of one bundle and how to map arrays out of them. Does not know: transfer, export, execution.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from edge_runtime.bundle.checks import check_manifest
from edge_runtime.bundle.hashing import digest_hex, sha256_digest
from edge_runtime.bundle.json_codec import from_json
from edge_runtime.bundle.manifest import Manifest, Part
from edge_runtime.bundle.signing import verify_signature
from edge_runtime.core import Digest
from edge_runtime.errors import BundleError, TamperedError

MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "manifest.sig"
SLICE_DIRECTORY = "slices"
MAX_MANIFEST_BYTES = 64 << 20


def read_manifest(manifest: bytes, signature: bytes, trusted: Collection[bytes] | None) -> Manifest:
    """Signature first, then parse, then check every reference. Raises BundleError, TamperedError, TrustError."""
    verify_signature(manifest, signature, trusted)
    parsed = from_json(Manifest, manifest, what=MANIFEST_FILE)
    check_manifest(parsed)
    return parsed


class Bundle:
    """Read-only view of a bundle directory. Slices are mapped on first use and checked (BLAKE3) then.

    Not every slice needs to be there: a device holds those of its layers. Mapped arrays stay valid after `close`
    as long as something refers to them.
    """

    def __init__(
        self, path: Path, manifest_bytes: bytes, signature: bytes, manifest: Manifest, slices: Path
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.digest: Digest = sha256_digest(manifest_bytes)
        self._files = {MANIFEST_FILE: manifest_bytes, SIGNATURE_FILE: signature}
        self._slice_directory = slices
        self._maps: dict[str, memoryview] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        trusted: Collection[bytes] | None = None,
        slice_directory: Path | None = None,
    ) -> Bundle:
        """`trusted`: public keys of accepted signers; None accepts any valid signature."""
        path = Path(path)
        try:
            if (path / MANIFEST_FILE).stat().st_size > MAX_MANIFEST_BYTES:
                raise BundleError(f"{path / MANIFEST_FILE} is too large")
            manifest_bytes = (path / MANIFEST_FILE).read_bytes()
            signature = (path / SIGNATURE_FILE).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(
                f"{path} is not a bundle: {MANIFEST_FILE} or {SIGNATURE_FILE} is missing",
                hint="make one with: edge-runtime export CHECKPOINT BUNDLE",
            ) from None
        manifest = read_manifest(manifest_bytes, signature, trusted)
        return cls(path, manifest_bytes, signature, manifest, slice_directory or path / SLICE_DIRECTORY)

    def slice_path(self, key: str) -> Path:
        entry = self.manifest.slices.get(key)
        if entry is None:
            raise BundleError(f"the bundle has no slice {key[:80]!r}")
        return self._slice_directory / digest_hex(entry.digest)

    def has_slice(self, key: str) -> bool:
        path = self.slice_path(key)
        return path.exists() and path.stat().st_size == self.manifest.slices[key].size_bytes

    def slice_bytes(self, key: str) -> memoryview:
        """The whole slice, mapped read-only. Raises TamperedError where the bytes are not those that were signed."""
        view = self._maps.get(key)
        if view is None:
            view = self._map(key)
            self._maps[key] = view
        return view

    def _map(self, key: str) -> memoryview:
        path = self.slice_path(key)
        entry = self.manifest.slices[key]
        try:
            with path.open("rb") as file:
                size_bytes = path.stat().st_size
                view = (
                    memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                    if size_bytes
                    else memoryview(b"")
                )
        except FileNotFoundError:
            raise BundleError(
                f"slice {key} of {self.path} is missing", hint="fetch or export the bundle again"
            ) from None
        if size_bytes != entry.size_bytes or blake3(view).hexdigest() != entry.blake3:
            raise TamperedError(
                f"slice {key} does not match the signed manifest",
                hint=f"delete {path} and fetch or export it again",
            )
        return view

    def part(self, part: Part) -> NDArray[np.generic]:
        """A read-only array over the mapped slice; nothing is copied."""
        count = math.prod(part.shape)
        dtype = np.dtype(part.dtype)
        view = self.slice_bytes(part.slice)[part.offset_bytes : part.offset_bytes + count * dtype.itemsize]
        return np.frombuffer(view, dtype).reshape(part.shape)

    def read(self, key: str, offset_bytes: int, length_bytes: int) -> tuple[bytes, int]:
        """(bytes, total size) of a slice or a manifest file, unchecked: for serving it to a device that checks."""
        data = self._files.get(key)
        if data is not None:
            return data[offset_bytes : offset_bytes + length_bytes], len(data)
        path = self.slice_path(key)
        with path.open("rb") as file:
            file.seek(offset_bytes)
            return file.read(length_bytes), self.manifest.slices[key].size_bytes

    def tokenizer_json(self) -> bytes:
        return bytes(self.slice_bytes(self.manifest.tokenizer))

    def verify(self, keys: Collection[str] | None = None) -> None:
        """Check every slice (or those named) that is here. Raises TamperedError or BundleError (missing)."""
        for key in self.manifest.slices if keys is None else keys:
            self.slice_bytes(key)

    def close(self) -> None:
        self._maps.clear()
