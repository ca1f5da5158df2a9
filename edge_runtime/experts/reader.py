"""Reads experts from flash into memory, on a few threads, and lets no wrong byte through.

Every expert is hashed when it has arrived. What does not match, or can't be read, is read again through the page
cache, then fetched from whoever has the bundle (and mended on flash); only then is it given up.

Knows: files, lanes, digests. Does not know: which expert is wanted why, or which memory is free.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

from blake3 import blake3

from edge_runtime.errors import BundleError, EdgeRuntimeError, TamperedError
from edge_runtime.experts.flash_store import ExpertLayer
from edge_runtime.experts.lanes import ReadInto, direct_works, open_for_reading, read_fully, read_into

log = logging.getLogger(__name__)

DEFAULT_LANES = 2
JOIN_SECONDS = 10.0

Refetch = Callable[[str, int, int], bytes]  # (slice, offset, length) -> bytes; raises EdgeRuntimeError


@dataclass(slots=True)
class ReadBatch:
    """Reads that somebody waits for together. What is not begun when it is cancelled is not read."""

    arrived: SimpleQueue[Arrival] = field(default_factory=SimpleQueue)
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class Arrival:
    expert: int
    problem: Exception | None  # None: the bytes are in their place, and right


@dataclass(frozen=True, slots=True)
class _Job:
    batch: ReadBatch
    layer: ExpertLayer
    expert: int
    target: memoryview


class Cancelled(EdgeRuntimeError):
    code = "cancelled"


@dataclass(slots=True)
class ReadCounters:
    """Of all lanes; under the reader's lock."""

    reads: int = 0
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
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
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

    def submit(self, batch: ReadBatch, layer: ExpertLayer, expert: int, target: memoryview) -> None:
        """Read one expert into `target`, which nobody else may touch until it has arrived."""
        self._jobs.put(_Job(batch, layer, expert, target))

    def close(self) -> None:
        """Ends when the reads under way have. Idempotent."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(JOIN_SECONDS)
        if not any(thread.is_alive() for thread in self._threads):
            self._close_files()
        self._threads = []

    # ------------------------------------------------------------ on the lanes

    def _work(self, files: dict[os.PathLike[str], int]) -> None:
        while (job := self._jobs.get()) is not None:
            problem: Exception | None = None
            try:
                if job.batch.cancelled:
                    problem = Cancelled("the read was cancelled")
                else:
                    self._fill(job, files[job.layer.path])
            except Exception as error:  # goes to whoever waits
                problem = error
            job.batch.arrived.put(Arrival(job.expert, problem))

    def _fill(self, job: _Job, descriptor: int) -> None:
        layer, offset_bytes = job.layer, job.layer.offset(job.expert)
        why = ""
        try:
            read_fully(descriptor, job.target, offset_bytes, self._read)
        except OSError as problem:
            why = str(problem)
        with self._lock:
            self.counters.reads += 1
            self.counters.read_bytes += len(job.target)
        if why or not _is_right(job):
            log.warning("expert %d of %s: %s", job.expert, layer, why or "wrong bytes from flash")
            self._mend(job, why or "its bytes are not those that were signed")

    def _mend(self, job: _Job, why: str) -> None:
        layer, offset_bytes = job.layer, job.layer.offset(job.expert)
        with self._lock:
            self.counters.reread += 1
        try:
            descriptor = open_for_reading(layer.path, direct=False)
            try:
                read_fully(descriptor, job.target, offset_bytes, self._read)
            finally:
                os.close(descriptor)
            if _is_right(job):
                return
        except OSError as problem:
            why = str(problem)
        if self._refetch is None:
            raise _given_up(job, why)
        try:
            data = self._refetch(layer.slice, offset_bytes, len(job.target))
        except EdgeRuntimeError as problem:
            raise _given_up(job, f"{why}; fetching it again failed: {problem.message}") from None
        if len(data) != len(job.target):
            raise _given_up(job, f"{why}; {len(data)} bytes were sent instead of {len(job.target)}")
        job.target[:] = data
        if not _is_right(job):
            raise _given_up(job, f"{why}; what was sent instead is wrong, too")
        with self._lock:
            self.counters.refetched += 1
        _write_back(job)

    # ------------------------------------------------------------ files

    def _open(self, path: os.PathLike[str]) -> int:
        from pathlib import Path

        descriptor = open_for_reading(Path(path), direct=self.direct)
        self._descriptors.append(descriptor)
        return descriptor

    def _close_files(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def _is_right(job: _Job) -> bool:
    return blake3(job.target).digest() == job.layer.digests[job.expert]


def _given_up(job: _Job, why: str) -> TamperedError:
    return TamperedError(
        f"expert {job.expert} of layer {job.layer.layer} (slice {job.layer.slice}) can't be had: {why}",
        hint=f"check the disk; delete {job.layer.path} to have it fetched again",
    )


def _write_back(job: _Job) -> None:
    """Flash is mended where it lets itself be; if not, the next miss fetches again."""
    try:
        with job.layer.path.open("r+b") as file:
            file.seek(job.layer.offset(job.expert))
            file.write(job.target)
            file.flush()
            os.fsync(file.fileno())
        log.info("expert %d of %s was fetched again and mended on flash", job.expert, job.layer)
    except OSError as problem:
        log.warning("expert %d of %s was fetched again but not mended: %s", job.expert, job.layer, problem)
