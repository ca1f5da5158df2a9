"""What one peer is asked in one layer of a batch, and what becomes of it: outputs in time, or nothing.

Knows: one request, its times, and whom they tell. Does not know: links (`HelperPort`), who should be asked what.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.experts.peer_runner import rows_and_uses
from edge_runtime.experts.peer_standing import PeerStanding

log = logging.getLogger(__name__)

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Places = NDArray[np.intp]  # in the ids of a batch, row after row

LEAST_LOOK_SECONDS = 0.001  # what has come is taken, however late it is looked for
_WAITED = 0.05  # share of a request's time: less, and the answer was here before anybody looked


class HelperPort(Protocol):
    """Peers, as the compute thread asks them. Nothing here needs an event loop to turn."""

    def ask(self, device_id: str, layer: int, rows: Float32, uses: Int32) -> int:
        """As `PeerPort.ask`; the ticket to wait with. Raises TransportError."""
        ...

    def wait_until_late(
        self, device_id: str, ticket: int, outputs: int, hidden: int, seconds: float
    ) -> Float32 | None:
        """[outputs, hidden]; None: not in time, and what comes later is dropped. Raises TransportError, EngineError."""
        ...

    def forget(self, device_id: str) -> None:
        """Nobody waits for what was asked of it any more."""
        ...


@dataclass(frozen=True, slots=True)
class Helper:
    """A peer as it is asked."""

    device_id: str
    standing: PeerStanding
    port: HelperPort
    clock: Callable[[], float]


class HelperRequest:
    """`is_only_checked`: this device computes the same, and that counts."""

    def __init__(self, helper: Helper, places: Places) -> None:
        self.places = places
        self.is_only_checked = not helper.standing.is_checked
        self._helper, self._late_seconds = helper, helper.standing.late_seconds(len(places))
        self._has_answer = False
        self._ticket = 0
        self._began_at = 0.0

    def ask(self, layer: int, x: Float32, ids: Int32) -> bool:
        """x [R, hidden], ids [R, top_k]. False: it can't be reached."""
        helper = self._helper
        self._began_at = helper.clock()
        rows, uses = rows_and_uses(x, ids.reshape(-1), ids.shape[1], self.places)
        try:
            self._ticket = helper.port.ask(helper.device_id, layer, rows, uses)
        except EdgeRuntimeError as problem:
            self._failed(self._began_at, problem.message)
            return False
        return True

    def collect(self, hidden: int) -> Float32 | None:
        """[places, hidden]. None: it is late, gone, or refused."""
        helper, uses = self._helper, len(self.places)
        looked_at = helper.clock()
        left_seconds = max(LEAST_LOOK_SECONDS, self._began_at + self._late_seconds - looked_at)
        try:
            found = helper.port.wait_until_late(helper.device_id, self._ticket, uses, hidden, left_seconds)
        except EdgeRuntimeError as problem:
            self._failed(looked_at, problem.message)
            return None
        if found is None:
            self._failed(looked_at, f"no answer for {self._late_seconds:.3f} s")
            return None
        now = helper.clock()
        seconds = now - self._began_at
        self._has_answer = True
        helper.standing.answered(uses, seconds, waited=now - looked_at > _WAITED * seconds)
        return found

    def check(self, told: Float32, computed: Float32) -> None:
        """Both [R * top_k, hidden]: what peers said, and what counts."""
        if not self.is_only_checked or not self._has_answer:
            return
        helper = self._helper
        helper.standing.agreed(told[self.places].tobytes() == computed[self.places].tobytes())
        if helper.standing.is_barred:
            log.warning(
                "device %s is not asked for experts any more: it computes other bits than this device",
                helper.device_id[:8],
            )

    def give_up(self) -> None:
        self._helper.port.forget(self._helper.device_id)

    def _failed(self, since: float, why: str) -> None:
        helper = self._helper
        helper.standing.failed(helper.clock() - since)
        log.info("device %s is not asked for experts for a while: %s", helper.device_id[:8], why)
