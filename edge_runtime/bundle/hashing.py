"""Two hashes: sha256 names a slice and is checked on arrival; BLAKE3, much faster, is checked at every open."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from blake3 import blake3

from edge_runtime.core import Digest
from edge_runtime.errors import BundleError

_CHUNK_BYTES = 1 << 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def sha256_digest(data: bytes | memoryview) -> Digest:
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def file_hashes(path: Path) -> tuple[Digest, str]:
    """(sha256 digest, BLAKE3 hex) of a file, read once."""
    first, second = hashlib.sha256(), blake3()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            first.update(chunk)
            second.update(chunk)
    return Digest("sha256:" + first.hexdigest()), second.hexdigest()


def digest_hex(digest: str) -> str:
    """The hex part: safe as a file name. Raises BundleError on anything else."""
    if not _DIGEST.fullmatch(digest):
        raise BundleError(f"{digest[:80]!r} is not a sha256 digest")
    return digest.removeprefix("sha256:")
