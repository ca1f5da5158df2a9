"""What `decisions` may order: values, each naming the event that whoever carries it out applies.

Knows: actions as values. Does not know: sockets, clocks, the journal, or who carries an action out.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    """Place the model over the usable devices, or mend the pipeline of lease `replaces`.

    Events: PlanInstalled (several for a first plan with replicas), else PipelineDropped where others serve, else
    PlanRefused.
    """

    reason: str
    replaces: int = 0


@dataclass(frozen=True, slots=True)
class AddReplica:
    """One more pipeline over devices that stand by. Event: PlanInstalled or ReplicaRefused."""


@dataclass(frozen=True, slots=True)
class ReviewPlan:
    """Is there a much better plan, now that nobody would suffer? Event: PlanInstalled or PlanKept."""

    lease: int


@dataclass(frozen=True, slots=True)
class UnloadStages:
    """Tell those who are in no plan any more to free what they hold. Event: UnloadSent."""

    pairs: tuple[tuple[str, int], ...]  # (device, lease)


@dataclass(frozen=True, slots=True)
class LoadStages:
    """Send every member its lease and its stage. Event: LoadSent."""

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
class AskSession:
    """Close it and open it again. Event: SessionAsked; SessionBroke follows."""

    key: str
    lease: int
    reason: str


@dataclass(frozen=True, slots=True)
class RebindSession:
    """Go on with other classes if nobody saw anything of it yet, else fail. Event: SessionRebound."""

    key: str
    class_map: tuple[str, ...]
    reason: str
    hint: str


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
    | AddReplica
    | ReviewPlan
    | UnloadStages
    | LoadStages
    | AnnouncePipeline
    | OpenOnPipeline
    | AskSession
    | RebindSession
    | FailSession
)
