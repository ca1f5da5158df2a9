"""An event loop that takes a list which is due from its socket before it makes callbacks of anything.

Between a descriptor that is ready and what its callback reads lie the loop's own lists, handles and contexts, and then
the socket's: after a step has read its weights all of that is cold. Where several things happen at once, or on a system
without epoll, the loop does what every loop does.

Knows: one inlet, when it may be asked. Does not know: what is taken, peers, rows.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Callable
from typing import Final

from edge_kernels._native import Inlet

HAS_EPOLL: Final = hasattr(selectors, "EpollSelector")
_EXPECTED: Final = 1
_FOR_EVER: Final = -1

Taken = Callable[[bool], None]  # whether it is what was expected


class _EagerSelector(selectors.DefaultSelector):
    inlet: Inlet | None = None
    socket_fd = -1
    taken: Taken

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        inlet = self.inlet
        if inlet is None:
            return super().select(timeout)
        found = inlet.wait(self.fileno(), self.socket_fd, _milliseconds(timeout))
        if found:
            self.taken(found == _EXPECTED)
        return super().select(0)


class EagerLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._eager = _EagerSelector()
        super().__init__(self._eager)

    def take_first(self, socket_fd: int, inlet: Inlet | None, taken: Taken) -> None:
        """Where `socket_fd` alone is ready, and a list is there, call `taken` at once. Of one socket at a time.

        None: this descriptor is read by its callbacks alone, as any other one is.
        """
        if inlet is not None and HAS_EPOLL:
            self._eager.inlet, self._eager.socket_fd, self._eager.taken = inlet, socket_fd, taken
        elif self._eager.socket_fd == socket_fd:
            self._eager.inlet, self._eager.socket_fd = None, -1


def _milliseconds(timeout_seconds: float | None) -> int:
    """As `select.epoll` counts: no timer is early."""
    if timeout_seconds is None:
        return _FOR_EVER
    return math.ceil(timeout_seconds * 1e3) if timeout_seconds > 0 else 0
