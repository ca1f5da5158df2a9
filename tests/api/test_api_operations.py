"""What operators use: health, readiness, metrics, status, events, pairing, revocation."""

from __future__ import annotations

import asyncio
import json

from prometheus_client.parser import text_string_to_metric_families

from coordinator.api.health import Readiness
from edge_runtime.errors import PlanError
from tests.support.fake_service import FakeService

COMPLETION = {"model": "tiny", "prompt": "hi", "seed": 0, "max_tokens": 3}


async def test_alive_is_not_ready(start):
    server = await start(FakeService(probe_error=PlanError("No device is paired.")))
    async with server.http.get(f"{server.url}/health") as response:
        assert (response.status, await response.json()) == (200, {"status": "ok"})
    async with server.http.get(f"{server.url}/ready") as response:
        assert response.status == 503
        assert (await response.json())["reason"] == "No device is paired."
        assert response.headers["Retry-After"] == "2"


async def test_readiness_probes_once_in_five_seconds_however_many_ask():
    service, now = FakeService(), [100.0]
    readiness = Readiness(service, clock=lambda: now[0])
    async with asyncio.TaskGroup() as group:
        for _ in range(50):
            group.create_task(readiness.reason())
    assert service.probes == 1
    now[0] += 4.9
    service.probe_error = PlanError("A device left.")
    assert await readiness.reason() == ""
    now[0] += 0.2
    assert await readiness.reason() == "A device left."
    assert service.probes == 2


async def test_a_pipeline_that_does_not_answer_is_not_ready(monkeypatch):
    monkeypatch.setattr("coordinator.api.health.PROBE_SECONDS", 0.01)
    service = FakeService()
    service.probe = asyncio.Event().wait
    assert "did not answer" in await Readiness(service).reason()


async def test_metrics_count_what_passed(server):
    for body in (COMPLETION, COMPLETION | {"stop": "b"}, COMPLETION | {"n": 2, "stream": True}):
        async with server.http.post(f"{server.url}/v1/completions", json=body) as response:
            assert response.status == 200
            await response.read()
    async with server.http.get(f"{server.url}/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        families = {family.name: family for family in text_string_to_metric_families(await response.text())}

    def value(name: str, **labels: str) -> float:
        samples = [s for f in families.values() for s in f.samples if s.name == f"edge_runtime_{name}"]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())

    assert value("request_success_total", finished_reason="length") == 3
    assert value("request_success_total", finished_reason="stop") == 1
    assert value("generation_tokens_total") == 3 * 3 + 2
    assert value("prompt_tokens_total") == 2 * 4
    assert value("time_to_first_token_seconds_count") == 4
    assert value("inter_token_latency_seconds_count") == 2 * 3 + 1
    assert value("e2e_request_latency_seconds_count") == 4
    assert value("num_requests_running") == value("num_requests_waiting") == 0
    assert value("pipeline_ready") == 1
    assert value("device_weight_bytes", device="phone") == 2_000_000
    assert value("device_up", device="old-tablet") == 0
    assert all(name.startswith("edge_runtime_") for name in families)


async def test_status_has_the_documented_shape(server):
    async with server.http.get(f"{server.url}/admin/status") as response:
        status = await response.json()
    assert status["model"]["name"] == "tiny"
    assert [device["name"] for device in status["devices"]] == ["phone", "laptop", "old-tablet"]
    assert status["devices"][0]["layers"] == [0, 1]
    assert status["devices"][2]["layers"] is None
    assert status["plan"]["stages"] == [["phone", 0, 1], ["laptop", 2, 3]]
    assert status["requests"] == []


async def test_events_come_when_something_changes_and_the_stream_ends_with_the_server(server, monkeypatch):
    monkeypatch.setattr("coordinator.api.admin.EVENT_SECONDS", 0.01)
    monkeypatch.setattr("coordinator.api.admin.KEEP_ALIVE_SECONDS", 0.05)
    async with server.http.get(f"{server.url}/admin/events") as response, asyncio.timeout(5):
        assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"
        first = await response.content.readuntil(b"\n\n")
        assert first.startswith(b"event: status\ndata: {")
        assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"  # nothing changed
        async with server.http.post(f"{server.url}/admin/devices/phone/revoke") as revoked:
            assert await revoked.json() == {"device": "phone", "revoked": True}
        while (event := await response.content.readuntil(b"\n\n")) == b": keep-alive\n\n":
            pass
        assert json.loads(event.split(b"data: ")[1])["devices"][0]["state"] == "revoked"


async def test_pairing_and_revoking(server):
    async with server.http.post(f"{server.url}/admin/join-links") as response:
        assert response.status == 201
        made = await response.json()
    assert made["link"].startswith("edge://")
    assert made["command"] == f"edge-runtime agent --join '{made['link']}'"
    async with server.http.post(f"{server.url}/admin/devices/nobody/revoke") as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "device_not_found"


async def test_failures_nobody_foresaw_are_told_without_detail(server, caplog):
    def broken() -> None:
        raise ZeroDivisionError("secret detail")

    server.service.status = broken
    async with server.http.get(f"{server.url}/admin/status") as response:
        assert response.status == 500
        assert "secret" not in await response.text()
    assert "secret detail" in caplog.text
