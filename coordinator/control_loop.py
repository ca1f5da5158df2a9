"""The one place where the cluster's state changes: events in, decisions out, actions carried out at the rim.

Knows: how an action becomes messages and what its event is. Does not know: why an action was chosen (`decisions`), what
sessions do (`sessions/`), HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from coordinator import actions as act
from coordinator import events as ev
from coordinator.changes.apply import apply
from coordinator.decisions import Limits, decide
from coordinator.journal.base import Journal
from coordinator.load_order import load_order
from coordinator.planning.model import Plan, Split
from coordinator.sessions.port import Open, PipelineLost, Rebind, Reopen
from coordinator.state import ClusterState, Pipeline
from edge_runtime.errors import EdgeRuntimeError, PlanError, RequestFailed
from edge_runtime.protocol.messages import (
    Hello,
    Message,
    PeerLease,
    ProfileRequest,
    Refused,
    UnloadStage,
)

if TYPE_CHECKING:
    from coordinator.links import AgentLinks
    from coordinator.sessions.host import SessionHost

log = logging.getLogger(__name__)

TICK_SECONDS = 0.1
SLEPT_SECONDS = 2.0  # a tick that took longer: this machine stood still, not the devices
MAX_ROUNDS = 1000


class Trust(Protocol):
    """What the loop asks the registry."""

    def refusal(self, device_id: str, hello: Hello) -> Refused | None: ...
    def name(self, device_id: str, said: str) -> str: ...
    def peer_lease(self, number: int, device_id: str, addresses: Sequence[tuple[str, str]]) -> PeerLease: ...


class Planner(Protocol):
    """Raises PlanError where nothing fits; the time is for devices that are left out for a while."""

    def first(self, state: ClusterState, now: float) -> Sequence[Plan]: ...
    def mended(self, state: ClusterState, now: float, lease: int) -> Plan: ...
    def another(self, state: ClusterState, now: float) -> Plan: ...
    def better(self, state: ClusterState, now: float, lease: int) -> Plan | None: ...


class ControlLoop:
    """Whoever has news calls `tell`, and never waits for it."""

    def __init__(
        self,
        *,
        bundle: str,
        split: Split,
        limits: Limits,
        journal: Journal,
        trust: Trust,
        planner: Planner,
        clock: Callable[[], float],
    ) -> None:
        self.state = ClusterState(started_at=clock(), down_since=clock())
        self.links: AgentLinks | None = None
        self.sessions: SessionHost | None = None
        self.serving = asyncio.Event()  # a pipeline is live
        self._bundle = bundle
        self._split = split
        self._limits = limits
        self._journal = journal
        self._trust = trust
        self._planner = planner
        self._clock = clock
        self._events: asyncio.Queue[ev.Event] = asyncio.Queue()

    # ------------------------------------------------------------ the loop

    def tell(self, event: ev.Event) -> None:
        self._events.put_nowait(event)

    async def run(self) -> None:
        before = self._clock()
        while True:
            await self._take_events()
            now = self._clock()
            if now - before > SLEPT_SECONDS:
                self._forgive_silence(now)
            before = now
            await self._settle()

    async def _take_events(self) -> None:
        try:
            async with asyncio.timeout(TICK_SECONDS):
                self._apply(await self._events.get())
        except TimeoutError:
            return
        while not self._events.empty():
            self._apply(self._events.get_nowait())

    def _forgive_silence(self, now: float) -> None:
        for device in self.state.devices.values():
            self._apply(ev.DeviceSeen(device.device_id, device.connection, now))

    async def _settle(self) -> None:
        for _ in range(MAX_ROUNDS):
            actions = decide(self.state, self._clock(), limits=self._limits, split=self._split)
            if not actions:
                return
            for action in actions:
                await self._carry_out(action)
        log.error("the rules did not come to rest; the next event tries again")

    def _apply(self, event: ev.Event) -> None:
        before = self.state.pipelines
        self.state = apply(self.state, event)
        if self.state.pipelines is not before:
            for pipeline in before:
                after = self.state.find(pipeline.lease)
                if not pipeline.broken and (after is None or after.broken):
                    self._pipeline_lost(pipeline, after.broken if after is not None else "it was replaced")
        if isinstance(event, ev.DeviceLost | ev.DeviceFailed):
            log.warning("device %s: %s", event.device_id, event.reason)

    def _pipeline_lost(self, pipeline: Pipeline, reason: str) -> None:
        log.warning("the pipeline of lease %d is over: %s", pipeline.lease, reason)
        if self.state.live is None:
            self.serving.clear()
        if self.sessions is not None:
            for session in self.sessions.sessions:
                session.deliver(PipelineLost(pipeline.lease))

    # ------------------------------------------------------------ actions

    async def _carry_out(self, action: act.Action) -> None:
        now = self._clock()
        match action:
            case act.DropDevice():
                if self.links is not None:
                    self.links.drop(action.device_id, action.connection, action.reason)
                self._apply(ev.DeviceLost(action.device_id, action.connection, action.reason, now))
            case act.GiveUpOnDevice():
                self._apply(
                    ev.StageBroke(action.device_id, action.lease, action.reason, now)
                    if action.lease
                    else ev.DeviceFailed(action.device_id, action.reason, now)
                )
            case act.AskProfile():
                self._post(action.device_id, ProfileRequest(self._bundle))
                self._apply(ev.ProfileAsked(action.device_id, now))
            case act.MakePlan():
                await self._make_plan(action)
            case act.AddReplica():
                await self._add_replica()
            case act.ReviewPlan():
                await self._review_plan(action.lease)
            case act.UnloadStages():
                for device_id, lease in action.pairs:
                    self._post(device_id, UnloadStage(lease))
                self._apply(ev.UnloadSent(action.pairs))
            case act.LoadStages():
                self._load_stages(action.lease)
                self._apply(ev.LoadSent(action.lease, now))
            case act.AnnouncePipeline():
                self._apply(ev.PipelineAnnounced(action.lease))
                log.info("the pipeline of lease %d serves", action.lease)
                self.serving.set()
            case act.OpenOnPipeline():
                self._apply(ev.SessionOpened(action.key, action.lease))
                if self.sessions is None or not self.sessions.deliver(action.key, Open(action.lease)):
                    self._apply(ev.SessionEnded(action.key, now))
            case act.AskSession():
                if self.sessions is not None:
                    self.sessions.deliver(action.key, Reopen(action.lease, action.reason))
                self._apply(ev.SessionAsked(action.key))
            case act.RebindSession():
                error = _cannot_finish(action.reason, action.hint)
                if self.sessions is None or not self.sessions.deliver(
                    action.key, Rebind(action.class_map, error)
                ):
                    self._apply(ev.SessionEnded(action.key, now))
                self._apply(ev.SessionRebound(action.key, action.class_map))
            case act.FailSession():
                log.warning("request %s fails: %s", action.key, action.reason)
                if self.sessions is not None:
                    self.sessions.fail(action.key, _cannot_finish(action.reason, action.hint))
                self._apply(ev.SessionEnded(action.key, now))

    async def _make_plan(self, action: act.MakePlan) -> None:
        now, replaces = self._clock(), action.replaces
        try:
            if replaces:
                await self._install(action.reason, self._planner.mended(self.state, now, replaces), replaces)
                return
            for plan in self._planner.first(self.state, now):
                await self._install(action.reason, plan)
        except PlanError as error:
            log.warning("no plan (%s): %s", action.reason, error.message)
            others_left = len(self.state.pipelines) > 1
            self._apply(
                ev.PipelineDropped(replaces, error.message, now)
                if replaces and others_left
                else ev.PlanRefused(error.message, now)
            )

    async def _add_replica(self) -> None:
        now = self._clock()
        try:
            plan = self._planner.another(self.state, now)
        except PlanError as error:
            self._apply(ev.ReplicaRefused(error.message, now))
            return
        await self._install("a replica", plan)

    async def _review_plan(self, lease: int) -> None:
        plan = self._planner.better(self.state, self._clock(), lease)
        if plan is None:
            self._apply(ev.PlanKept())
            return
        await self._install("a better plan", plan, lease)

    async def _install(self, reason: str, plan: Plan, replaces: int = 0) -> None:
        lease = await self._journal.next_lease()
        parts = [f"{stage.name} {stage.layers}" for stage in plan.stages]
        parts += [f"{holder.name} {holder.experts} experts" for holder in plan.holders]
        log.info("plan of lease %d (%s): %s", lease, reason, ", ".join(parts))
        self._apply(ev.PlanInstalled(lease, plan, self._clock(), replaces))

    def _load_stages(self, lease: int) -> None:
        pipeline = self.state.find(lease)
        if pipeline is None:
            return
        addresses = [(member, self.state.devices[member].data_address) for member in pipeline.everyone]
        for member in pipeline.everyone:
            others = [entry for entry in addresses if entry[0] != member]
            self._post(member, self._trust.peer_lease(lease, member, others))
            self._post(member, load_order(pipeline, member, self._bundle))

    def _post(self, device_id: str, message: Message) -> None:
        if self.links is not None:
            self.links.post(device_id, message)

    def members(self, lease: int) -> Sequence[str]:
        pipeline = self.state.find(lease)
        return pipeline.members if pipeline is not None and not pipeline.broken else ()


def _cannot_finish(reason: str, hint: str) -> RequestFailed:
    return RequestFailed(f"the request can't be finished: {reason}", hint=hint)


def why_not_serving(state: ClusterState) -> EdgeRuntimeError:
    """For whoever asks while there is no pipeline."""
    if state.refusal:
        reason = state.refusal
    elif state.pipeline is not None and state.pipeline.broken:
        reason = state.pipeline.broken
    elif state.pipeline is not None:
        reason = "the devices are loading their layers"
    elif any(device.is_connected for device in state.devices.values()):
        reason = "devices are still being measured, or others are waited for"
    else:
        reason = "no device is connected"
    return RequestFailed(
        f"no pipeline can serve now: {reason}",
        hint="`edge-runtime devices` shows what each device is doing",
        code="not_ready",
    )
