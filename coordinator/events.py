"""What can happen to the cluster, and what may be done about it: the vocabulary of `state` and `decisions`.

Knows: events and actions as values. Times are seconds of the runtime's monotonic clock.
Does not know: sockets, clocks, the journal, or who carries an action out.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.planning.model import DeviceProfile, Plan
from edge_runtime.protocol.messages import StageReady

# ---------------------------------------------------------------- events: devices


@dataclass(frozen=True, slots=True)
class DeviceJoined:
    """Hello was accepted. A device that is there already is replaced, never counted twice."""

    device_id: str
    name: str
    boot_id: str
    connection: int  # number of the accepted connection: what an older one says later is ignored
    data_address: str
    memory_budget_bytes: int
    at: float


@dataclass(frozen=True, slots=True)
class DeviceSeen:
    device_id: str
    connection: int
    at: float


@dataclass(frozen=True, slots=True)
class LinkMeasured:
    device_id: str
    connection: int
    rtt_seconds: float
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class ProfileAsked:
    device_id: str
    at: float


@dataclass(frozen=True, slots=True)
class ProfileArrived:
    device_id: str
    connection: int
    profile: DeviceProfile
    at: float


@dataclass(frozen=True, slots=True)
class DeviceFailed:
    """It is connected and can't be used for now: it could not measure itself, or load its part."""

    device_id: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class DeviceLost:
    device_id: str
    connection: int
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class DeviceRevoked:
    device_id: str
    at: float


# ---------------------------------------------------------------- events: plans


@dataclass(frozen=True, slots=True)
class PlanInstalled:
    lease: int
    plan: Plan
    at: float


@dataclass(frozen=True, slots=True)
class PlanRefused:
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class LoadSent:
    lease: int
    at: float


@dataclass(frozen=True, slots=True)
class StageProgressed:
    device_id: str
    lease: int
    at: float


@dataclass(frozen=True, slots=True)
class StageLoaded:
    device_id: str
    ready: StageReady
    at: float


@dataclass(frozen=True, slots=True)
class StageBroke:
    device_id: str
    lease: int
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class PipelineAnnounced:
    lease: int


# ---------------------------------------------------------------- events: sessions


@dataclass(frozen=True, slots=True)
class SessionSubmitted:
    """`rows` is what it may grow to; `class_map` () takes any pipeline (nothing of it was ever shown to anyone)."""

    key: str
    tenant: str
    rows: int
    class_map: tuple[str, ...]
    at: float


@dataclass(frozen=True, slots=True)
class SessionOpened:
    key: str
    lease: int


@dataclass(frozen=True, slots=True)
class SessionBroke:
    """A gap, a refusal by a stage, or silence. `progressed`: it brought tokens since it was opened."""

    key: str
    lease: int
    reason: str
    progressed: bool
    at: float


@dataclass(frozen=True, slots=True)
class SessionEnded:
    key: str


Event = (
    DeviceJoined
    | DeviceSeen
    | LinkMeasured
    | ProfileAsked
    | ProfileArrived
    | DeviceFailed
    | DeviceLost
    | DeviceRevoked
    | PlanInstalled
    | PlanRefused
    | LoadSent
    | StageProgressed
    | StageLoaded
    | StageBroke
    | PipelineAnnounced
    | SessionSubmitted
    | SessionOpened
    | SessionBroke
    | SessionEnded
)

# ---------------------------------------------------------------- actions (whoever carries one out applies its event)


@dataclass(frozen=True, slots=True)
class DropDevice:
    """Cut the link. Event: DeviceLost."""

    device_id: str
    connection: int
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUpOnDevice:
    """It is there and does not get anywhere. Event: StageBroke while it loads, DeviceFailed while it probes."""

    device_id: str
    lease: int  # 0: while probing
    reason: str


@dataclass(frozen=True, slots=True)
class AskProfile:
    """Event: ProfileAsked."""

    device_id: str


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Place the model over the usable devices. Event: PlanInstalled or PlanRefused."""

    reason: str


@dataclass(frozen=True, slots=True)
class LoadStages:
    """Send every member its lease and its stage, tell the others to unload. Event: LoadSent."""

    lease: int


@dataclass(frozen=True, slots=True)
class AnnouncePipeline:
    """Every stage is ready. Event: PipelineAnnounced."""

    lease: int


@dataclass(frozen=True, slots=True)
class OpenOnPipeline:
    """Event: SessionOpened."""

    key: str
    lease: int


@dataclass(frozen=True, slots=True)
class FailSession:
    """Event: SessionEnded."""

    key: str
    reason: str
    hint: str


Action = (
    DropDevice
    | GiveUpOnDevice
    | AskProfile
    | MakePlan
    | LoadStages
    | AnnouncePipeline
    | OpenOnPipeline
    | FailSession
)
