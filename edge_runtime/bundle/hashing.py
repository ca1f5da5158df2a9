"""Two hashes: sha256 names a slice and is checked on arrival; BLAKE3, much faster, is checked at every open.

A single expert has a digest of its own, made of those of its pieces, so that pieces can be checked as they come in.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from edge_runtime.core import Digest
from edge_runtime.errors import BundleError

_CHUNK_BYTES = 1 << 20
# What flash gives at full speed; little is left to hash when the last piece is here.
EXPERT_PIECE_BYTES = 256 << 10
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


def expert_digest(pieces: Sequence[bytes]) -> bytes:
    """From the BLAKE3 digests of an expert's pieces of EXPERT_PIECE_BYTES: the only one, or BLAKE3 over all."""
    return pieces[0] if len(pieces) == 1 else blake3(b"".join(pieces)).digest()


def digest_of_expert(data: bytes | memoryview) -> bytes:
    """Of one plane of an expert: of all its `expert_stride_bytes` where it has only one."""
    view = memoryview(data).cast("B")
    starts = range(0, len(view), EXPERT_PIECE_BYTES)
    return expert_digest([blake3(view[start : start + EXPERT_PIECE_BYTES]).digest() for start in starts])


def digest_hex(digest: str) -> str:
    """The hex part: safe as a file name. Raises BundleError on anything else."""
    if not _DIGEST.fullmatch(digest):
        raise BundleError(f"{digest[:80]!r} is not a sha256 digest")
    return digest.removeprefix("sha256:")
