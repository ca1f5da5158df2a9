"""`kill -9` of the coordinator in mid-stream: what was accepted is finished, nothing shown is taken back."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from edge_runtime import Client
from tests.support.processes import site, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

OPTIONS = {"temperature": 0.8, "seed": 3, "max_tokens": 600, "ignore_eos": True}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_stream_survives_the_coordinator(demo_bundle: Path, tmp_path: Path) -> None:
    port = str(free_port())
    arguments = ("--http-port", port, "--split", "even", "--devices", "a,b")
    with site(tmp_path, demo_bundle) as place:
        coordinator = place.coordinator(*arguments, links=2)
        for name, link in zip("ab", place.ready["join_links"], strict=True):
            place.agent(name, link=link)
        with Client(place.ready["url"], api_key=place.ready["api_key"]) as client:
            wait_for(lambda: (client.status()["plan"] or {}).get("ready"))
            undisturbed = client.generate("def f(", **OPTIONS).token_ids
            ids: list[int] = []
            with client.stream("def f(", **OPTIONS) as stream:
                for token in stream:
                    ids.append(token.id)
                    if len(ids) == 60:
                        coordinator.kill()
                        coordinator = place.coordinator(*arguments, links=0)
                resumed = stream.resumed
        assert tuple(ids) == tuple(undisturbed)
        assert resumed >= 1
        assert coordinator.stop() == 0
