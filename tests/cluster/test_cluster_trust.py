"""Real processes: who is refused, and that both sides say why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime import Client
from edge_runtime.trust.identity import KeyPair, key_to_text
from tests.support.processes import Site, site, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def place(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("trust"), demo_bundle) as found:
        found.coordinator("--http-port", "0")
        yield found


def refused(place: Site, name: str, link: str = "") -> str:
    """What the agent says on its way out, which must not be success."""
    process = place.agent(name, link=link)
    assert process.child.wait(60) != 0
    return process.text()


def test_a_device_without_a_pairing_is_told_how_to_get_one(place: Site) -> None:
    said = refused(place, "unpaired")
    assert "not paired" in said
    assert "hint: edge-runtime agent --join" in said


def test_a_wrong_fingerprint_is_refused_by_the_agent(place: Site) -> None:
    other = key_to_text(KeyPair.generate().public).replace("%", "%25").replace("&", "%26").replace("#", "%23")
    link = re.sub(r"key=[^&]*", lambda _: f"key={other.replace('+', '%2B')}", place.ready["join_links"][0])
    said = refused(place, "misled", link)
    assert "error:" in said
    assert "hint:" in said
    assert "key" in said


def test_a_join_link_works_once(place: Site) -> None:
    link = place.ready["join_links"][1]
    first = place.agent("first", link=link)
    wait_for(lambda: (place.directory / "first" / "pairing.json").exists())
    said = refused(place, "second", link)
    assert "used already" in said
    assert "fresh join link" in said
    wait_for(lambda: "used already" in (place.directory / "c.log").read_text())
    assert first.stop() == 0


def test_a_paired_device_that_lost_its_key_is_a_stranger(place: Site) -> None:
    link = place.ready["join_links"][2]
    process = place.agent("lost", link=link)
    wait_for(lambda: (place.directory / "lost" / "pairing.json").exists())
    assert process.stop() == 0
    (place.directory / "lost" / "device.key").unlink()
    again = place.agent("lost")
    wait_for(lambda: "does not admit" in again.text() or again.child.poll() is not None)
    assert "does not admit" in again.text()


def test_a_revoked_device_is_cut_off_and_hears_why(place: Site) -> None:
    process = place.agent("goner", link=place.ready["join_links"][3])
    with Client(place.ready["url"], api_key=place.ready["api_key"]) as client:

        def state() -> str:
            return str({d["name"]: d["state"] for d in client.status()["devices"]}.get("goner"))

        wait_for(lambda: state() in ("ready", "serving"))
        client.revoke("goner")
        assert state() == "revoked"
    wait_for(lambda: "does not admit" in process.text() or "revoked" in process.text())
    assert "goner" in (place.directory / "c.log").read_text()
