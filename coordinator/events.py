"""What can happen to the cluster: the vocabulary of `changes`.

Knows: events as values. Times are seconds of the runtime's monotonic clock.
Does not know: sockets, clocks, the journal, or what may be done about them (`actions`).
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
    pid: int = 0


@dataclass(frozen=True, slots=True)
class DeviceSeen:
    device_id: str
    connection: int
    at: float


@dataclass(frozen=True, slots=True)
class DeviceStepped:
    """A heartbeat. `steps` moves when its compute thread does: a device can be there and not get anywhere."""

    device_id: str
    connection: int
    steps: int
    at: float
    row_seconds: float = 0.0  # of a step with one decoded row, lately; 0: there was none
    round_seconds: float = 0.0  # from such a step to the next one of its session, likewise


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
    """In the place of the pipeline of lease `replaces`; 0: beside those there are."""

    lease: int
    plan: Plan
    at: float
    replaces: int = 0


@dataclass(frozen=True, slots=True)
class PlanRefused:
    """Nothing can serve. Asked again when a device comes, goes or is forgiven."""

    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class PipelineDropped:
    """It can't be mended, and others serve: its devices are free again."""

    lease: int
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class ReplicaRefused:
    """No further pipeline for now."""

    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class PlanKept:
    """No plan was found that is so much better that it is worth loading."""


@dataclass(frozen=True, slots=True)
class UnloadSent:
    pairs: tuple[tuple[str, int], ...]  # (device, lease)


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
class StageFaulted:
    """A request failed in this stage, by its own word or by what it sent."""

    device_id: str
    lease: int
    key: str
    reason: str


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
class SessionStalled:
    """Nothing came of an open session since `since`, which is longer than measured speeds explain."""

    key: str
    lease: int
    since: float
    progressed: bool  # it brought something since it was opened


@dataclass(frozen=True, slots=True)
class SessionAsked:
    """It is being opened again, to see who answers."""

    key: str


@dataclass(frozen=True, slots=True)
class SessionRebound:
    """Nobody saw anything of it yet: it was journalled again for the classes that serve now."""

    key: str
    class_map: tuple[str, ...]


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
    at: float = 0.0
    progressed: bool = False  # it brought something since it was opened: its pipeline works


Event = (
    DeviceJoined
    | DeviceSeen
    | DeviceStepped
    | LinkMeasured
    | ProfileAsked
    | ProfileArrived
    | DeviceFailed
    | DeviceLost
    | DeviceRevoked
    | PlanInstalled
    | PlanRefused
    | PipelineDropped
    | ReplicaRefused
    | PlanKept
    | UnloadSent
    | LoadSent
    | StageProgressed
    | StageLoaded
    | StageBroke
    | StageFaulted
    | PipelineAnnounced
    | SessionSubmitted
    | SessionOpened
    | SessionStalled
    | SessionAsked
    | SessionRebound
    | SessionBroke
    | SessionEnded
)
