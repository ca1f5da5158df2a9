"""What agents say, turned into events for the loop and messages for sessions.

Knows: which message may come from whom, and what it is news of. Does not know: what is done about it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from coordinator import events as ev
from coordinator.control_loop import ControlLoop, Trust
from coordinator.planning.model import DeviceProfile
from coordinator.sessions.port import PooledVector
from edge_runtime.errors import EngineError, ProtocolError
from edge_runtime.protocol.messages import (
    Gap,
    Heartbeat,
    Hello,
    Message,
    Pooled,
    ProfileReport,
    Refused,
    Relay,
    RowsHeld,
    SessionFailed,
    StageFailed,
    StageProgress,
    StageReady,
    StepTokens,
    Tokens,
)

if TYPE_CHECKING:
    from coordinator.links import AgentLinks
    from coordinator.sessions.host import SessionHost

log = logging.getLogger(__name__)


class AgentNews:
    """Implements LinkHandler: links tell it things, and never wait."""

    def __init__(
        self, loop: ControlLoop, trust: Trust, *, bundle: str, hidden_size: int, clock: Callable[[], float]
    ) -> None:
        self.links: AgentLinks | None = None
        self.sessions: SessionHost | None = None
        self._loop = loop
        self._trust = trust
        self._bundle = bundle
        self._hidden_size = hidden_size
        self._clock = clock

    def now(self) -> float:
        return self._clock()

    def refusal(self, device_id: str, hello: Hello) -> Refused | None:
        return self._trust.refusal(device_id, hello)

    def joined(self, device_id: str, connection: int, hello: Hello) -> None:
        name = self._trust.name(device_id, hello.device_name)
        log.info("device %s (%s) is here", name, device_id)
        self._loop.tell(
            ev.DeviceJoined(
                device_id,
                name,
                hello.boot_id,
                connection,
                hello.data_address,
                hello.memory_budget_bytes,
                self._clock(),
                hello.pid,
            )
        )

    def measured(self, device_id: str, connection: int, rtt_seconds: float, bytes_per_second: float) -> None:
        self._loop.tell(ev.LinkMeasured(device_id, connection, rtt_seconds, bytes_per_second))

    def seen(self, device_id: str, connection: int) -> None:
        self._loop.tell(ev.DeviceSeen(device_id, connection, self._clock()))

    def left(self, device_id: str, connection: int, reason: str) -> None:
        self._loop.tell(ev.DeviceLost(device_id, connection, reason, self._clock()))

    def received(
        self, device_id: str, connection: int, message: Message, payloads: Sequence[memoryview]
    ) -> None:
        match message:
            case Heartbeat():  # any message is a sign of life (`seen`); this one also says whether it gets anywhere
                self._heartbeat(device_id, connection, message)
            case ProfileReport():
                self._profile_arrived(device_id, connection, message)
            case StageProgress():
                self._loop.tell(ev.StageProgressed(device_id, message.lease, self._clock()))
            case StageReady():
                self._stage_ready(device_id, message)
            case StageFailed():
                self._stage_failed(device_id, message)
            case Tokens() | RowsHeld() | Gap() | SessionFailed() | Pooled():
                self._route(device_id, message, payloads)
            case StepTokens():
                for each in message.sessions:
                    self._route(device_id, each, payloads)
            case Relay():
                if self.links is not None:
                    self.links.relay(device_id, message, payloads)
            case _:
                raise ProtocolError(f"{type(message).__name__} is nothing an agent says to a coordinator")

    def _heartbeat(self, device_id: str, connection: int, beat: Heartbeat) -> None:
        seconds = beat.row_seconds, beat.round_seconds
        if min(seconds) < 0:
            raise ProtocolError("its steps took negative times")
        self._loop.tell(ev.DeviceStepped(device_id, connection, beat.steps, self._clock(), *seconds))

    def _profile_arrived(self, device_id: str, connection: int, report: ProfileReport) -> None:
        device = self._loop.state.devices.get(device_id)
        if device is None or report.bundle != self._bundle:
            return
        seconds = (report.layer_decode_seconds, report.layer_prefill_row_seconds, report.head_seconds)
        sizes = (report.memory_free_bytes, report.expert_cache_bytes, report.flash_bytes_per_second)
        if min(seconds) < 0 or min(sizes) < 0:
            raise ProtocolError("its profile has negative times or sizes")
        profile = DeviceProfile(
            device_id,
            device.name,
            report.memory_free_bytes,
            *seconds,
            report.numeric_class,
            report.row_invariant,
            flash_bytes_per_second=report.flash_bytes_per_second,
            expert_cache_bytes=report.expert_cache_bytes,
        )
        self._loop.tell(ev.ProfileArrived(device_id, connection, profile, self._clock()))

    def _stage_ready(self, device_id: str, ready: StageReady) -> None:
        pipeline = self._loop.state.find(ready.lease)
        has_layers = pipeline is None or device_id in pipeline.members
        if has_layers and ready.kv_capacity_tokens < 1:
            reason = "it loaded its layers and has no room for a single token of KV"
            self._loop.tell(ev.StageBroke(device_id, ready.lease, reason, self._clock()))
        else:
            self._loop.tell(ev.StageLoaded(device_id, ready, self._clock()))

    def _stage_failed(self, device_id: str, failed: StageFailed) -> None:
        reason = f"{failed.reason} ({failed.hint})" if failed.hint else failed.reason
        if failed.lease == 0:
            self._loop.tell(ev.DeviceFailed(device_id, reason, self._clock()))
        else:
            self._loop.tell(ev.StageBroke(device_id, failed.lease, reason, self._clock()))

    def _route(
        self,
        device_id: str,
        message: Tokens | RowsHeld | Gap | SessionFailed | Pooled,
        payloads: Sequence[memoryview],
    ) -> None:
        """Results only from the tail, complaints only from members; what is of another lease is late."""
        members = self._loop.members(message.lease)
        if self.sessions is None or device_id not in members:
            return
        if isinstance(message, SessionFailed) and message.code == EngineError.code:
            key = self.sessions.key_of(message.session)
            if key:
                self._loop.tell(ev.StageFaulted(device_id, message.lease, key, message.reason))
        if isinstance(message, Gap | SessionFailed):
            self.sessions.deliver_to_number(message.session, message)
            return
        if device_id != members[-1]:
            raise ProtocolError("it sends results, and is not the tail of the pipeline")
        if isinstance(message, Tokens | RowsHeld):
            self.sessions.deliver_to_number(message.session, message)
            return
        if len(payloads) != 1 or payloads[0].nbytes != 4 * self._hidden_size:
            raise ProtocolError(f"a pooled vector has {4 * self._hidden_size} bytes")
        vector = np.frombuffer(payloads[0], np.float32).copy()
        self.sessions.deliver_to_number(message.session, PooledVector(message, vector))
