"""The agent: one device's part in a cluster, from its first pairing to its end.

It dials the coordinator and never waits to be dialled. Pairing, the link to the coordinator, heartbeats and loading
happen here, on the agent's event loop. Rows never pass through it: they have a loop of their own (`data_plane.py`).

Knows: how the parts of an agent fit together. Does not know: the rules of sessions, how rows are computed, the CLI.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version as installed_version

from edge_runtime.agent.backoff import Backoff
from edge_runtime.agent.config import NO_DATA_PORT, AgentConfig
from edge_runtime.agent.control_link import ControlLink
from edge_runtime.agent.data_address import data_address
from edge_runtime.agent.data_plane import DataPlane
from edge_runtime.agent.device_profile import DeviceProfiler, MeasurementCache
from edge_runtime.agent.engine_start import budget_of, import_engine
from edge_runtime.agent.expert_loader import ExpertShareLoader
from edge_runtime.agent.expert_report import ExpertReporter
from edge_runtime.agent.loader import MakeStage, StageLoader, device_stages
from edge_runtime.agent.memory import EXPERTS_ALL, resident_bytes
from edge_runtime.agent.pairing_file import load_pairing, save_pairing
from edge_runtime.agent.pipeline_events import LoadFailed
from edge_runtime.agent.progress import ProgressGate
from edge_runtime.agent.slice_fetcher import SliceChannel, SliceFetcher
from edge_runtime.agent.status import (
    Connected,
    Disconnected,
    Failed,
    Holding,
    Loading,
    Paired,
    Serving,
    Status,
)
from edge_runtime.bundle.store import BundleStore
from edge_runtime.engine.executors import TORCH
from edge_runtime.errors import (
    ConfigError,
    ConnectionClosed,
    EdgeRuntimeError,
    TransportError,
    TrustError,
    first_of,
)
from edge_runtime.protocol.messages import (
    HOLDS_EXPERTS,
    PROTOCOL_VERSION,
    Heartbeat,
    Hello,
    LoadStage,
    Message,
    PeerLease,
    ProfileRequest,
    Refused,
    Relay,
    SliceChunk,
    SliceRequest,
    StageFailed,
    StageProgress,
    Welcome,
)
from edge_runtime.transport import zeromq
from edge_runtime.transport.base import Frame
from edge_runtime.trust.identity import KeyPair
from edge_runtime.trust.pairing import JoinLink, Pairing, enroll

log = logging.getLogger(__name__)

KEY_FILE = "device.key"
PROFILE_FILE = "profiles.json"
GIVE_BACK_SECONDS = 300.0  # a page kept for another session waits once to twice as long for it


class Agent:
    """`run` until cancelled, or until the coordinator refuses this device for good."""

    def __init__(
        self,
        config: AgentConfig,
        *,
        on_status: Callable[[Status], None] = lambda status: None,
        make_stage: MakeStage | None = None,
    ) -> None:
        self._config = config
        self._on_status = on_status
        self._make_stage = make_stage
        self._executor = config.executor  # until `run` knows what `auto` is here
        self._boot_id = secrets.token_hex(8)
        self._gave_back_at = 0.0
        self._loading: asyncio.Task[None] | None = None
        self._profiling: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ life

    async def run(self) -> None:
        """Raises TrustError, VersionError (refused for good), ConfigError; else only ends by cancellation."""
        directory = self._config.state_directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = KeyPair.load_or_create(directory / KEY_FILE)
        pairing = await self._pair(key)
        self._executor = await asyncio.to_thread(import_engine, self._config.executor)
        self._budget = budget_of(self._config.memory_budget_bytes, self._executor)
        self._loop = asyncio.get_running_loop()
        self._broken: asyncio.Future[None] = self._loop.create_future()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")
        wanted = self._config.data_port != NO_DATA_PORT
        address = data_address(self._config, pairing.coordinator_address) if wanted else ""
        self._plane = DataPlane(self, key, pairing.device_id, pairing.signing_key, address)
        self._worker = self._plane.worker
        self._worker.start()
        try:
            await self._serve(key, pairing)
        except* EdgeRuntimeError as problems:
            raise first_of(problems) from None
        finally:
            await asyncio.to_thread(self._disk.shutdown, cancel_futures=True)
            if not await asyncio.to_thread(self._worker.stop):
                log.error("the compute thread did not end in time")

    async def _pair(self, key: KeyPair) -> Pairing:
        """The pairing on disk; a join link is used only where there is none, since it works once."""
        directory = self._config.state_directory
        pairing = load_pairing(directory)
        if pairing is None:
            if not self._config.join:
                raise ConfigError(
                    f"this device is not paired: {directory} holds no pairing",
                    hint="edge-runtime agent --join LINK, with the link that the coordinator prints",
                )
            pairing = await enroll(JoinLink.parse(self._config.join), key, self._config.name)
            save_pairing(directory, pairing)
            self._on_status(Paired(pairing.device_id, pairing.coordinator_address))
        elif self._config.join and JoinLink.parse(self._config.join).server_key != pairing.server_key:
            raise TrustError(
                f"this device is paired with another coordinator ({pairing.coordinator_address})",
                hint=f"use another --state directory, or delete {directory} to pair anew",
            )
        return pairing

    async def _serve(self, key: KeyPair, pairing: Pairing) -> None:
        self._pairing = pairing
        opened: asyncio.Future[str] = self._loop.create_future()
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            tasks.create_task(self._run_plane(opened))
            self._control = ControlLink(
                lambda: zeromq.connect(pairing.coordinator_address, key, pairing.server_key),
                self._hello(await opened),
                self._heartbeat,
                self,
                Backoff(random.Random()),
            )
            self._make_loader(pairing)
            log.info("device %s (%s) starts", pairing.device_id, self._config.name)
            tasks.create_task(self._control.run())
            tasks.create_task(self._until_broken())

    async def _run_plane(self, opened: asyncio.Future[str]) -> None:
        """On the compute thread, for as long as this waits."""

        def tell(address: str) -> None:
            self._loop.call_soon_threadsafe(_resolve, opened, address)

        await asyncio.wrap_future(self._worker.beside(self._plane.run(tell)))

    def _make_loader(self, pairing: Pairing) -> None:
        directory = self._config.state_directory
        self._slices = SliceChannel(self._ask)
        fetcher = SliceFetcher(BundleStore(directory), self._slices, {pairing.signing_key}, self._disk)
        threads = self._config.threads
        # A torch stage has all its experts in the device's memory.
        experts = EXPERTS_ALL if self._executor == TORCH else self._config.expert_cache
        cache = MeasurementCache(directory / PROFILE_FILE)
        self._profiler = DeviceProfiler(
            fetcher,
            self._worker,
            self._budget,
            self._executor,
            threads,
            cache,
            experts,
            self._config.expert_start_bits,
        )
        self._loader = StageLoader(
            fetcher,
            self._worker,
            self._budget,
            threads,
            self._profiler.is_row_invariant,
            self._make_stage or device_stages(self._executor),
            experts,
            self._profiler.flash_lanes,
            ExpertShareLoader(
                fetcher,
                self._worker,
                self._budget,
                threads,
                pairing.device_id,
                self._plane.experts,
                self._profiler.numeric_class,
            ),
            self._config.expert_start_bits,
            self._config.expert_prediction,
        )
        self._expert_reporter = ExpertReporter()

    def _hello(self, address: str) -> Hello:
        if self._config.advertised_address:
            address = f"tcp://{self._config.advertised_address}"
        return Hello(
            protocol_version=PROTOCOL_VERSION,
            software_version=installed_version("edge-runtime"),
            device_name=self._config.name,
            boot_id=self._boot_id,
            data_address=address,
            memory_budget_bytes=self._budget.total_bytes,
            threads=self._config.threads,
            pid=os.getpid(),
        )

    def _heartbeat(self, sequence: int) -> Heartbeat:
        worker, stage = self._worker, self._worker.stage
        self._report_experts()
        if self._loop.time() - self._gave_back_at > GIVE_BACK_SECONDS:
            self._gave_back_at = self._loop.time()
            worker.give_back()
        return Heartbeat(
            sequence,
            stage.steps,
            stage.open_sessions,
            stage.kv_used_tokens,
            resident_bytes(),
            *stage.served_seconds,
        )

    async def _until_broken(self) -> None:
        """Ends the agent where an event could not be handled: a bug must not leave a device that only looks alive."""
        await self._broken

    # ------------------------------------------------------------ what arrives

    def connected(self, welcome: Welcome) -> None:
        log.info("device %s is connected to %s", welcome.device_id, self._pairing.coordinator_address)
        self._on_status(Connected(self._pairing.coordinator_address))

    def disconnected(self, reason: str) -> None:
        self._slices.link_lost()
        self._plane.control_lost()
        if self._profiling is not None:
            self._profiling.cancel()
        if reason:
            self._on_status(Disconnected(reason))

    def received(self, message: Message, payloads: Sequence[memoryview]) -> None:
        match message:
            case SliceChunk():
                self._slices.arrived(message, payloads)
            case Relay():
                self._plane.relayed(message.peer, payloads)
            case PeerLease():
                self._plane.lease(message)
            case ProfileRequest():
                if self._profiling is None or self._profiling.done():
                    self._profiling = self._tasks.create_task(self._profile(message.bundle))
            case Refused():
                log.warning("the coordinator refuses: %s hint: %s", message.reason, message.hint)
                self._slices.refused(message.reason, message.hint)
            case _:
                self._plane.received(message)

    # ------------------------------------------------------------ what the data plane wants, on its thread

    def post(self, message: Message, payloads: Sequence[Frame]) -> None:
        self._loop.call_soon_threadsafe(self._post, message, payloads)

    async def relay(self, message: Message, payloads: Sequence[Frame]) -> None:
        sending = asyncio.run_coroutine_threadsafe(self._control.send(message, payloads), self._loop)
        await asyncio.wrap_future(sending)

    def start_loading(self, order: LoadStage) -> None:
        self._loop.call_soon_threadsafe(self._start_loading, order)

    def stop_loading(self) -> None:
        self._loop.call_soon_threadsafe(self._stop_loading)

    def broke(self, problem: Exception) -> None:
        self._loop.call_soon_threadsafe(self._break, problem)

    # ------------------------------------------------------------ and what is done about it

    def _post(self, message: Message, payloads: Sequence[Frame]) -> None:
        if isinstance(message, StageFailed):
            log.error("lease %d failed: %s hint: %s", message.lease, message.reason, message.hint)
            self._on_status(Failed(message.lease, message.reason, message.hint))
        self._control.post(message, payloads)

    def _start_loading(self, order: LoadStage) -> None:
        self._stop_loading()
        self._loading = self._tasks.create_task(self._load(order))

    def _stop_loading(self) -> None:
        if self._loading is not None:
            self._loading.cancel()

    def _break(self, problem: Exception) -> None:
        if not self._broken.done():
            self._broken.set_exception(problem)

    async def _ask(self, request: SliceRequest) -> None:
        await self._control.send(request)

    # ------------------------------------------------------------ loading and measuring

    async def _load(self, order: LoadStage) -> None:
        log.info(
            "lease %d: stage %d of %d, layers %d-%d",
            order.lease,
            order.stage + 1,
            len(order.devices),
            order.first_layer,
            order.last_layer,
        )
        gate = ProgressGate(self._loop.time)

        def progress(activity: str, done_bytes: int, total_bytes: int) -> None:
            if gate.opens(activity, done_bytes >= total_bytes):
                self._control.post(StageProgress(order.lease, activity, done_bytes, total_bytes))
                self._on_status(Loading(order.lease, activity, done_bytes, total_bytes))

        try:
            loaded, manifest = await self._loader.load(order, progress)
        except EdgeRuntimeError as problem:
            self._plane.load_failed(LoadFailed(order.lease, problem.code, problem.message, problem.hint))
            return
        except (
            OSError,
            MemoryError,
        ) as problem:  # a full disk; a machine that has less than it was said to have
            hint = f"make room for {self._config.state_directory}, or give the agent less --memory"
            self._plane.load_failed(
                LoadFailed(order.lease, "engine", f"{type(problem).__name__}: {problem}", hint)
            )
            return
        self._plane.loaded(loaded, manifest.model.hidden_size, order.wire)
        if order.stage == HOLDS_EXPERTS:
            self._on_status(Holding(order.lease, manifest.model.name, loaded.weight_bytes))
            return
        log.info("lease %d: serving, room for %d tokens", order.lease, loaded.kv_capacity_tokens)
        experts = self._loader.expert_cache
        self._on_status(
            Serving(
                order.lease,
                manifest.model.name,
                order.first_layer,
                order.last_layer,
                loaded.weight_bytes,
                loaded.kv_capacity_tokens,
                0 if experts is None else experts.arena_bytes,
                0 if experts is None else experts.total_bytes,
                self._loader.early_quality,
            )
        )

    def _report_experts(self) -> None:
        experts = self._expert_reporter.report(
            self._loop.time(), self._loader.expert_cache, self._loader.early_quality, self._loader.peers_say
        )
        if experts is not None:
            log.info("%s", experts)
            self._on_status(experts)

    async def _profile(self, bundle: str) -> None:
        """Lease 0 in the answers: a measurement belongs to no plan."""
        gate = ProgressGate(self._loop.time)

        def progress(activity: str, done_bytes: int, total_bytes: int) -> None:
            if gate.opens(activity, done_bytes >= total_bytes):
                self._control.post(StageProgress(0, activity, done_bytes, total_bytes))

        try:
            self._control.post(await self._profiler.report(bundle, progress))
        except (ConnectionClosed, TransportError) as problem:
            log.warning("could not measure this device: %s", problem.message)
        except EdgeRuntimeError as problem:
            self._post(StageFailed(0, problem.code, problem.message, problem.hint), [])


def _resolve(future: asyncio.Future[str], result: str) -> None:
    if not future.done():  # else nobody waits any more
        future.set_result(result)
