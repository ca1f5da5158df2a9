"""What every link must do, whatever carries it: in process, ZeroMQ/CURVE, WebSocket, and through a relay."""

from __future__ import annotations

import asyncio
import itertools
from array import array
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest

from edge_runtime.errors import ConnectionClosed, TransportError, TrustError
from edge_runtime.transport.base import MAX_FRAME_BYTES, Connection, Frame, Peer
from edge_runtime.transport.channel import WINDOW_BYTES, WINDOW_LISTS, Channel
from edge_runtime.trust.identity import device_id
from tests.support.carriers import Carrier, Pair

Links = tuple[Channel, Channel]


class TestLists:
    async def test_arrive_whole_and_in_order_both_ways(self, links: Links) -> None:
        for sender, receiver in (links, links[::-1]):

            async def send_all(sender: Connection = sender) -> None:
                for number in range(1500):
                    await sender.send([b"%d" % number, b"", b"tail"])

            async with asyncio.TaskGroup() as group:
                group.create_task(send_all())
                for number in range(1500):
                    assert [bytes(frame) for frame in await receiver.receive()] == [
                        b"%d" % number,
                        b"",
                        b"tail",
                    ]

    async def test_can_be_taken_as_they_arrive(self, links: Links) -> None:
        near, far = links
        await near.send([b"early"])
        for _ in range(100):  # it arrives before anybody takes lists
            await asyncio.sleep(0.001)
        taken: list[bytes] = []
        done = asyncio.Event()

        def take(frames: list[memoryview]) -> None:
            taken.append(bytes(frames[0]))
            if frames[0] == b"last":
                done.set()

        far.on_list(take)
        for number in range(1500):
            await near.send([b"%d" % number])
        await near.send([b"last"])
        await done.wait()
        assert taken == [b"early", *(b"%d" % number for number in range(1500)), b"last"]

    async def test_can_be_sent_without_waiting_while_there_is_room(self, links: Links) -> None:
        near, far = links
        sent = 0
        while near.try_send([b"%d" % sent]):
            sent += 1
        assert 0 < sent <= 1000
        for number in range(sent):
            assert bytes((await far.receive())[0]) == b"%d" % number
        await near.send([b"on"])
        assert near.try_send([b"and on"])
        assert [bytes((await far.receive())[0]) for _ in range(2)] == [b"on", b"and on"]
        with pytest.raises(TransportError):
            near.try_send([])
        await near.close()
        with pytest.raises(ConnectionClosed):
            near.try_send([b"late"])

    async def test_large_frames_arrive_whole(self, links: Links) -> None:
        near, far = links
        body = bytes(range(256)) * (8 << 12)  # 8 MiB
        for _ in range(3):
            await near.send([b"head", body, body])
            head, first, second = await far.receive()
            assert (bytes(head), first == body, second == body) == (b"head", True, True)
        await far.send([body])
        assert (await near.receive())[0] == body

    async def test_frames_may_be_any_flat_memory(self, links: Links) -> None:
        near, far = links
        rows = array("f", [1.0, 2.0, 3.0])
        await near.send([bytearray(b"a"), memoryview(rows), memoryview(b"abc")[1:], memoryview(array("f"))])
        received = await far.receive()
        assert [bytes(frame) for frame in received] == [b"a", rows.tobytes(), b"bc", b""]
        assert all(frame.readonly and frame.format == "B" for frame in received)

    @pytest.mark.parametrize(
        "frames",
        [
            [],
            [b""] * 17,
            [bytes(MAX_FRAME_BYTES + 1)],
            [bytes(40 << 20)] * 2,
            ["text"],
            [memoryview(b"abcd")[::2]],
            [None],
        ],
        ids=["none", "too many", "too large", "too large together", "text", "with gaps", "nothing"],
    )
    async def test_what_may_not_be_sent_is_refused_here_and_harms_nothing(
        self, links: Links, frames: Sequence[Any]
    ) -> None:
        near, far = links
        with pytest.raises(TransportError):
            await near.send(frames)
        await near.send([b"next"])
        assert bytes((await far.receive())[0]) == b"next"

    async def test_concurrent_senders_keep_their_own_order(self, links: Links) -> None:
        near, far = links

        async def send_all(name: int) -> None:
            for number in range(100):
                await near.send([bytes([name, number]), bytes(name * 10_000)])

        last = dict.fromkeys(range(8), -1)
        async with asyncio.TaskGroup() as group:
            for name in last:
                group.create_task(send_all(name))
            for _ in range(800):
                head, body = await far.receive()
                assert head[1] == last[head[0]] + 1
                assert len(body) == head[0] * 10_000
                last[head[0]] = head[1]

    async def test_a_receive_that_is_given_up_loses_nothing(self, links: Links) -> None:
        near, far = links
        received: list[int] = []

        async def send_all() -> None:
            for number in range(300):
                await near.send([bytes([number % 256])])
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            group.create_task(send_all())
            while len(received) < 300:
                try:
                    async with asyncio.timeout(0.0005):
                        received.append((await far.receive())[0][0])
                except TimeoutError:
                    await asyncio.sleep(0)
        assert received == [number % 256 for number in range(300)]


async def _send_until_full(link: Connection, frames: Sequence[Frame]) -> tuple[int, asyncio.Task[None]]:
    """Lists that went out before `send` waited, and the waiting one."""
    for count in itertools.count():
        task = asyncio.ensure_future(link.send(frames))
        done, _pending = await asyncio.wait([task], timeout=0.2)
        if not done:
            return count, task
        await task
    raise AssertionError


class TestBackPressure:
    @pytest.mark.parametrize(
        ("size_bytes", "at_most"), [(0, WINDOW_LISTS), (2 << 20, WINDOW_BYTES // (2 << 20) + 1)]
    )
    async def test_a_sender_waits_for_a_reader_that_does_not_read(
        self, links: Links, size_bytes: int, at_most: int
    ) -> None:
        near, far = links
        count, waiting = await _send_until_full(near, [bytes(size_bytes)])
        assert 1 <= count <= at_most
        for _ in range(count):
            await far.receive()
        await waiting
        await far.receive()
        await near.send([b"and on"])
        assert bytes((await far.receive())[0]) == b"and on"

    async def test_a_slow_reader_stops_nobody_else(self, carrier: Carrier) -> None:
        async with AsyncExitStack() as stack:
            pair = Pair(carrier, await carrier.listen())
            _slow_near, slow_far = await pair.open(stack)
            near, far = await pair.open(stack)
            _count, waiting = await _send_until_full(slow_far, [bytes(1 << 20)])
            for number in range(500):
                await far.send([b"%d" % number])
                assert bytes((await near.receive())[0]) == b"%d" % number
            assert not waiting.done()
            waiting.cancel()
            await asyncio.wait([waiting])

    async def test_a_send_that_is_given_up_frees_its_place(self, links: Links) -> None:
        near, far = links
        count, waiting = await _send_until_full(near, [b"x"])
        waiting.cancel()
        await asyncio.wait([waiting])
        other = asyncio.ensure_future(near.send([b"y"]))
        received = [bytes((await far.receive())[0]) for _ in range(count + 1)]
        await other
        assert received == [b"x"] * count + [b"y"]

    async def test_a_close_wakes_a_waiting_sender(self, links: Links) -> None:
        near, _far = links
        _count, waiting = await _send_until_full(near, [b"x"])
        await near.close()
        with pytest.raises(ConnectionClosed):
            await waiting


class TestClosing:
    @pytest.mark.parametrize("closer", [0, 1], ids=["dialler", "acceptor"])
    async def test_wakes_both_sides(self, links: Links, closer: int) -> None:
        async def until_closed(link: Connection) -> str:
            try:
                await link.receive()
            except ConnectionClosed:
                return "closed"
            return "received"

        waiting = [asyncio.ensure_future(until_closed(link)) for link in links]
        await asyncio.sleep(0)
        await links[closer].close()
        await links[closer].close()
        assert await asyncio.gather(*waiting) == ["closed", "closed"]
        for link in links:
            with pytest.raises(ConnectionClosed):
                await link.send([b"x"])

    @pytest.mark.parametrize("closer", [0, 1], ids=["dialler", "acceptor"])
    async def test_what_was_sent_before_is_still_received(self, links: Links, closer: int) -> None:
        sender, receiver = links[closer], links[1 - closer]
        for number in range(100):
            await sender.send([b"%d" % number, bytes(10_000)])
        await sender.close()
        for number in range(100):
            assert bytes((await receiver.receive())[0]) == b"%d" % number
        with pytest.raises(ConnectionClosed):
            await receiver.receive()

    async def test_both_sides_may_close_at_once(self, carrier: Carrier) -> None:
        """Neither waits for the other to give up: the fastest of a few, since this machine may be busy."""
        clock, taken = asyncio.get_running_loop().time, []
        async with AsyncExitStack() as stack:
            pair = Pair(carrier, await carrier.listen())
            for _ in range(3):
                links = await pair.open(stack)
                started = clock()
                await links[0].send([b"x"])
                await asyncio.gather(*[link.close() for link in links])
                taken.append(clock() - started)
        assert min(taken) < 0.9

    async def test_a_closed_listener_wakes_accept_and_its_links(self, carrier: Carrier) -> None:
        async with AsyncExitStack() as stack:
            listener = await carrier.listen()
            near, _far = await Pair(carrier, listener).open(stack)
            accepting = asyncio.ensure_future(listener.accept())
            await asyncio.sleep(0)
            await listener.close()
            with pytest.raises(ConnectionClosed):
                await accepting
            if carrier.proves_keys_when_dialling:  # a relay is told by its coordinator link
                with pytest.raises(ConnectionClosed):
                    await near.receive()


class TestTrust:
    async def test_each_side_knows_the_key_the_other_proved(self, carrier: Carrier) -> None:
        listener = await carrier.listen()
        async with AsyncExitStack() as stack:
            for _ in range(3):
                key = carrier.new_key()
                near = await carrier.dial(key)
                far = await listener.accept()
                stack.push_async_callback(far.close)
                stack.push_async_callback(near.close)
                assert far.peer == Peer(device_id(key.public), key.public)
                assert near.peer == Peer(device_id(carrier.key.public), carrier.key.public)

    async def test_an_unpaired_key_is_refused_and_others_are_not(self, carrier: Carrier) -> None:
        listener = await carrier.listen()
        async with AsyncExitStack() as stack:
            if carrier.proves_keys_when_dialling:
                with pytest.raises(TrustError) as caught:
                    await carrier.dial(carrier.new_key(paired=False))
                assert "pair the device" in caught.value.hint
            else:
                await (await carrier.dial(carrier.new_key(paired=False))).send([b"let me in"])
            near, far = await Pair(carrier, listener).open(stack)
            await near.send([b"x"])
            assert bytes((await far.receive())[0]) == b"x"

    async def test_a_server_with_another_key_is_refused(self, carrier: Carrier) -> None:
        await carrier.listen()
        if carrier.proves_keys_when_dialling:
            with pytest.raises(TrustError, match="not the peer this key belongs to"):
                await carrier.dial(carrier.new_key(), carrier.make_key().public)

    async def test_a_revoked_device_is_cut_in_the_middle(self, carrier: Carrier) -> None:
        listener = await carrier.listen()
        async with AsyncExitStack() as stack:
            near, far = await Pair(carrier, listener).open(stack)
            other_near, other_far = await Pair(carrier, listener).open(stack)
            await near.send([b"before"])
            await far.receive()
            await near.send([b"on its way"])
            carrier.admission.revoke(far.peer.public_key)
            with pytest.raises(ConnectionClosed):
                await far.receive()
            with pytest.raises(ConnectionClosed):
                await far.send([b"secret"])
            if carrier.proves_keys_when_dialling:
                with pytest.raises(ConnectionClosed):
                    await near.receive()
            await other_near.send([b"others go on"])
            assert bytes((await other_far.receive())[0]) == b"others go on"

    async def test_a_disconnected_device_may_come_back(self, carrier: Carrier) -> None:
        listener = await carrier.listen()
        async with AsyncExitStack() as stack:
            key = carrier.new_key()
            for _ in range(2):
                near = await carrier.dial(key)
                far = await listener.accept()
                stack.push_async_callback(near.close)
                await near.send([b"x"])
                await far.receive()
                await listener.disconnect(far.peer.device_id)
                with pytest.raises(ConnectionClosed):
                    await far.receive()


async def test_nobody_listens_is_an_error_at_once(carrier: Carrier) -> None:
    if not carrier.proves_keys_when_dialling:
        return
    listener = await carrier.listen()
    await listener.close()
    # libzmq frees the port a moment later, and admits nobody until then.
    with pytest.raises((TransportError, TrustError)):
        await carrier.dial(carrier.new_key())
