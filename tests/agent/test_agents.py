"""Real agents over ZeroMQ and CURVE on this machine, against a scripted coordinator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.agent.config import NO_DATA_PORT
from edge_runtime.agent.due_row import DueRow
from edge_runtime.agent.fast_path import FastPath
from edge_runtime.agent.status import Connected, Paired, Serving
from edge_runtime.bundle import Bundle
from edge_runtime.core import LayerRange, SamplingParams
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.page_table import PAGE_TOKENS
from edge_runtime.protocol.messages import (
    PAGE_NAME_BYTES,
    CloseSession,
    LoadStage,
    Pooled,
    ProfileReport,
    ProfileRequest,
    RowsHeld,
    SessionFailed,
    StageFailed,
    UnloadStage,
)
from edge_runtime.transport.eager_loop import HAS_EPOLL
from tests.support.agents import NAMES, PROMPT, cluster_of, one_device_loop
from tests.support.mini_coordinator import MiniCoordinator
from tests.support.stages import Pipeline, span
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, seed=7, repetition_penalty=1.2, presence_penalty=0.3)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = TinyModel(layers=3, kind="encoder", qk_norm=False)
    return build_tiny_bundle(tmp_path_factory.mktemp("agents") / "encoder", model)


async def test_rows_of_a_lone_session_are_foreseen_on_every_stage(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short way is taken over real links, for nearly all rows, and the ids are those of one device."""
    taken: list[object] = []
    at_once: list[object] = []
    settle, look = FastPath._settle, FastPath._look_at_hole

    def noted(fast: FastPath) -> None:
        settle(fast)
        taken.append(fast)

    def looked(fast: FastPath, due: DueRow, hole: bytes) -> Callable[[], None] | None:
        then = look(fast, due, hole)
        at_once.append(then)
        return then

    monkeypatch.setattr(FastPath, "_settle", noted)
    monkeypatch.setattr(FastPath, "_look_at_hole", looked)
    async with cluster_of(bundle, tmp_path) as cluster:
        coordinator = cluster.coordinator
        await cluster.start(*NAMES)
        lease = await cluster.serve(NAMES, [1, 2])
        session = await coordinator.open(NAMES, lease, PROMPT, 30, sampling=SAMPLED)
        tokens = (await coordinator.tokens(NAMES[-1], session))[session]
        assert [token.id for token in tokens] == one_device_loop(bundle, PROMPT, 30, SAMPLED)
    assert len(set(taken)) == len(NAMES)
    assert len(taken) > 2 * len(tokens)
    if HAS_EPOLL:
        assert sum(then is not None for then in at_once) > len(tokens)


@pytest.mark.parametrize(("names", "edges"), [(NAMES[:1], []), (NAMES[:2], [1]), (NAMES, [1, 2])])
async def test_any_cut_generates_what_one_device_generates(
    bundle: Bundle, tmp_path: Path, names: Sequence[str], edges: Sequence[int]
) -> None:
    async with cluster_of(bundle, tmp_path) as cluster:
        coordinator = cluster.coordinator
        await cluster.start(*names)
        lease = await cluster.serve(names, edges)
        asked = {}
        for sampling in (SamplingParams(temperature=0.0), SAMPLED):  # both at once, in shared batches
            asked[await coordinator.open(names, lease, PROMPT, 30, sampling=sampling)] = sampling
        found = await coordinator.tokens(names[-1], *asked)
        for session, sampling in asked.items():
            tokens = found[session]
            assert [token.id for token in tokens] == one_device_loop(bundle, PROMPT, 30, sampling)
            assert [token.position for token in tokens] == list(range(len(PROMPT), len(PROMPT) + len(tokens)))
            assert not any(token.finish for token in tokens[:-1])
            await coordinator.close(names, lease, session)
        for name in names:
            assert isinstance(cluster.statuses[name][0], Paired)
            assert isinstance(cluster.statuses[name][1], Connected)
            assert isinstance(cluster.statuses[name][-1], Serving)
        await all_kv_is_free(coordinator, names)


@pytest.mark.parametrize(("names", "edges"), [(NAMES[:1], []), (NAMES[:2], [1]), (NAMES, [1, 2])])
@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0), SAMPLED], ids=["greedy", "sampled"])
async def test_a_session_that_begins_like_another_takes_its_rows_over(
    bundle: Bundle, tmp_path: Path, names: Sequence[str], edges: Sequence[int], sampling: SamplingParams
) -> None:
    """Penalties count the ids of rows that were never run here; the answer's rows are kept, too."""
    long = [n * 7 % 190 + 3 for n in range(70)]
    async with cluster_of(bundle, tmp_path) as cluster:
        coordinator = cluster.coordinator
        await cluster.start(*names)
        lease = await cluster.serve(names, edges)
        ids, reused = long, 0
        for _ in range(3):
            opened = page_names(ids[:-1])
            session = await coordinator.open(
                names, lease, ids, len(ids) + 40, sampling=sampling, page_names=b"".join(opened)
            )
            if reused or len(names) == 1:
                held, _ = await coordinator.links[names[-1]].expect(RowsHeld)
                assert (held.rows, held.reused) == (reused, True)
            tokens = (await coordinator.tokens(names[-1], session))[session]
            generated = [token.id for token in tokens]
            assert generated == one_device_loop(bundle, ids, len(ids) + 40, sampling)
            ids = [*ids, *generated]
            kept = page_names(ids[:-1])
            rows = tuple(ids[len(opened) * PAGE_TOKENS : len(kept) * PAGE_TOKENS])
            await coordinator.close(names, lease, session, (b"".join(kept[len(opened) :]), rows))
            ids, reused = [*ids, 11, 12], len(kept) * PAGE_TOKENS
            await all_kv_is_free(
                coordinator, names
            )  # every stage heard of the end, each over a link of its own


def page_names(ids: Sequence[int]) -> list[bytes]:
    ends = range(PAGE_TOKENS, len(ids) + 1, PAGE_TOKENS)
    return [sha256(repr(list(ids[:end])).encode()).digest()[:PAGE_NAME_BYTES] for end in ends]


async def all_kv_is_free(coordinator: MiniCoordinator, names: Sequence[str]) -> None:
    for name in names:
        while not coordinator.links[name].beats.empty():
            coordinator.links[name].beats.get_nowait()  # of the time before
        for _ in range(2):  # the first may have been on its way since before the session was opened
            await coordinator.links[name].beat(lambda beat: (beat.sessions, beat.kv_tokens) == (0, 0))


async def test_devices_that_can_not_be_dialled_use_the_relay(bundle: Bundle, tmp_path: Path) -> None:
    async with cluster_of(bundle, tmp_path) as cluster:
        coordinator, names = cluster.coordinator, NAMES[:2]
        await cluster.start(*names, data_port=NO_DATA_PORT)
        assert coordinator.links["phone"].hello.data_address == ""
        lease = await cluster.serve(names, [2])
        session = await coordinator.open(names, lease, PROMPT, 20, sampling=SAMPLED)
        tokens = (await coordinator.tokens(names[-1], session))[session]
        assert [token.id for token in tokens] == one_device_loop(bundle, PROMPT, 20, SAMPLED)
        assert coordinator.relayed > 0


async def test_a_new_plan_goes_on_from_the_journalled_ids(bundle: Bundle, tmp_path: Path) -> None:
    """Three devices, one is gone, two go on: penalties still know which ids were the prompt's."""
    expected = one_device_loop(bundle, PROMPT, 30, SAMPLED)
    async with cluster_of(bundle, tmp_path) as cluster:
        coordinator = cluster.coordinator
        await cluster.start(*NAMES)
        lease = await cluster.serve(NAMES, [1, 2])
        session = await coordinator.open(NAMES, lease, PROMPT, 30, sampling=SAMPLED)
        tokens = await coordinator.links["box"].expect_tokens(session, 5)
        journalled = [token.id for token in tokens[:5]]
        await cluster.stop("laptop")
        names = ("box", "phone")
        again = await cluster.serve(names, [2])
        ids = [*PROMPT, *journalled]
        session = await coordinator.open(names, again, ids, 30, sampling=SAMPLED, prompt_rows=len(PROMPT))
        tokens = (await coordinator.tokens("phone", session))[session]
        assert [*journalled, *(token.id for token in tokens)] == expected


async def test_an_encoder_over_two_devices_gives_the_vector_of_one(encoder: Bundle, tmp_path: Path) -> None:
    stage = CpuStage.load(encoder, LayerRange(0, 2), threads=1, kv_budget_bytes=64 << 20)
    pipeline = Pipeline([stage])
    pipeline.open(1, len(PROMPT))
    whole = replace(span(1, 0, PROMPT, 0), causal=False)
    expected = pipeline.run(whole)[0]
    async with cluster_of(encoder, tmp_path) as cluster:
        coordinator, names = cluster.coordinator, NAMES[:2]
        await cluster.start(*names)
        lease = await cluster.serve(names, [1])
        await coordinator.open(names, lease, PROMPT, len(PROMPT), tail="pooler")
        _, (payload,) = await coordinator.links["laptop"].expect(Pooled)
        assert np.array_equal(np.frombuffer(payload, np.float32), expected)


async def test_a_session_without_room_is_refused_and_others_go_on(bundle: Bundle, tmp_path: Path) -> None:
    async with cluster_of(bundle, tmp_path) as cluster:
        coordinator = cluster.coordinator
        await cluster.start("phone")
        lease = await cluster.serve(["phone"], [])
        session = await coordinator.open(["phone"], lease, PROMPT, 513)
        message, _ = await coordinator.links["phone"].expect(SessionFailed)
        assert isinstance(message, SessionFailed)
        assert (message.session, message.code) == (session, "capacity")
        session = await coordinator.open(["phone"], lease, PROMPT, 12)
        assert (await coordinator.tokens("phone", session))[session]


async def test_a_stage_too_large_for_the_device_is_refused_with_both_numbers(
    bundle: Bundle, tmp_path: Path
) -> None:
    async with cluster_of(bundle, tmp_path) as cluster:
        await cluster.start("phone", memory_budget_bytes=64 << 20)
        await cluster.coordinator.load(["phone"], [])
        message, _ = await cluster.coordinator.links["phone"].expect(StageFailed)
        assert isinstance(message, StageFailed)
        assert message.code == "capacity"
        assert "the budget of this device is 64.0 MiB" in message.reason


async def test_a_device_measures_itself_once(bundle: Bundle, tmp_path: Path) -> None:
    reports = []
    for _ in range(2):
        async with cluster_of(bundle, tmp_path / "x") as cluster:
            coordinator = cluster.coordinator
            await cluster.start("phone", state_directory=tmp_path / f"phone-{len(reports)}")
            await coordinator.links["phone"].send(ProfileRequest(str(bundle.digest)))
            message, _ = await coordinator.links["phone"].expect(ProfileReport)
            assert isinstance(message, ProfileReport)
            reports.append(message)
        source, target = (tmp_path / f"phone-{i}" for i in range(2))
        if not target.exists():
            target.mkdir()
            (target / "profiles.json").write_bytes((source / "profiles.json").read_bytes())
    first, second = reports
    assert first.row_invariant
    assert min(first.layer_decode_seconds, first.layer_prefill_row_seconds, first.head_seconds) > 0
    assert first.memory_free_bytes > 0
    assert replace(first, memory_free_bytes=0, overhead_bytes=0) == replace(
        second, memory_free_bytes=0, overhead_bytes=0
    )


async def test_a_bundle_that_is_not_there_is_no_reason_to_end(bundle: Bundle, tmp_path: Path) -> None:
    async with cluster_of(bundle, tmp_path) as cluster:
        coordinator = cluster.coordinator
        await cluster.start("phone")
        link = coordinator.links["phone"]
        await link.send(LoadStage(900, "nonsense", 0, (coordinator.device("phone"),), 0, 2, 4))
        message, _ = await link.expect(StageFailed)
        assert isinstance(message, StageFailed)
        coordinator.numbers = iter(range(1000, 2000))
        lease = await cluster.serve(["phone"], [])
        await link.send(UnloadStage(lease))
        await cluster.serve(["phone"], [])


async def test_a_tampered_slice_fails_the_stage_by_its_name(bundle: Bundle, tmp_path: Path) -> None:
    def flip_last_bit(name: str, data: bytes) -> bytes:
        return data if name != "layers.1" else data[:-1] + bytes([data[-1] ^ 1])

    async with cluster_of(bundle, tmp_path) as cluster:
        coordinator = cluster.coordinator
        await cluster.start("phone")
        coordinator.tamper = flip_last_bit
        await coordinator.load(["phone"], [])
        message, _ = await coordinator.links["phone"].expect(StageFailed)
        assert isinstance(message, StageFailed)
        assert message.code == "tampered"
        assert "layers.1" in message.reason
        coordinator.tamper = lambda name, data: data
        await cluster.serve(["phone"], [])  # the sender was mended: nothing bad was kept


async def test_an_agent_dials_again_with_the_same_boot_id(bundle: Bundle, tmp_path: Path) -> None:
    async with cluster_of(bundle, tmp_path) as cluster:
        coordinator = cluster.coordinator
        await cluster.start("phone")
        await cluster.serve(["phone"], [])
        link = coordinator.links.pop("phone")
        await link.connection.close()
        await coordinator.wait_for("phone")
        assert coordinator.links["phone"].hello.boot_id == link.hello.boot_id
        await cluster.serve(["phone"], [])


async def test_heartbeats_tell_of_steps(bundle: Bundle, tmp_path: Path) -> None:
    async with cluster_of(bundle, tmp_path) as cluster:
        coordinator = cluster.coordinator
        await cluster.start("phone")
        lease = await cluster.serve(["phone"], [])
        session = await coordinator.open(["phone"], lease, PROMPT, 16)
        await coordinator.tokens("phone", session)
        beat = await coordinator.links["phone"].beat(lambda beat: beat.steps >= 3)
        assert (beat.sessions, beat.kv_tokens) == (1, 32)  # still open: a page of it is held
        assert beat.rss_bytes > 1 << 20
        await coordinator.links["phone"].send(CloseSession(session, lease))


async def test_sessions_cancelled_while_they_are_prefilled_leave_no_page(
    bundle: Bundle, tmp_path: Path
) -> None:
    """Pages, sessions, tasks, threads: counted on both devices, and by `cluster_of` at the end."""
    async with cluster_of(bundle, tmp_path) as cluster:
        coordinator, names = cluster.coordinator, ["phone", "laptop"]
        await cluster.start(*names)
        lease = await cluster.serve(names, [1])
        prompt = [*PROMPT] * (400 // len(PROMPT))
        for _ in range(8):
            session = await coordinator.open(names, lease, prompt, len(prompt) + 8)
            await coordinator.close(names, lease, session)
        session = await coordinator.open(names, lease, PROMPT, 12)
        assert (await coordinator.tokens("laptop", session))[session]
        await coordinator.close(names, lease, session)
        for name in names:
            beat = await coordinator.links[name].beat(lambda beat: beat.sessions == 0)
            assert (beat.sessions, beat.kv_tokens) == (0, 0)
