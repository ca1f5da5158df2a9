"""The small parts of an agent: back-off, addresses, files, outboxes, progress."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from edge_runtime.agent.backoff import Backoff
from edge_runtime.agent.config import NO_DATA_PORT, AgentConfig
from edge_runtime.agent.data_address import data_address
from edge_runtime.agent.device_profile import Measurement, MeasurementCache
from edge_runtime.agent.pairing_file import PAIRING_FILE, load_pairing, save_pairing
from edge_runtime.agent.peer_outbox import PeerOutbox
from edge_runtime.agent.progress import ProgressGate
from edge_runtime.core import DeviceId, Token
from edge_runtime.errors import ConfigError, TransportError
from edge_runtime.protocol.messages import Message, Tokens
from edge_runtime.transport.base import Frame
from edge_runtime.trust.pairing import Pairing

# ---------------------------------------------------------------- back-off


def test_waits_double_up_to_a_limit_and_start_again() -> None:
    backoff = Backoff(Random(1), first=1.0, most=8.0)
    for step in (1.0, 2.0, 4.0, 8.0, 8.0, 8.0):
        assert step / 2 <= backoff.next_seconds() <= step
    backoff.reset()
    assert backoff.next_seconds() <= 1.0


def test_many_agents_do_not_come_at_once() -> None:
    assert len({round(Backoff(Random(seed)).next_seconds(), 6) for seed in range(50)}) > 40


# ---------------------------------------------------------------- settings and addresses


def config(tmp_path: Path, **changes: object) -> AgentConfig:
    return AgentConfig(
        **({"name": "a", "state_directory": tmp_path, "memory_budget_bytes": 1 << 30, "threads": 1} | changes)
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad",
    [
        {"name": ""},
        {"name": "a\nb"},
        {"name": "a" * 65},
        {"memory_budget_bytes": 1},
        {"threads": 0},
        {"data_port": 65536},
        {"data_port": NO_DATA_PORT - 1},
        {"data_port": NO_DATA_PORT, "advertised_address": "10.0.0.7:4000"},
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        config(tmp_path, **bad)


def test_peers_dial_the_address_that_reaches_the_coordinator(tmp_path: Path) -> None:
    assert data_address(config(tmp_path), "tcp://127.0.0.1:5000") == "tcp://127.0.0.1:0"
    assert data_address(config(tmp_path, data_port=7), "tcp://[::1]:5000") in (
        "tcp://[::1]:7",
        "tcp://127.0.0.1:7",
    )


def test_an_address_that_was_given_is_used(tmp_path: Path) -> None:
    assert (
        data_address(config(tmp_path, data_host="10.1.2.3", data_port=9), "tcp://127.0.0.1:1")
        == "tcp://10.1.2.3:9"
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_that_nobody_can_dial_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="can't dial"):
        data_address(config(tmp_path, data_host=host), "tcp://127.0.0.1:1")


# ---------------------------------------------------------------- files


def test_a_pairing_is_kept_for_its_owner_only(tmp_path: Path) -> None:
    assert load_pairing(tmp_path / "state") is None
    pairing = Pairing(DeviceId("ab" * 16), "tcp://10.0.0.1:4000", bytes(range(32)), bytes(32))
    save_pairing(tmp_path / "state", pairing)
    assert load_pairing(tmp_path / "state") == pairing
    assert (tmp_path / "state" / PAIRING_FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"device_id": "x", "server_key": "zz"}'])
def test_a_damaged_pairing_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / PAIRING_FILE).write_text(text)
    with pytest.raises(ConfigError, match="is damaged") as caught:
        load_pairing(tmp_path)
    assert "pair again" in caught.value.hint


FOUND = Measurement("class", True, "", 1e-3, 2e-4, 3e-3)


def test_measurements_outlive_a_restart_and_hold_for_what_was_measured(tmp_path: Path) -> None:
    MeasurementCache(tmp_path / "m.json").put("bundle", 2, FOUND)
    again = MeasurementCache(tmp_path / "m.json")
    assert again.get("bundle", "class", 2) == FOUND
    for other in (("bundle", "class", 1), ("bundle", "another", 2), ("another", "class", 2)):
        assert again.get(*other) is None


@pytest.mark.parametrize("text", ["", "[1]", '{"a": {"wrong": 1}}', '{"a": 3}'])
def test_damaged_measurements_are_measured_again(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.json").write_text(text)
    cache = MeasurementCache(tmp_path / "m.json")
    assert cache.get("bundle", "class", 2) is None
    cache.put("bundle", 2, FOUND)
    assert json.loads((tmp_path / "m.json").read_text())


# ---------------------------------------------------------------- telling peers


class Wires:
    """Sends that a test lets through, device by device."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []
        self.blocked: dict[str, asyncio.Event] = {}
        self.broken: set[str] = set()
        self.lost: list[tuple[int, str]] = []

    def try_send(self, device_id: str, message: Message, payloads: Sequence[Frame]) -> bool:
        if device_id in self.blocked or device_id in self.broken:
            return False
        assert isinstance(message, Tokens)
        self.sent.append((device_id, message.session))
        return True

    async def send(self, device_id: str, message: Message, payloads: Sequence[Frame]) -> None:
        if device_id in self.blocked:
            await self.blocked[device_id].wait()
        if device_id in self.broken:
            raise TransportError("it has gone")
        assert isinstance(message, Tokens)
        self.sent.append((device_id, message.session))

    def on_lost(self, message: Tokens, reason: str) -> None:
        self.lost.append((message.session, reason))


def tokens(session: int) -> Tokens:
    return Tokens(session, 1, 0, (Token(0, 0),))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_slow_peer_keeps_nobody_else_waiting() -> None:
    wires = Wires()
    wires.blocked["slow"] = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        outbox = PeerOutbox(tasks, wires.try_send, wires.send, wires.on_lost)
        for session in (1, 2):
            outbox.post("slow", tokens(session), ())
            outbox.post("quick", tokens(session), ())
        await settle()
        assert wires.sent == [("quick", 1), ("quick", 2)]
        wires.blocked["slow"].set()
        await settle()
        assert wires.sent[2:] == [("slow", 1), ("slow", 2)]
        outbox.clear()


async def test_what_can_be_sent_waits_for_no_task() -> None:
    wires = Wires()
    async with asyncio.TaskGroup() as tasks:
        outbox = PeerOutbox(tasks, wires.try_send, wires.send, wires.on_lost)
        outbox.post("peer", tokens(1), ())
        assert wires.sent == [("peer", 1)]
        outbox.clear()


async def test_nothing_overtakes_what_waits() -> None:
    wires = Wires()
    wires.blocked["peer"] = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        outbox = PeerOutbox(tasks, wires.try_send, wires.send, wires.on_lost)
        outbox.post("peer", tokens(1), ())
        await settle()
        wires.blocked.pop("peer").set()  # the link has room again, the task has not run yet
        outbox.post("peer", tokens(2), ())
        await settle()
        outbox.post("peer", tokens(3), ())
        assert wires.sent == [("peer", 1), ("peer", 2), ("peer", 3)]
        outbox.clear()


async def test_what_can_not_be_sent_is_told_and_the_next_is_tried() -> None:
    wires = Wires()
    wires.broken.add("peer")
    async with asyncio.TaskGroup() as tasks:
        outbox = PeerOutbox(tasks, wires.try_send, wires.send, wires.on_lost)
        outbox.post("peer", tokens(1), ())
        await settle()
        wires.broken.clear()
        outbox.post("peer", tokens(2), ())
        await settle()
        outbox.clear()
    assert [session for session, _ in wires.lost] == [1]
    assert "it has gone" in wires.lost[0][1]
    assert wires.sent == [("peer", 2)]


async def test_a_plan_that_is_over_sends_nothing_more() -> None:
    wires = Wires()
    wires.blocked["peer"] = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        outbox = PeerOutbox(tasks, wires.try_send, wires.send, wires.on_lost)
        outbox.post("peer", tokens(1), ())
        await settle()
        outbox.clear()
        wires.blocked["peer"].set()
        await settle()
    assert wires.sent == wires.lost == []


# ---------------------------------------------------------------- progress


def test_progress_is_told_a_few_times_a_second_and_at_every_change() -> None:
    now = [0.0]
    gate = ProgressGate(lambda: now[0], every_seconds=1.0)
    assert gate.opens("fetching", False)
    assert not gate.opens("fetching", False)
    assert gate.opens("fetching", True)
    assert gate.opens("checking", False)
    now[0] = 0.9
    assert not gate.opens("checking", False)
    now[0] = 1.1
    assert gate.opens("checking", False)
