"""Parts of files read into memory past all other threads, and checked: `run_each` has them when they have landed.

On Linux the kernel reads on its own (io_uring), so that no thread waits for flash while another computes: one thread
asks for what is missing, computes what it has, and then shares the hashing of what came with the helper threads of the
kernels. Elsewhere `works` says no.

Knows: file descriptors, places, digests. Does not know: experts, caches, what to do about a part that is wrong.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_kernels import _native
from edge_kernels.experts import ExpertWeights

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

GRAIN_BYTES = 2048  # parts and pieces are multiples of it
DIGEST_BYTES = 32
WRONG_BYTES = "its bytes are not those that were signed"
LEFT_OUT = "it was not read, since nobody wants it any more"
_RIGHT, _WRONG, _LEFT_OUT = 0, 1, 2
CHECKED_FIRST = -1  # no owner: parts are checked before they are used


@dataclass(frozen=True, slots=True)
class Part:
    """`size_bytes` of a file from `offset_bytes` on, which go to `target_byte` of the memory; `key` names them.

    `digest`: the BLAKE3 digest of its only piece, or BLAKE3 over the digests of its pieces.
    """

    key: int
    file: int
    offset_bytes: int
    size_bytes: int
    target_byte: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Landed:
    """`problem` is "" where the bytes are in their place and right; it says why not otherwise."""

    key: int
    problem: str


@dataclass(frozen=True, slots=True)
class FlashTimes:
    """Seconds since the beginning, of layers whose experts are computed while some of them come.

    `asking`: system calls of the thread that asks. `reading`: from a layer's first read to its last byte. `after`: from
    there to its result. `hashing`, `computing`: of all threads together.
    """

    asking: float
    reading: float
    after: float
    hashing: float
    computing: float


NO_TIMES = FlashTimes(0.0, 0.0, 0.0, 0.0, 0.0)


class FlashReads:
    """One thread uses it. Raises RuntimeError where `works` says no."""

    def __init__(self, piece_bytes: int) -> None:
        self._native = _native.FlashReads(piece_bytes)

    @property
    def native(self) -> _native.FlashReads:
        """For other kernels."""
        return self._native

    @property
    def waited_seconds(self) -> float:
        """Of this thread, for flash alone: nothing was there to be hashed."""
        return self._native.waited_seconds

    @property
    def times(self) -> FlashTimes:
        return FlashTimes(*(1e-9 * nanoseconds for nanoseconds in self._native.times))

    def time_reads(self, memory: U8, parts: Sequence[Part]) -> float:
        """Seconds until all of them are there, unchecked: what flash gives who reads as `run_experts` does.

        Nothing else may be on its way. Raises RuntimeError for what can't be read.
        """
        return self._native.time_reads(memory, *_places(parts))

    def time_reads_beside(
        self, memory: U8, parts: Sequence[Part], x: F32, ids: I32, weights: ExpertWeights, threads: int = 1
    ) -> float:
        """The same while `threads` compute experts x [R, hidden], ids [R, n] that are here, until all parts are."""
        return _native.time_reads_beside(
            self._native,
            memory,
            *_places(parts),
            np.ascontiguousarray(x, np.float32),
            np.ascontiguousarray(ids, np.int32),
            np.ones(ids.shape, np.float32),
            weights.buffer,
            weights.format,
            weights.num_experts,
            weights.hidden,
            weights.intermediate,
            weights.stride_bytes,
            weights.part_offsets,
            np.empty((len(x), weights.hidden), np.float32),
            threads,
        )

    def submit(self, memory: U8, parts: Sequence[Part]) -> None:
        """Begin to read. The memory must stay where it is, and nobody else may touch the targets until they landed."""
        places, targets = _places(parts)
        digests = np.frombuffer(b"".join([part.digest for part in parts]), np.uint8)
        self._native.submit(memory, places, targets, digests.reshape(len(parts), DIGEST_BYTES))

    def land(self, threads: int = 1) -> list[Landed]:
        """At least one part, and all that are here; none where none is on its way."""
        return [Landed(key, _problem(status)) for key, status in self._native.land(threads)]

    def run_experts(
        self,
        slots_of: Sequence[tuple[int, int]],
        x: F32,
        ids: I32,
        gates: F32,
        weights: ExpertWeights,
        *,
        activation: str,
        threads: int = 1,
    ) -> tuple[F32 | None, list[Landed]]:
        """What `run_experts` gives, bit for bit, while some experts are still on their way: those here are computed.

        `slots_of`: (key, expert of `weights`) of every part on its way. The result is None where a part did not come
        right; all have landed then, too.
        """
        if activation != "silu":
            raise ValueError(f"unknown activation {activation!r}: experts know silu")
        y = np.empty((len(x), weights.hidden), np.float32)
        landed = _native.run_arriving(
            self._native,
            np.array([key for key, _ in slots_of], np.int64),
            np.array([slot for _, slot in slots_of], np.int32),
            np.ascontiguousarray(x, np.float32),
            np.ascontiguousarray(ids, np.int32),
            np.ascontiguousarray(gates, np.float32),
            weights.buffer,
            weights.format,
            weights.num_experts,
            weights.hidden,
            weights.intermediate,
            weights.stride_bytes,
            weights.part_offsets,
            y,
            threads,
        )
        is_whole, found = landed_of(landed)
        return y if is_whole else None, list(found)

    def check(self, threads: int = 1) -> list[tuple[int, Landed]]:
        """Checks of parts that were used before they were made (`flash_layer`) are made now: (owner, part) of those
        that are wrong."""
        return [(owner, Landed(key, _problem(status))) for owner, key, status in self._native.check(threads)]

    def cancel(self) -> None:
        """From any thread: what has not begun is not read, and lands as LEFT_OUT. Until the next `submit`."""
        self._native.cancel()

    def give_up(self) -> None:
        """What has not begun is not read; returns when the rest has come, and forgets it."""
        self._native.give_up()


def _places(parts: Sequence[Part]) -> tuple[I64, I64]:
    """[n, 4] and [n], as native kernels want them."""
    places = [(part.key, part.file, part.offset_bytes, part.size_bytes) for part in parts]
    return np.array(places, np.int64).reshape(-1, 4), np.array([part.target_byte for part in parts], np.int64)


def works() -> bool:
    """Whether this system reads on its own."""
    try:
        _native.FlashReads(GRAIN_BYTES)
    except RuntimeError:
        return False
    return True


def digest(data: U8, threads: int = 1) -> bytes:
    """BLAKE3 of the bytes."""
    found = np.empty(DIGEST_BYTES, np.uint8)
    _native.blake3(np.ascontiguousarray(data), found, threads)
    return found.tobytes()


def landed_of(landed: Sequence[tuple[int, int]]) -> tuple[bool, tuple[Landed, ...]]:
    """Of (key, status) as native kernels give them: whether all came right, and each."""
    if not landed:
        return True, ()
    is_whole = all(status == _RIGHT for _, status in landed)
    return is_whole, tuple([Landed(key, _problem(status)) for key, status in landed])


def _problem(status: int) -> str:
    if status == _RIGHT:
        return ""
    if status == _WRONG:
        return WRONG_BYTES
    if status == _LEFT_OUT:
        return LEFT_OUT
    return os.strerror(-status) if -status in errno.errorcode else f"error {-status}"
