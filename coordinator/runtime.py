"""The coordinator, put together: everything below the HTTP API, as the `Service` it asks.

Knows: the order in which parts start and stop, and how a request becomes a session. Does not know: HTTP, flags.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from coordinator import cluster_status
from coordinator import events as ev
from coordinator.agent_news import AgentNews
from coordinator.config import CoordinatorConfig
from coordinator.control_loop import ControlLoop
from coordinator.journal.base import Journal
from coordinator.journal.sqlite import SqliteJournal
from coordinator.links import AgentLinks
from coordinator.placement import Placer, layer_experts, model_profile
from coordinator.ports import RememberedPorts, reachable_host
from coordinator.registry import Keys, Registry
from coordinator.request_desk import RequestDesk
from coordinator.service import ClusterStatus, GenerateRequest, TokenEvent
from coordinator.sessions.host import SessionHost
from coordinator.sessions.page_names import SECRET_BYTES, PageNames
from coordinator.slice_server import SliceServer
from coordinator.speed_meter import SpeedMeter
from coordinator.text_codec import TextCodec
from edge_runtime.bundle import Bundle
from edge_runtime.bundle.manifest import ModelInfo
from edge_runtime.core import RequestId
from edge_runtime.experts.loads import read_loads
from edge_runtime.protocol.messages import Draft
from edge_runtime.transport import zeromq
from edge_runtime.trust.pairing import EnrollmentServer, listen_for_devices

HOUSEKEEPING_SECONDS = 1.0
PRUNING_SECONDS = 60.0  # between looks for requests that are too old, once there are none


class CoordinatorRuntime:
    """Implements Service. `async with CoordinatorRuntime(config) as runtime:` serves until the block ends."""

    def __init__(self, config: CoordinatorConfig, *, journal: Journal | None = None) -> None:
        self.config = config
        self.bundle = Bundle.open(config.bundle)
        self._text = TextCodec(self.bundle)
        self._journal = journal
        self._meter = SpeedMeter()
        self._clock = time.monotonic
        self._started_at = self._clock()
        self._stack = AsyncExitStack()

    # ------------------------------------------------------------ life

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _start(self) -> None:
        config, stack = self.config, self._stack
        config.state_directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._journal is None:
            self._journal = SqliteJournal(config.state_directory / "journal.sqlite3")
            stack.push_async_callback(self._journal.close)
        keys = Keys.load_or_create(config.state_directory)
        self.registry = Registry(self._journal, keys, wall_clock=time.time)
        await self.registry.load()
        listener, enroll_listener = await self._listen(keys)
        self._tasks = await stack.enter_async_context(_StoppableTasks())
        self._wire_up(listener, keys)
        enrollment = EnrollmentServer(
            enroll_listener,
            self.registry.spend,
            self.registry.register,
            coordinator_address=listener.address,
            signing_public_key=keys.signing.public,
        )
        for part in (self.loop.run(), self.links.run(), enrollment.serve(), self._keep_house()):
            self._tasks.add(part)
        await self.desk.continue_unfinished()

    async def _listen(self, keys: Keys) -> tuple[zeromq.ZeromqListener, zeromq.ZeromqListener]:
        """(for paired devices, for those that join)"""
        config, host = self.config, _bracketed(self.config.host)
        ports = RememberedPorts(config.state_directory / "ports.json")
        admission = self.registry.admission
        listener = await ports.listen(
            "agents",
            config.port,
            lambda port: zeromq.listen(f"tcp://{host}:{port}", keys.link, admission, name="agents"),
        )
        self._stack.push_async_callback(listener.close)
        enroll_listener = await ports.listen(
            "enroll", config.enroll_port, lambda port: listen_for_devices(f"tcp://{host}:{port}", keys.link)
        )
        self._stack.push_async_callback(enroll_listener.close)
        self.port, self.enroll_port = _port(listener.address), _port(enroll_listener.address)
        ports.remember(agents=self.port, enroll=self.enroll_port)
        return listener, enroll_listener

    def _wire_up(self, listener: zeromq.ZeromqListener, keys: Keys) -> None:
        config, manifest = self.config, self.bundle.manifest
        loads = (
            read_loads(config.expert_loads, str(self.bundle.digest), layer_experts(manifest))
            if config.expert_loads is not None
            else None
        )
        model = model_profile(manifest, config.kv_tokens_wanted, config.formats, loads)
        self.loop = ControlLoop(
            bundle=self.bundle.digest,
            split=config.split,
            limits=config.limits,
            journal=self.journal,
            trust=self.registry,
            planner=Placer(model, config.split, config.limits),
            clock=self._clock,
        )
        news = AgentNews(
            self.loop,
            self.registry,
            bundle=self.bundle.digest,
            hidden_size=manifest.model.hidden_size,
            clock=self._clock,
        )
        self.links = AgentLinks(
            listener,
            news,
            SliceServer(self.bundle, keys.signing.secret),
            members=self.loop.members,
            timeout_seconds=config.limits.device_timeout_seconds,
        )
        self.sessions = SessionHost(
            self._tasks.group,
            clock=self._clock,
            next_session=self.journal.next_session,
            post=self.links.post,
            tell=self.loop.tell,
            pipeline=lambda lease: self.loop.state.find(lease),
            meter=self._meter,
            step_seconds=config.limits.step_seconds,
            names=PageNames(secrets.token_bytes(SECRET_BYTES), self.bundle.digest),
        )
        self.loop.links, self.loop.sessions = self.links, self.sessions
        news.links, news.sessions = self.links, self.sessions
        self.desk = RequestDesk(
            config,
            bundle=self.bundle.digest,
            model=manifest.model,
            decoder=self._text.tokenizer,
            journal=self.journal,
            loop=self.loop,
            sessions=self.sessions,
            meter=self._meter,
        )

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.desk.is_closed = True
        try:
            await self.sessions.stop()
            await self.desk.finish_abandoned(math.inf)
        finally:
            await self._stack.aclose()

    async def drain(self) -> None:
        """Nothing new from now on; what runs gets a moment. The rest goes on from the journal at the next start."""
        self.desk.is_closed = True
        await self.sessions.drain(self.config.drain_seconds)

    @property
    def journal(self) -> Journal:
        if self._journal is None:
            raise RuntimeError("the coordinator is not started")
        return self._journal

    async def _keep_house(self) -> None:
        prune_at = self._clock()
        while True:
            await asyncio.sleep(HOUSEKEEPING_SECONDS)
            await self.registry.write_tokens()
            await self.desk.finish_abandoned(self._clock())
            if self._clock() >= prune_at:
                config = self.config
                pruned = await self.journal.prune_requests(
                    time.time() - config.keep_requests_seconds, config.keep_requests
                )
                prune_at = self._clock() + (0.0 if pruned else PRUNING_SECONDS)

    # ------------------------------------------------------------ text

    @property
    def model(self) -> ModelInfo:
        return self.bundle.manifest.model

    def encode(self, text: str) -> list[int]:
        return self._text.encode(text)

    def encode_chat(self, messages: Sequence[dict[str, object]]) -> list[int]:
        return self._text.encode_chat(messages)

    def decode(self, ids: Sequence[int]) -> str:
        return self._text.decode(ids)

    def tokenizer(self) -> tuple[str, bytes]:
        return self._text.digest, self._text.json

    # ------------------------------------------------------------ requests

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        return self.desk.generate(request)

    async def resume(self, request: RequestId, after_index: int) -> AsyncIterator[TokenEvent]:
        return await self.desk.resume(request, after_index)

    def draft(self, request: RequestId, draft: Draft, source: str) -> None:
        self.desk.draft(request, draft, source)

    async def embed(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        return await self.desk.embed(sequences)

    async def probe(self) -> None:
        await self.desk.probe()

    # ------------------------------------------------------------ status, devices

    def status(self) -> ClusterStatus:
        now, state, limits = self._clock(), self.loop.state, self.config.limits
        plans = cluster_status.plan_statuses(state, self.config.split, self._meter.single_tokens_per_second)
        return ClusterStatus(
            model=self.model,
            bundle=self.bundle.digest,
            model_weight_bytes=self.bundle.manifest.weight_bytes,
            devices=cluster_status.device_statuses(state, self.registry.devices, now, limits.exclude_seconds),
            plan=plans[0] if plans else None,
            requests=tuple(cluster_status.request_status(g, now) for g in self.desk.generations),
            tokens_per_second=self._meter.cluster_tokens_per_second(now),
            uptime_seconds=now - self._started_at,
            plans=plans,
            drafts=cluster_status.draft_statuses(self.sessions.drafts),
        )

    def create_join_link(self) -> str:
        return self.registry.new_join_link(reachable_host(self.config.host), self.port, self.enroll_port)

    async def revoke(self, device: str) -> None:
        entry = await self.registry.revoke(device)
        await self.links.cut(entry.device_id, "it was revoked")
        self.loop.tell(ev.DeviceRevoked(entry.device_id, self._clock()))


class _StoppableTasks:
    """A task group whose members end when its block does."""

    def __init__(self) -> None:
        self.group = asyncio.TaskGroup()
        self._parts: list[asyncio.Task[None]] = []

    def add(self, part: Coroutine[object, object, None]) -> None:
        self._parts.append(self.group.create_task(part))

    async def __aenter__(self) -> Self:
        await self.group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in self._parts:
            part.cancel()
        await self.group.__aexit__(kind, error, trace)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])
