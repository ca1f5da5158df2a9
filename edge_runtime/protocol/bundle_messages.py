"""Measuring oneself on a bundle, and fetching its slices: part of the closed table in `messages.py`.

Knows: what is said. Does not know: how it travels, or what is in a slice.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ProfileRequest:
    """Measure yourself on this bundle: fetch its manifest and one layer, time them, probe row invariance."""

    bundle: str


@dataclass(frozen=True, slots=True)
class ProfileReport:
    bundle: str
    numeric_class: str  # executor and version, ISA path, weight/KV/wire formats, kernel version
    row_invariant: bool
    layer_decode_seconds: float  # one row through one layer, mid context
    layer_prefill_row_seconds: float  # per row of a full chunk through one layer
    head_seconds: float  # one row through final norm, head and sampler
    memory_free_bytes: int  # of the budget, for weights and KV
    overhead_bytes: int  # the process without weights
    flash_bytes_per_second: float = 0.0  # of experts that stay on flash; 0: all must be in memory
    expert_cache_bytes: int = 0  # memory for those; 0: what weights and KV leave


@dataclass(frozen=True, slots=True)
class SliceRequest:
    """`slice` is a key of the manifest, or "manifest.json" / "manifest.sig". Resumes from `offset_bytes`."""

    bundle: str
    slice: str
    offset_bytes: int
    length_bytes: int  # at most MAX_CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class SliceChunk:
    """Payload: the bytes. `total_bytes` is of the whole slice."""

    bundle: str
    slice: str
    offset_bytes: int
    total_bytes: int
