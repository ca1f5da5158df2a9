"""ZeroMQ under attack: stolen routing ids, peers that cheat, garbage on the port, and a peer that is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
import zmq

from benchmarks.shaping_proxy import Shape, ShapingProxy
from edge_runtime.errors import ConnectionClosed, TransportError
from edge_runtime.transport import link_meter, zeromq
from edge_runtime.transport.channel import CLOSE, CREDIT, DATA, OPEN, WINDOW_LISTS, WIRE_VERSION
from edge_runtime.transport.zeromq.delivery import IN_ONE, packed
from edge_runtime.trust.admission import Admission, AnyKey, zmq_runtime
from edge_runtime.trust.identity import KeyPair
from edge_runtime.trust.pairing import ENROLL_LIMITS

SERVER = KeyPair.generate()
VICTIM, THIEF = KeyPair.generate(), KeyPair.generate()


@pytest.fixture
async def listener() -> AsyncIterator[zeromq.ZeromqListener]:
    listener = await zeromq.listen("tcp://127.0.0.1:0", SERVER, Admission([VICTIM.public, THIEF.public]))
    async with asyncio.timeout(20):
        yield listener
    await listener.close()


@contextmanager
def raw_dealer(
    listener: zeromq.ZeromqListener, key: KeyPair, routing_id: bytes, address: str = ""
) -> Iterator[zmq.Socket[bytes]]:
    """A paired device that says what it likes."""
    context, _handler = zmq_runtime()
    with context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.ROUTING_ID, routing_id)
        dealer.setsockopt(zmq.RECONNECT_IVL, -1)
        dealer.setsockopt(zmq.CURVE_SERVERKEY, SERVER.public)
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, key.public)
        dealer.setsockopt(zmq.CURVE_SECRETKEY, key.secret)
        dealer.connect(address or listener.address)
        yield dealer


def in_one(frame: bytes) -> bytes:
    (part,) = packed([DATA, frame])
    return bytes(part)


async def answer(dealer: zmq.Socket[bytes], seconds: float = 2.0) -> list[bytes] | None:
    if not await asyncio.to_thread(dealer.poll, int(seconds * 1000)):
        return None
    return dealer.recv_multipart()


async def still_serves(listener: zeromq.ZeromqListener) -> None:
    near = await zeromq.connect(listener.address, VICTIM, SERVER.public)
    far = await listener.accept()
    await near.send([b"ping"])
    assert bytes((await far.receive())[0]) == b"ping"
    await near.close()


async def test_a_stolen_routing_id_gets_nothing(listener: zeromq.ZeromqListener) -> None:
    with raw_dealer(listener, VICTIM, b"the-same-id") as victim:
        victim.send_multipart([OPEN, WIRE_VERSION])
        assert await answer(victim) == [OPEN, WIRE_VERSION]
        far = await listener.accept()
        with raw_dealer(listener, THIEF, b"the-same-id") as thief:
            thief.send_multipart([OPEN, WIRE_VERSION])
            thief.send_multipart([in_one(b"I am the victim")])
            assert await answer(thief, 0.3) is None
            for number in range(100):
                await far.send([b"secret %d" % number])
            for number in range(100):
                assert await answer(victim) == [in_one(b"secret %d" % number)]
            assert await answer(thief, 0.1) is None
            victim.send_multipart([in_one(b"it is me")])
            assert bytes((await far.receive())[0]) == b"it is me"


async def test_a_list_under_anothers_routing_id_is_dropped(
    listener: zeromq.ZeromqListener, caplog: pytest.LogCaptureFixture
) -> None:
    """Should libzmq ever hand one over: the key is looked at for each list."""
    with raw_dealer(listener, VICTIM, b"id") as victim:
        victim.send_multipart([OPEN, WIRE_VERSION])
        await answer(victim)
        far = await listener.accept()
        listener._wires[b"id"].user_id = THIEF.public.hex()
        victim.send_multipart([in_one(b"x")])
        await still_serves(listener)
        assert "routing id of another device" in caplog.text
        assert not far._inbox


@pytest.mark.parametrize(
    "lists",
    [
        [[b"?", b"x"]],
        [[DATA]],
        [[DATA, *[b""] * 17]],
        [[IN_ONE]],
        [[IN_ONE + b"\x00"]],
        [[IN_ONE + b"\x11" + bytes(68)]],
        [[in_one(b"x")[:-1]]],
        [[in_one(b"x") + b"y"]],
        [[in_one(b"x"), b"y"]],
        [[CREDIT, (1 << 40).to_bytes(8, "big") + bytes(4)]],
        [[CREDIT, b"short"]],
        [[CLOSE, b"with a body"]],
        [[OPEN, WIRE_VERSION]],
        [[b"", b""]],
        [[in_one(b"x")]] * (WINDOW_LISTS + 1),
    ],
    ids=[
        "unknown kind",
        "empty list",
        "too many",
        "in one: nothing",
        "in one: no frames",
        "in one: too many",
        "in one: too short",
        "in one: too long",
        "in one and a part",
        "false credit",
        "short credit",
        "odd close",
        "twice open",
        "empty",
        "window",
    ],
)
async def test_a_paired_device_that_breaks_the_rules_is_cut(
    listener: zeromq.ZeromqListener, lists: list[list[bytes]]
) -> None:
    with raw_dealer(listener, THIEF, b"id") as thief:
        thief.send_multipart([OPEN, WIRE_VERSION])
        await answer(thief)
        far = await listener.accept()
        for parts in lists:
            thief.send_multipart(parts)
        for _ in range(200):  # nothing is read meanwhile, so that the window fills
            await asyncio.sleep(0 if far.closed else 0.01)
        with pytest.raises(ConnectionClosed):
            await far.receive()
        await still_serves(listener)


@pytest.mark.parametrize(
    ("first", "answered"),
    [
        ([in_one(b"x")], None),
        ([OPEN], None),
        ([OPEN, b"\x63"], [OPEN, WIRE_VERSION]),  # another version is told this one
        ([b""], None),
        ([CLOSE], None),
        ([CREDIT, bytes(12)], None),
    ],
)
async def test_a_link_that_is_not_opened_is_not_accepted(
    listener: zeromq.ZeromqListener, first: list[bytes], answered: list[bytes] | None
) -> None:
    with raw_dealer(listener, THIEF, b"id") as thief:
        thief.send_multipart(first)
        assert await answer(thief, 0.1 if answered is None else 5) == answered
        assert listener._accepted.empty()
        await still_serves(listener)


async def test_a_frame_over_the_limit_ends_the_link_and_nothing_else() -> None:
    listener = await zeromq.listen("tcp://127.0.0.1:0", SERVER, AnyKey(), limits=ENROLL_LIMITS)
    near = await zeromq.connect(listener.address, THIEF, SERVER.public)
    far = await listener.accept()
    await near.send([bytes((64 << 10) + 1)])
    with pytest.raises(ConnectionClosed):
        await far.receive()
    await still_serves(listener)
    await listener.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="only Linux counts the bytes of a link")
async def test_a_list_that_never_ends_ends_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """libzmq keeps the frames of an unfinished list, and no setting of it limits how many."""
    monkeypatch.setattr(link_meter, "MAX_HELD_BYTES", 8 << 20)
    monkeypatch.setattr(link_meter, "CHECK_SECONDS", 0.02)
    listener = await zeromq.listen("tcp://127.0.0.1:0", SERVER, Admission([VICTIM.public, THIEF.public]))
    near = await zeromq.connect(listener.address, VICTIM, SERVER.public)
    honest = await listener.accept()
    port = int(listener.address.rpartition(":")[2])
    slow = ShapingProxy("127.0.0.1", port, Shape(bytes_per_second=30e6))
    # The link goes before the dealer does: libzmq ends the process where both go within a message (`clean_pipes`).
    with raw_dealer(listener, THIEF, b"id", slow.address) as thief, slow:
        thief.send_multipart([OPEN, WIRE_VERSION])
        await answer(thief)
        far = await listener.accept()
        thief.send_multipart([DATA, *[bytes(1 << 20)] * 15])  # so slowly that its end is not in sight
        async with asyncio.timeout(5):
            with pytest.raises(ConnectionClosed, match="never ends"):
                await far.receive()
    for _ in range(20):  # more than may be held, and all of it handed over
        await near.send([bytes(1 << 20)])
        await honest.receive()
    for _ in range(10):
        await asyncio.sleep(0.01)  # the meter looks
    await near.send([b"still here"])
    assert bytes((await honest.receive())[0]) == b"still here"
    await near.close()
    await listener.close()


async def test_one_key_can_only_have_so_many_links(listener: zeromq.ZeromqListener) -> None:
    open_links = [await zeromq.connect(listener.address, THIEF, SERVER.public) for _ in range(8)]
    with pytest.raises(TransportError):
        await zeromq.connect(listener.address, THIEF, SERVER.public)
    for link in open_links:
        await link.close()
        await listener.accept()
    await still_serves(listener)


CURVE_GREETING = b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00CURVE" + bytes(47)
GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "zeros": bytes(5000),
    "old greeting": b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x01\x05" + bytes(200),
    "half a greeting": b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03",
    "null": b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL"
    + bytes(48)
    + b"\x04\x19\x05READY"
    + bytes(18),
    "curve, then nonsense": CURVE_GREETING + bytes(500),
    "huge frame": CURVE_GREETING + b"\x06" + b"\x7f" * 8 + bytes(99),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
async def test_garbage_on_the_port_does_no_harm(listener: zeromq.ZeromqListener, garbage: bytes) -> None:
    host, port = listener.address.removeprefix("tcp://").split(":")
    for _ in range(5):
        _reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(garbage)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    await still_serves(listener)


async def test_silent_strangers_do_not_lock_devices_out(listener: zeromq.ZeromqListener) -> None:
    host, port = listener.address.removeprefix("tcp://").split(":")
    strangers = [socket.create_connection((host, int(port))) for _ in range(200)]
    await still_serves(listener)
    for stranger in strangers:
        stranger.close()


DIAL = """
import asyncio, sys
from edge_runtime.transport import zeromq
from edge_runtime.trust.identity import KeyPair, key_from_text

async def main():
    address, public, secret, server = sys.argv[1:]
    link = await zeromq.connect(address, KeyPair(bytes.fromhex(public), bytes.fromhex(secret)), bytes.fromhex(server))
    await link.send([b"here"])
    await link.receive()

asyncio.run(main())
"""


async def test_a_killed_peer_is_noticed_at_once(listener: zeromq.ZeromqListener) -> None:
    arguments = (listener.address, VICTIM.public.hex(), VICTIM.secret.hex(), SERVER.public.hex())
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", DIAL, *arguments)
    far = await listener.accept()
    assert bytes((await far.receive())[0]) == b"here"
    os.kill(process.pid, signal.SIGKILL)
    async with asyncio.timeout(3):
        with pytest.raises(ConnectionClosed):
            await far.receive()
    with pytest.raises(ConnectionClosed):
        await far.send([b"anybody?"])
    await process.wait()


async def test_a_listener_that_goes_away_is_noticed_by_its_links(listener: zeromq.ZeromqListener) -> None:
    near = await zeromq.connect(listener.address, VICTIM, SERVER.public)
    await listener.accept()
    listener._socket.close()  # without a word, as if the process had ended
    async with asyncio.timeout(3):
        with pytest.raises(ConnectionClosed):
            await near.receive()
    listener._wires.clear()


@pytest.mark.parametrize(
    "address", ["", "host", "tcp://:1", "tcp://h:x", "tcp://h:99999", "udp://h:1", "ipc://x"]
)
async def test_an_address_that_is_none_is_refused_in_words(address: str) -> None:
    with pytest.raises(TransportError, match="not an address"):
        await zeromq.connect(address, VICTIM, SERVER.public)
    with pytest.raises(TransportError, match="not an address"):
        await zeromq.listen(address, SERVER, Admission())


async def test_a_port_in_use_and_an_unknown_name_are_said(listener: zeromq.ZeromqListener) -> None:
    with pytest.raises(TransportError, match="in use"):
        await zeromq.listen(listener.address, SERVER, Admission())
    with pytest.raises(TransportError, match="has no address"):
        await zeromq.connect("tcp://no-such-host.invalid:1", VICTIM, SERVER.public)


async def test_names_and_ipv6_addresses_can_be_dialled() -> None:
    dialled = []
    for bind, dial in (("tcp://127.0.0.1:0", "tcp://localhost:{}"), ("tcp://[::1]:0", "tcp://[::1]:{}")):
        try:
            listener = await zeromq.listen(bind, SERVER, Admission([VICTIM.public]))
        except TransportError:
            continue  # a machine without IPv6
        link = await zeromq.connect(dial.format(listener.address.rpartition(":")[2]), VICTIM, SERVER.public)
        dialled.append(dial)
        await link.close()
        await listener.close()
    assert "tcp://localhost:{}" in dialled  # IPv6 may be missing, a name for this machine may not


async def test_a_list_in_one_piece_arrives_as_its_frames_from_both_sides(
    listener: zeromq.ZeromqListener,
) -> None:
    near = await zeromq.connect(listener.address, VICTIM, SERVER.public)
    far = await listener.accept()
    for sender, receiver in ((near, far), (far, near)):
        head = sender.whole_head((3, 0, 5))
        assert head is not None
        assert sender.send_whole(head + b"abc" + b"defgh", 8)
        assert [bytes(frame) for frame in await receiver.receive()] == [b"abc", b"", b"defgh"]
        assert sender.whole_head((1 << 20,)) is None
        assert sender.whole_head(()) is None
    await near.close()
    with pytest.raises(ConnectionClosed):
        near.send_whole(b"", 0)


async def test_pieces_stop_at_the_window_as_lists_do(listener: zeromq.ZeromqListener) -> None:
    near = await zeromq.connect(listener.address, VICTIM, SERVER.public)
    far = await listener.accept()
    head = near.whole_head((1,))
    assert head is not None
    sent = [near.send_whole(head + b"x", 1) for _ in range(WINDOW_LISTS + 1)]
    assert sent == [True] * WINDOW_LISTS + [False]
    for _ in range(WINDOW_LISTS):
        assert [bytes(frame) for frame in await far.receive()] == [b"x"]
    await far.send([b"credit came before this"])
    await near.receive()
    assert near.send_whole(head + b"x", 1)
