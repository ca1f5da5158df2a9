"""A memory limit from outside: a cgroup (v1 or v2) that a process puts itself into, page cache and all, no swap.

Knows: the files of both versions. Does not know: what runs inside.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ROOTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
_V1 = Path("/sys/fs/cgroup/memory")


class MemoryCgroup:
    def __init__(self, path: Path, version: int) -> None:
        self.path = path
        self.version = version

    def enter(self) -> None:
        """The calling process, from now on: what it touches is charged here."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def oom_kills(self) -> int:
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        for line in (self.path / name).read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        return 0

    @property
    def peak_bytes(self) -> int:
        name = "memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"
        try:
            return int((self.path / name).read_text())
        except OSError:  # memory.peak is younger than version 2
            return 0


@contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[MemoryCgroup]:
    """Raises OSError where cgroups can't be written here."""
    name = f"edge-runtime-bench-{uuid.uuid4().hex[:8]}"
    cgroup = _make(name, limit_bytes)
    try:
        yield cgroup
    finally:
        with suppress(OSError):  # its last process may need a moment to be gone
            cgroup.path.rmdir()


def _make(name: str, limit_bytes: int) -> MemoryCgroup:
    if _V1.is_dir():
        path = _V1 / name
        path.mkdir()
        (path / "memory.limit_in_bytes").write_text(str(limit_bytes))
        with suppress(OSError):  # kernels without swap accounting
            (path / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))
        return MemoryCgroup(path, 1)
    for root in _ROOTS:
        if "memory" in _words(root / "cgroup.subtree_control"):
            path = root / name
            path.mkdir()
            (path / "memory.max").write_text(str(limit_bytes))
            with suppress(OSError):
                (path / "memory.swap.max").write_text("0")
            return MemoryCgroup(path, 2)
    raise OSError("no memory controller that this user may write to")


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
