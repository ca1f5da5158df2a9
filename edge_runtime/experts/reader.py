"""Reads experts from flash into memory, on a few threads, and lets no wrong byte through.

A plane of an expert (all of it, where it has one) is read in pieces, by as many lanes as are free, and each is hashed
while others are still on their way. What does not match, or can't be read, is read again through the page cache, then
fetched from whoever has the bundle (and mended on flash); only then is it given up. What somebody waits for goes before
what may come later.

Knows: files, lanes, digests. Does not know: which expert is wanted why, or which memory is free.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from blake3 import blake3
from edge_kernels.flash import WRONG_BYTES

from edge_runtime.bundle.hashing import EXPERT_PIECE_BYTES, expert_digest
from edge_runtime.errors import BundleError, EdgeRuntimeError, TamperedError
from edge_runtime.experts.flash_store import ExpertLayer
from edge_runtime.experts.lanes import ReadInto, direct_works, open_for_reading, read_fully, read_into

log = logging.getLogger(__name__)

DEFAULT_LANES = 4
PIECE_BYTES = (
    256 << 10
)  # large enough for flash's full speed, small enough that little is left to hash at the end
JOIN_SECONDS = 10.0

Refetch = Callable[[str, int, int], bytes]  # (slice, offset, length) -> bytes; raises EdgeRuntimeError


@dataclass(slots=True)
class ReadBatch:
    """Reads that somebody waits for together. What is not begun when it is cancelled is not read."""

    arrived: SimpleQueue[Arrival] = field(default_factory=SimpleQueue)
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class Arrival:
    layer: int
    expert: int
    plane: int
    problem: Exception | None  # None: the bytes are in their place, and right


class _Job:
    """A plane of an expert on its way: lanes bring its pieces, and their digests."""

    def __init__(
        self, batch: ReadBatch, layer: ExpertLayer, expert: int, plane: int, target: memoryview
    ) -> None:
        self.batch, self.layer, self.expert, self.plane, self.target = batch, layer, expert, plane, target
        self.problem = ""  # the first piece that could not be read, and why
        self._digests = [b""] * -(-len(target) // EXPERT_PIECE_BYTES)
        self._missing = len(self._digests)
        self._lock = threading.Lock()

    @property
    def pieces(self) -> int:
        return len(self._digests)

    @property
    def offset_bytes(self) -> int:
        return self.layer.offset(self.expert, self.plane)

    @property
    def is_right(self) -> bool:
        return expert_digest(self._digests) == self.layer.digest(self.expert, self.plane)

    def __str__(self) -> str:
        return f"{self.name} of {self.layer}"

    @property
    def name(self) -> str:
        if self.layer.planes == 1:
            return f"expert {self.expert}"
        return f"plane {self.plane + 1} of expert {self.expert}"

    def piece(self, number: int) -> memoryview:
        return self.target[number * EXPERT_PIECE_BYTES : (number + 1) * EXPERT_PIECE_BYTES]

    def hash(self, number: int) -> None:
        self._digests[number] = blake3(self.piece(number)).digest()

    def brought(self, problem: str) -> bool:
        """A piece is done with; True: it was the last."""
        with self._lock:
            self.problem = self.problem or problem
            self._missing -= 1
            return self._missing == 0

    def rehash(self) -> bool:
        """After the whole was brought another way."""
        for number in range(self.pieces):
            self.hash(number)
        return self.is_right


class Cancelled(EdgeRuntimeError):
    code = "cancelled"


@dataclass(slots=True)
class ReadCounters:
    """Of all lanes; under the reader's lock."""

    reads: int = 0  # of planes
    read_bytes: int = 0
    reread: int = 0  # a second time, through the page cache
    refetched: int = 0  # from the coordinator or a peer


class ExpertReader:
    """`submit` from one thread; arrivals come in any order. `read` and `direct` are for tests and probes."""

    def __init__(
        self,
        layers: Sequence[ExpertLayer],
        *,
        lanes: int = DEFAULT_LANES,
        direct: bool = True,
        refetch: Refetch | None = None,
        read: ReadInto = read_into,
    ) -> None:
        self.counters = ReadCounters()
        self._refetch = refetch
        self._read = read
        self._lock = threading.Lock()
        # A job and which piece of it. For every entry of the two there is a True among the turns.
        self._wanted: deque[tuple[_Job, int]] = deque()
        self._later: deque[tuple[_Job, int]] = deque()
        self._turns: SimpleQueue[bool] = SimpleQueue()  # False: end
        paths = sorted({layer.path for layer in layers})
        self.direct = direct and direct_works(paths)
        self._descriptors: list[
            int
        ] = []  # a lane of its own has descriptors of its own: no locks inside the kernel
        self._threads: list[threading.Thread] = []
        try:
            for lane in range(lanes):
                files = {path: self._open(path) for path in paths}
                name = f"flash-{lane}"
                self._threads.append(
                    threading.Thread(target=self._work, args=(files,), name=name, daemon=True)
                )
        except OSError as problem:
            self._close_files()
            raise BundleError(
                f"experts can't be read: {problem}",
                hint="allow more open files (ulimit -n), or use fewer lanes",
            ) from None
        for thread in self._threads:
            thread.start()

    @property
    def lanes(self) -> int:
        return len(self._threads)

    def submit(
        self,
        batch: ReadBatch,
        layer: ExpertLayer,
        expert: int,
        target: memoryview,
        planes: Iterable[int] = (0,),
        *,
        later: bool = False,
    ) -> None:
        """Read planes of an expert, whose slot is `target`: that part of it nobody else may touch until it has arrived.

        `later`: only while nothing else is waiting to be read.
        """
        queue = self._later if later else self._wanted
        for plane in planes:
            place = target[layer.plane_start(plane) : layer.plane_start(plane + 1)]
            job = _Job(batch, layer, expert, plane, place)
            for number in range(job.pieces):
                queue.append((job, number))
                self._turns.put(True)

    def brought(
        self, layer: ExpertLayer, expert: int, plane: int, target: memoryview, why: str
    ) -> Exception | None:
        """Somebody else read a plane into its place; what is wrong with it ("": nothing) is put right. None: it is."""
        with self._lock:
            self.counters.reads += 1
            self.counters.read_bytes += len(target)
        return self._put_right(_Job(ReadBatch(), layer, expert, plane, target), why) if why else None

    def count(self, reads: int, read_bytes: int) -> None:
        """Somebody else read so many planes, and they were right."""
        with self._lock:
            self.counters.reads += reads
            self.counters.read_bytes += read_bytes

    def close(self) -> None:
        """Ends when the reads under way have. Idempotent."""
        for _ in self._threads:
            self._turns.put(False)
        for thread in self._threads:
            thread.join(JOIN_SECONDS)
        if not any(thread.is_alive() for thread in self._threads):
            self._close_files()
        self._threads = []

    # ------------------------------------------------------------ on the lanes

    def _work(self, files: dict[Path, int]) -> None:
        while self._turns.get():
            job, number = self._next()
            why = "" if job.batch.cancelled else self._read_piece(job, number, files[job.layer.path])
            if job.brought(why):
                problem = self._finish(job)
                job.batch.arrived.put(Arrival(job.layer.layer, job.expert, job.plane, problem))

    def _next(self) -> tuple[_Job, int]:
        """There is one for whoever has a turn, though others may take the one that was seen first."""
        while True:
            for queue in (self._wanted, self._later):
                with suppress(IndexError):
                    return queue.popleft()

    def _read_piece(self, job: _Job, number: int, descriptor: int) -> str:
        """ "" or why it can't be read."""
        piece = job.piece(number)
        try:
            read_fully(descriptor, piece, job.offset_bytes + number * EXPERT_PIECE_BYTES, self._read)
        except OSError as problem:
            return str(problem) or type(problem).__name__
        job.hash(number)
        with self._lock:
            self.counters.read_bytes += len(piece)
        return ""

    def _finish(self, job: _Job) -> Exception | None:
        """None: the bytes are in their place, and right."""
        if job.batch.cancelled:
            return Cancelled("the read was cancelled")
        with self._lock:
            self.counters.reads += 1
        if not job.problem and job.is_right:
            return None
        return self._put_right(job, job.problem or WRONG_BYTES)

    def _put_right(self, job: _Job, why: str) -> Exception | None:
        log.warning("%s: %s", job, "wrong bytes from flash" if why == WRONG_BYTES else why)
        try:
            self._mend(job, why)
        except Exception as problem:  # goes to whoever waits
            return problem
        return None

    def _mend(self, job: _Job, why: str) -> None:
        layer = job.layer
        with self._lock:
            self.counters.reread += 1
        try:
            descriptor = open_for_reading(layer.path, direct=False)
            try:
                read_fully(descriptor, job.target, job.offset_bytes, self._read)
            finally:
                os.close(descriptor)
            if job.rehash():
                return
        except OSError as problem:
            why = str(problem)
        if self._refetch is None:
            raise _given_up(job, why)
        try:
            data = self._refetch(layer.slice, job.offset_bytes, len(job.target))
        except EdgeRuntimeError as problem:
            raise _given_up(job, f"{why}; fetching it again failed: {problem.message}") from None
        if len(data) != len(job.target):
            raise _given_up(job, f"{why}; {len(data)} bytes were sent instead of {len(job.target)}")
        job.target[:] = data
        if not job.rehash():
            raise _given_up(job, f"{why}; what was sent instead is wrong, too")
        with self._lock:
            self.counters.refetched += 1
        _write_back(job)

    # ------------------------------------------------------------ files

    def _open(self, path: Path) -> int:
        descriptor = open_for_reading(path, direct=self.direct)
        self._descriptors.append(descriptor)
        return descriptor

    def _close_files(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def _given_up(job: _Job, why: str) -> TamperedError:
    return TamperedError(
        f"{job} (slice {job.layer.slice}) can't be had: {why}",
        hint=f"check the disk; delete {job.layer.path} to have it fetched again",
    )


def _write_back(job: _Job) -> None:
    """Flash is mended where it lets itself be; if not, the next miss fetches again."""
    try:
        with job.layer.path.open("r+b") as file:
            file.seek(job.offset_bytes)
            file.write(job.target)
            file.flush()
            os.fsync(file.fileno())
        log.info("%s was fetched again and mended on flash", job)
    except OSError as problem:
        log.warning("%s was fetched again but not mended: %s", job, problem)
