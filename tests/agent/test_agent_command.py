"""`edge-runtime agent` as a process: what it needs, what it says, how it ends."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from edge_runtime.agent.config import NO_DATA_PORT
from edge_runtime.agent.status import Failed, Loading, Serving
from edge_runtime.bundle import Bundle
from edge_runtime.cli.agent import _advertised, _data_address, _StatusPrinter
from edge_runtime.cli.main import main
from edge_runtime.errors import UsageError
from edge_runtime.protocol.messages import Refused, StageFailed, StageReady
from tests.support.mini_coordinator import MiniCoordinator
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

FORBIDDEN = ("torch", "transformers", "onnx", "jinja2", "prometheus_client")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_tiny_bundle(tmp_path_factory.mktemp("command") / "bundle", TinyModel(layers=2))


def test_an_agent_imports_nothing_that_a_phone_does_not_have() -> None:
    program = (
        "import sys, edge_runtime.agent.daemon, edge_runtime.engine.cpu;"
        "import edge_runtime.engine.onnx, edge_runtime.engine.probe;"
        f"print([name for name in {FORBIDDEN!r} if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_listing_the_command_imports_no_engine() -> None:
    program = (
        "import sys, edge_runtime.cli.agent;"
        "print([name for name in ('numpy', 'onnxruntime', 'zmq') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ("", 0)),
        ("none", ("", NO_DATA_PORT)),
        ("10.0.0.7:4000", ("10.0.0.7", 4000)),
        ("[::1]:0", ("::1", 0)),
    ],
)
def test_data_addresses(text: str, expected: tuple[str, int]) -> None:
    assert _data_address(text) == expected


@pytest.mark.parametrize("text", ["10.0.0.7", "host:port", "host:70000", ":1"])
def test_what_is_no_data_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not an address"):
        _data_address(text)


def test_an_unpaired_device_is_told_how_to_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["agent", "--state", str(tmp_path), "--name", "phone"]) == 3
    assert "hint: edge-runtime agent --join LINK" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--name", ""], ["--memory", "1MiB"], ["--threads", "-1"]])
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, flags: list[str]) -> None:
    try:
        code = main(["agent", "--state", str(tmp_path), *flags])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code in (2, 3)


def test_progress_is_told_in_tenths(capsys: pytest.CaptureFixture[str]) -> None:
    tell = _StatusPrinter(as_json=True)
    for done in range(0, 101, 2):
        tell(Loading(1, "fetching", done, 100))
    tell(Serving(1, "tiny", 0, 2, 1 << 20, 320))
    tell(Failed(1, "it broke", "mend it"))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["loading"] * 11 + ["serving", "failed"]
    assert lines[-2]["first_layer"] == 0


# ---------------------------------------------------------------- real processes


@asynccontextmanager
async def process(directory: Path, *flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
    command = ["-m", "edge_runtime.cli", "agent", "--state", str(directory), "--name", "phone"]
    started = await asyncio.create_subprocess_exec(
        *(sys.executable, *command, "--memory", "512MiB", "--threads", "1", *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.communicate()


@pytest.mark.cluster
async def test_a_process_pairs_serves_and_leaves_when_it_is_told_to(bundle: Bundle, tmp_path: Path) -> None:
    async with MiniCoordinator(bundle).running() as coordinator:
        async with process(tmp_path, "--join", coordinator.join_link(), "--json") as agent:
            await coordinator.wait_for("phone")
            lease = await coordinator.load(["phone"], [])
            message, _ = await coordinator.links["phone"].expect(StageReady, StageFailed)
            assert isinstance(message, StageReady), message
            session = await coordinator.open(["phone"], lease, [1, 2, 3], 8)
            assert (await coordinator.tokens("phone", session))[session]
            agent.send_signal(signal.SIGTERM)
            out, err = await agent.communicate()
        events = [json.loads(line)["event"] for line in out.decode().splitlines()]
        assert (events[:2], events[-1]) == (["paired", "connected"], "serving")
        assert agent.returncode == 0, err.decode()
        assert b"lease" in err
        assert b"Traceback" not in err
        for name in ("device.key", "pairing.json"):
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
        coordinator.links.clear()
        async with process(tmp_path, "--json") as agent:  # paired already: no link needed
            await coordinator.wait_for("phone")


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("refused", "code"),
    [
        (Refused("protocol_version", "the coordinator speaks protocol 9", "update this device"), 21),
        (Refused("revoked", "phone was revoked", "pair it again"), 24),
    ],
)
async def test_a_final_refusal_ends_the_process_with_its_reason(
    bundle: Bundle, tmp_path: Path, refused: Refused, code: int
) -> None:
    async with MiniCoordinator(bundle).running() as coordinator:
        coordinator.refuse = lambda hello: refused
        async with process(tmp_path, "--join", coordinator.join_link()) as agent, asyncio.timeout(30):
            _, err = await agent.communicate()
    assert agent.returncode == code
    assert refused.reason in err.decode()
    assert f"hint: {refused.hint}" in err.decode()


@pytest.mark.parametrize("text", ["none", "host", "host:0", "host:99999", ":7"])
def test_what_leads_nowhere_is_not_advertised(text: str) -> None:
    with pytest.raises(UsageError):
        _advertised(text)


def test_an_advertised_address_is_told_as_it_is() -> None:
    assert (_advertised(""), _advertised("10.0.0.7:4000")) == ("", "10.0.0.7:4000")
