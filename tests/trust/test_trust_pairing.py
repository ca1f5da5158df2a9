"""Pairing over real CURVE links: an invited device gets in once, everybody else hears why not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.core import DeviceId
from edge_runtime.errors import TransportError, TrustError
from edge_runtime.protocol import codec
from edge_runtime.protocol.messages import PROTOCOL_VERSION, EnrollRequest, Hello, Message, Refused
from edge_runtime.transport import zeromq
from edge_runtime.trust.identity import KeyPair, SigningKey
from edge_runtime.trust.pairing import (
    AttemptLimiter,
    EnrollmentServer,
    JoinLink,
    enroll,
    listen_for_devices,
    new_token,
    token_hash,
)

SIGNING = SigningKey.generate()


@dataclass
class Invitations:
    """A registry of ten lines: which token hashes are still good, and who was registered."""

    tokens: dict[str, str] = field(default_factory=dict)
    devices: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    broken: bool = False

    def invite(self, state: str = "ok") -> str:
        token = new_token()
        self.tokens[token_hash(token)] = state
        return token

    async def spend(self, hashed: str) -> str:
        state = self.tokens.get(hashed, "unknown")
        if state == "ok":
            self.tokens[hashed] = "used"
        return state

    async def register(self, device_id: DeviceId, name: str, public_key: bytes) -> None:
        if self.broken:
            raise OSError("no space left on device")
        self.devices[device_id] = (name, public_key)


@dataclass
class Coordinator:
    key: KeyPair
    invitations: Invitations
    link: JoinLink


@pytest.fixture
async def coordinator() -> AsyncIterator[Coordinator]:
    key, invitations = KeyPair.generate(), Invitations()
    listener = await listen_for_devices("tcp://127.0.0.1:0", key)
    server = EnrollmentServer(
        listener,
        invitations.spend,
        invitations.register,
        coordinator_address="tcp://127.0.0.1:7000",
        signing_public_key=SIGNING.public,
        attempts_per_address=20,
    )
    port = int(listener.address.rpartition(":")[2])
    async with asyncio.TaskGroup() as group:
        group.create_task(server.serve())
        yield Coordinator(key, invitations, JoinLink("127.0.0.1", 7000, port, key.public, new_token()))
        await listener.close()


async def test_an_invited_device_is_registered_by_the_key_it_proved(coordinator: Coordinator) -> None:
    key = KeyPair.generate()
    pairing = await enroll(replace(coordinator.link, token=coordinator.invitations.invite()), key, "phone")
    assert pairing.device_id == key.device_id
    assert pairing.coordinator_address == "tcp://127.0.0.1:7000"
    assert pairing.server_key == coordinator.key.public
    assert pairing.signing_key == SIGNING.public
    assert coordinator.invitations.devices == {key.device_id: ("phone", key.public)}


async def test_a_used_token_is_refused_with_a_reason(coordinator: Coordinator) -> None:
    link = replace(coordinator.link, token=coordinator.invitations.invite())
    await enroll(link, KeyPair.generate(), "phone")
    with pytest.raises(TrustError, match="used already") as caught:
        await enroll(link, KeyPair.generate(), "thief")
    assert caught.value.code == "token_used"
    assert "fresh join link" in caught.value.hint
    assert len(coordinator.invitations.devices) == 1


@pytest.mark.parametrize(("state", "code"), [("expired", "token_expired"), ("withdrawn", "token_withdrawn")])
async def test_other_tokens_are_refused(coordinator: Coordinator, state: str, code: str) -> None:
    with pytest.raises(TrustError) as caught:
        await enroll(
            replace(coordinator.link, token=coordinator.invitations.invite(state)),
            KeyPair.generate(),
            "phone",
        )
    assert caught.value.code == code


async def test_an_unknown_token_is_refused_and_guessing_is_limited(
    coordinator: Coordinator, caplog: pytest.LogCaptureFixture
) -> None:
    codes = []
    for _ in range(25):
        with pytest.raises(TrustError) as caught:
            await enroll(replace(coordinator.link, token=new_token()), KeyPair.generate(), "phone")
        codes.append(caught.value.code)
    assert codes == ["token_unknown"] * 20 + ["too_many_attempts"] * 5
    assert "refused to pair device" in caplog.text


async def test_one_token_can_be_tried_a_few_times_only(coordinator: Coordinator) -> None:
    link = replace(coordinator.link, token=new_token())
    codes = []
    for _ in range(7):
        with pytest.raises(TrustError) as caught:
            await enroll(link, KeyPair.generate(), "phone")
        codes.append(caught.value.code)
    assert codes == ["token_unknown"] * 5 + ["too_many_attempts"] * 2


async def test_a_wrong_fingerprint_is_refused_before_the_token_is_said(coordinator: Coordinator) -> None:
    link = replace(
        coordinator.link, server_key=KeyPair.generate().public, token=coordinator.invitations.invite()
    )
    with pytest.raises(TrustError, match="not the peer this key belongs to") as caught:
        await enroll(link, KeyPair.generate(), "phone")
    assert "join link" in caught.value.hint
    assert "ok" in coordinator.invitations.tokens.values()


async def test_a_port_that_never_answers_is_a_timeout_with_the_likely_causes() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TransportError, match="did not finish the handshake") as caught:
            await zeromq.connect(address, KeyPair.generate(), KeyPair.generate().public, timeout_seconds=0.3)
    assert "firewall" in caught.value.hint


async def test_nobody_there_is_said_at_once(coordinator: Coordinator) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(TransportError, match="nobody listens"):
            await enroll(
                replace(coordinator.link, enroll_port=unused.getsockname()[1]), KeyPair.generate(), "phone"
            )


@pytest.mark.parametrize("name", ["", "x" * 65, "two\nlines", "\x1b[31m"])
async def test_a_name_that_could_hurt_a_terminal_is_refused_and_costs_no_token(
    coordinator: Coordinator, name: str
) -> None:
    with pytest.raises(TrustError) as caught:
        await enroll(
            replace(coordinator.link, token=coordinator.invitations.invite()), KeyPair.generate(), name
        )
    assert caught.value.code == "bad_device_name"
    assert list(coordinator.invitations.tokens.values()) == ["ok"]


async def test_a_registry_that_fails_refuses_and_the_next_device_is_served(coordinator: Coordinator) -> None:
    coordinator.invitations.broken = True
    with pytest.raises(TrustError) as caught:
        await enroll(
            replace(coordinator.link, token=coordinator.invitations.invite()), KeyPair.generate(), "phone"
        )
    assert caught.value.code == "enrollment_failed"
    coordinator.invitations.broken = False
    await enroll(
        replace(coordinator.link, token=coordinator.invitations.invite()), KeyPair.generate(), "phone"
    )


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"\x93\x01\x01"],
        [bytes(60_000)],
        codec.encode(Hello(PROTOCOL_VERSION, "1", "phone", "b", "", 1, 1, 0)),
        [codec.encode_message(EnrollRequest("t", "n")), b"payload"],
    ],
)
async def test_anything_else_on_the_enrolment_port_is_refused(
    coordinator: Coordinator, frames: list[bytes]
) -> None:
    connection = await zeromq.connect(
        coordinator.link.enroll_address, KeyPair.generate(), coordinator.key.public
    )
    await connection.send(frames)
    answer: Message = codec.decode(await connection.receive())[0]
    assert isinstance(answer, Refused)
    await connection.close()
    assert coordinator.invitations.devices == {}


LINKS = st.builds(
    JoinLink,
    st.sampled_from(["localhost", "10.0.0.7", "box.example", "::1", "fe80::1"]),
    st.integers(1, 65535),
    st.integers(1, 65535),
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=16, max_size=16).map(lambda bits: urlsafe_b64encode(bits).decode().rstrip("=")),
)


@settings(deadline=None)
@given(LINKS)
def test_join_links_survive_being_printed(link: JoinLink) -> None:
    assert JoinLink.parse(f"  {link}\n") == link
    assert link.token not in repr(link)


@settings(deadline=None)
@given(LINKS, st.data())
def test_a_changed_join_link_is_refused_or_still_a_link(link: JoinLink, data: st.DataObject) -> None:
    text = str(link)
    cut = data.draw(st.integers(0, len(text)))
    for changed in (text[:cut], text[:cut] + data.draw(st.text(max_size=3)) + text[cut + 1 :]):
        with contextlib.suppress(TrustError):
            assert JoinLink.parse(changed).token


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 200)), max_size=40))
def test_the_limiter_allows_so_many_in_a_window(attempts: list[tuple[str, float]]) -> None:
    limiter = AttemptLimiter(3, 60.0, max_keys=3)
    allowed: dict[str, list[float]] = {}
    for key, now in sorted(attempts, key=lambda attempt: attempt[1]):
        if limiter.allow(key, now):
            allowed.setdefault(key, []).append(now)
    for times in allowed.values():
        assert all(later - first >= 60.0 for first, later in zip(times, times[6:], strict=False))
