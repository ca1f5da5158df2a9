"""Strangers stay out: also while the handler is asked nonsense, its gate raises, or its thread has to start again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
import zmq

from edge_runtime.errors import TransportError, TrustError
from edge_runtime.transport import zeromq
from edge_runtime.trust.admission import Admission, AnyKey, ZapHandler, zmq_runtime
from edge_runtime.trust.identity import KeyPair

SERVER, FRIEND, STRANGER = KeyPair.generate(), KeyPair.generate(), KeyPair.generate()


@pytest.fixture
def handler() -> ZapHandler:
    return zmq_runtime()[1]


@pytest.fixture
async def listener() -> AsyncIterator[zeromq.ZeromqListener]:
    listener = await zeromq.listen("tcp://127.0.0.1:0", SERVER, Admission([FRIEND.public]))
    yield listener
    await listener.close()


async def knock(listener: zeromq.ZeromqListener, key: KeyPair) -> None:
    connection = await zeromq.connect(listener.address, key, SERVER.public, timeout_seconds=2)
    await connection.close()


async def test_a_friend_is_let_in_and_a_stranger_hears_no(
    listener: zeromq.ZeromqListener, handler: ZapHandler, caplog: pytest.LogCaptureFixture
) -> None:
    handler._last_logged = float("-inf")
    await knock(listener, FRIEND)
    assert not caplog.records
    with pytest.raises(TrustError) as caught:
        await knock(listener, STRANGER)
    assert caught.value.code == "not_admitted"
    assert f"refused device {STRANGER.device_id} from 127.0.0.1" in caplog.text
    with pytest.raises(TrustError):
        await knock(listener, STRANGER)
    assert len(caplog.records) == 1
    await knock(listener, FRIEND)


class BrokenGate(AnyKey):
    def is_allowed(self, public_key: bytes) -> bool:
        raise RuntimeError("broken")


async def test_a_gate_that_raises_refuses_and_others_go_on(listener: zeromq.ZeromqListener) -> None:
    broken = await zeromq.listen("tcp://127.0.0.1:0", SERVER, BrokenGate())
    with pytest.raises(TrustError):
        await knock(broken, FRIEND)
    await broken.close()
    await knock(listener, FRIEND)


async def test_an_open_listener_opens_no_other(listener: zeromq.ZeromqListener) -> None:
    open_to_all = await zeromq.listen("tcp://127.0.0.1:0", SERVER, AnyKey(), name="enroll")
    await knock(open_to_all, STRANGER)
    with pytest.raises(TrustError):
        await knock(listener, STRANGER)
    await open_to_all.close()


async def test_while_the_handler_does_not_know_the_domain_nobody_gets_in(
    listener: zeromq.ZeromqListener, handler: ZapHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler, "_gates", {})
    with pytest.raises(TrustError):
        await knock(listener, FRIEND)


async def test_the_handler_survives_its_own_errors_and_admits_nobody_meanwhile(
    listener: zeromq.ZeromqListener, handler: ZapHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(request: list[bytes]) -> list[bytes]:
        raise RuntimeError("the handler's thread dies of this")

    with monkeypatch.context() as patch:
        patch.setattr(handler, "answer", fail)
        with pytest.raises((TrustError, TransportError)):
            await zeromq.connect(listener.address, FRIEND, SERVER.public, timeout_seconds=0.5)
    await knock(listener, FRIEND)
    with pytest.raises(TrustError):
        await knock(listener, STRANGER)


@pytest.mark.parametrize("configure", [lambda s: None, lambda s: _plain(s)], ids=["no security", "plain"])
async def test_other_mechanisms_are_refused(
    listener: zeromq.ZeromqListener, configure: Callable[[zmq.Socket[bytes]], None]
) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        configure(socket)
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        socket.connect(listener.address)
        assert monitor.poll(2000)
        event = int.from_bytes(monitor.recv_multipart()[0][:2], "little")
        socket.disable_monitor()
        monitor.close(0)
    assert event == zmq.EVENT_DISCONNECTED
    await knock(listener, FRIEND)


def _plain(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.PLAIN_USERNAME, b"admin")
    socket.setsockopt(zmq.PLAIN_PASSWORD, b"admin")


KEY = FRIEND.public


@pytest.mark.parametrize(
    "request_parts",
    [
        [],
        [b"1.0"],
        [b"1.0", b"1"],
        [b"1.0", b"1", b"DOMAIN", b"a", b"i", b"NULL"],
        [b"1.0", b"1", b"DOMAIN", b"a", b"i", b"PLAIN", b"u", b"p"],
        [b"2.0", b"1", b"DOMAIN", b"a", b"i", b"CURVE", KEY],
        [b"1.0", b"1", b"", b"a", b"i", b"CURVE", KEY],
        [b"1.0", b"1", b"other", b"a", b"i", b"CURVE", KEY],
        [b"1.0", b"1", b"DOMAIN", b"a", b"i", b"CURVE", KEY[:-1]],
        [b"1.0", b"1", b"DOMAIN", b"a", b"i", b"CURVE", KEY, KEY],
        [b"1.0", b"1", b"DOMAIN", b"a", b"i", b"CURVE"],
    ],
)
def test_every_other_request_is_refused(handler: ZapHandler, request_parts: list[bytes]) -> None:
    domain = handler.register("test", Admission([KEY]))
    try:
        parts = [domain if part == b"DOMAIN" else part for part in request_parts]
        assert handler.answer(parts)[2] == b"400"
        good = [b"1.0", b"1", domain, b"a", b"i", b"CURVE", KEY]
        assert handler.answer(good) == [b"1.0", b"1", b"200", b"OK", KEY.hex().encode(), b""]
    finally:
        handler.unregister(domain)
    assert handler.answer(good)[2] == b"400"


def test_only_whole_keys_can_be_admitted() -> None:
    with pytest.raises(TrustError):
        Admission([b"short"])


def test_subscribers_hear_of_a_revocation_once() -> None:
    admission, heard = Admission([FRIEND.public]), []
    unsubscribe = admission.subscribe(heard.append)
    admission.revoke(STRANGER.public)
    admission.revoke(FRIEND.public)
    admission.revoke(FRIEND.public)
    assert heard == [FRIEND.public]
    assert not admission.is_allowed(FRIEND.public)
    unsubscribe()
    admission.allow(FRIEND.public)
    admission.revoke(FRIEND.public)
    assert heard == [FRIEND.public]
