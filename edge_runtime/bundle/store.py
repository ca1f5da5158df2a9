"""Bundles on a device: slices shared by content, transfers that resume.

    root/bundles/<digest>/manifest.json, manifest.sig
    root/slices/<sha256>            complete and checked
    root/slices/<sha256>.part       on the way; its size is where the transfer goes on
    root/slices/<sha256>.some       single experts of a slice, each in its place; the rest is a hole

Knows: files. Does not know: who sends the bytes. Arriving bytes are checked against the signed manifest before they get
their final name, so whatever has one is good.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from edge_runtime.bundle.bundle import MANIFEST_FILE, SIGNATURE_FILE, Bundle, read_manifest
from edge_runtime.bundle.hashing import digest_hex, file_hashes, sha256_digest
from edge_runtime.bundle.manifest import Manifest
from edge_runtime.core import Digest
from edge_runtime.errors import BundleError, TamperedError


class PartialBundle:
    """A bundle whose manifest is here and whose slices may still be on the way."""

    def __init__(self, store: BundleStore, digest: Digest, manifest: Manifest) -> None:
        self.digest = digest
        self.manifest = manifest
        self._store = store

    def missing(self, keys: Iterable[str]) -> list[str]:
        return [key for key in dict.fromkeys(keys) if not self._final(key).exists()]

    def received_bytes(self, key: str) -> int:
        """How much of a slice is here: where to resume."""
        if self._final(key).exists():
            return self.manifest.slices[key].size_bytes
        part = self._part(key)
        return part.stat().st_size if part.exists() else 0

    def write_chunk(self, key: str, offset_bytes: int, data: bytes | memoryview) -> bool:
        """Append; True once the slice is complete and checked. Raises TamperedError (the part is thrown away)."""
        entry = self.manifest.slices[key]
        if self._final(key).exists():
            return True
        part = self._part(key)
        here_bytes = self.received_bytes(key)
        if offset_bytes != here_bytes or here_bytes + len(data) > entry.size_bytes:
            raise BundleError(
                f"slice {key}: got bytes {offset_bytes}…{offset_bytes + len(data)}, "
                f"wanted {here_bytes}… of {entry.size_bytes}"
            )
        with part.open("ab") as file:
            file.write(data)
            if here_bytes + len(data) < entry.size_bytes:
                return False
            file.flush()
            os.fsync(file.fileno())
        if file_hashes(part) != (entry.digest, entry.blake3):
            part.unlink()
            raise TamperedError(
                f"slice {key} does not match the signed manifest",
                hint="the sender's copy is damaged or was changed: check it with edge-runtime doctor",
            )
        part.rename(self._final(key))
        return True

    def read_some(self, key: str, offset_bytes: int, length_bytes: int) -> bytes:
        """Of the whole slice or of what `write_some` wrote; unchecked, and shorter where nothing is."""
        final = self._final(key)
        for path in (final, final.with_suffix(".some")):
            if path.exists():
                with path.open("rb") as file:
                    file.seek(offset_bytes)
                    return file.read(length_bytes)
        return b""

    def write_some(self, key: str, offset_bytes: int, data: bytes | memoryview) -> None:
        """Of a slice that this device wants only pieces of."""
        path = self._final(key).with_suffix(".some")
        path.touch()
        with path.open("r+b") as file:
            file.seek(offset_bytes)
            file.write(data)

    def open(self) -> Bundle:
        return self._store.open(self.digest)

    def _final(self, key: str) -> Path:
        if key not in self.manifest.slices:
            raise BundleError(f"the bundle has no slice {key[:80]!r}")
        return self._store.slice_directory / digest_hex(self.manifest.slices[key].digest)

    def _part(self, key: str) -> Path:
        return self._final(key).with_suffix(".part")


class BundleStore:
    """All bundles of one device."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.slice_directory = self.root / "slices"
        self.slice_directory.mkdir(parents=True, exist_ok=True)

    def _directory(self, digest: str) -> Path:
        return self.root / "bundles" / digest_hex(digest)

    def has(self, digest: str) -> bool:
        return (self._directory(digest) / MANIFEST_FILE).exists()

    def begin(
        self, digest: str, manifest: bytes, signature: bytes, *, trusted: Collection[bytes] | None = None
    ) -> PartialBundle:
        """Take a manifest that should have `digest`. Raises TamperedError, TrustError, BundleError."""
        if sha256_digest(manifest) != digest:
            raise TamperedError("slice manifest.json does not have the digest that was announced")
        parsed = read_manifest(manifest, signature, trusted)
        directory = self._directory(digest)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / SIGNATURE_FILE).write_bytes(signature)
        temporary = directory / f".{MANIFEST_FILE}"
        temporary.write_bytes(manifest)
        temporary.rename(directory / MANIFEST_FILE)
        return PartialBundle(self, Digest(digest), parsed)

    def partial(self, digest: str) -> PartialBundle:
        """The bundle as it is here. Raises BundleError where its manifest never arrived."""
        bundle = self.open(digest)
        return PartialBundle(self, bundle.digest, bundle.manifest)

    def open(self, digest: str) -> Bundle:
        bundle = Bundle.open(self._directory(digest), slice_directory=self.slice_directory)
        if bundle.digest != digest:
            raise TamperedError("slice manifest.json does not have the digest it is stored under")
        return bundle
