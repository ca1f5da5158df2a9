"""A list that is due is taken by one native call, which finds what the reference finds, and only from that peer."""

from __future__ import annotations

import asyncio
import select
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import numpy as np
import pytest
import zmq
from edge_kernels._native import Inlet
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.transport import zeromq
from edge_runtime.transport.channel import Channel
from edge_runtime.transport.eager_loop import HAS_EPOLL, EagerLoop
from edge_runtime.transport.expected import Expected, ExpectedPiece
from edge_runtime.transport.zmq_socket import _message_calls
from edge_runtime.trust.admission import Admission
from edge_runtime.trust.identity import KeyPair

pytestmark = pytest.mark.skipif(not HAS_EPOLL, reason="native waiting is for Linux")

SERVER, PEER, OTHER = KeyPair.generate(), KeyPair.generate(), KeyPair.generate()
ROW = np.arange(8, dtype=np.uint8)
NOTHING, EXPECTED, ANOTHER = 0, 1, 2


def nobody(hole: bytes) -> None:
    return None


# ------------------------------------------------------------ the native call, beside its reference


class Sockets:
    """A ROUTER, its inlet, and DEALERs by name. Without CURVE: then nobody has a user."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._context = context
        self.router = context.socket(zmq.ROUTER)
        self.router.bind("inproc://expected")
        self.inlet = Inlet(list(_message_calls()), self.router.underlying)
        self._dealers: dict[bytes, zmq.Socket[bytes]] = {}

    def send(self, name: bytes, parts: list[bytes]) -> None:
        self.router.getsockopt(
            zmq.EVENTS
        )  # libzmq tells of lists that come to a socket which was read until empty
        if name not in self._dealers:
            dealer = self._dealers[name] = self._context.socket(zmq.DEALER)
            dealer.setsockopt(zmq.ROUTING_ID, name)
            dealer.connect("inproc://expected")
        self._dealers[name].send_multipart(parts)

    def wait(self) -> int:
        """As a loop's selector does; the descriptor tells of changes alone."""
        with select.epoll() as epoll:
            fd = int(self.router.getsockopt(zmq.FD))
            epoll.register(fd, select.EPOLLIN)
            for _ in range(50):
                found = self.inlet.wait(epoll.fileno(), fd, 20)
                if found != NOTHING:
                    return found
        return NOTHING

    def close(self) -> None:
        for each in (self.router, *self._dealers.values()):
            each.close(0)


@contextmanager
def sockets() -> Iterator[Sockets]:
    with zmq.Context(io_threads=1) as context:
        found = Sockets(context)
        try:
            yield found
        finally:
            found.close()


BYTES = st.binary(max_size=4)


@st.composite
def expectations(draw: st.DrawFn) -> tuple[list[ExpectedPiece], int | None]:
    """Pieces and the bytes of their row, if they have one."""
    before, after = draw(BYTES), draw(BYTES)
    holes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True))
    around = len(before) + len(after)
    row_bytes = draw(st.none() | st.integers(1, 6))
    return [ExpectedPiece(around + hole, before, after) for hole in holes], row_bytes


@settings(max_examples=60, deadline=None)
@given(expectations(), st.data())
def test_native_code_finds_what_the_reference_finds(
    expectation: tuple[list[ExpectedPiece], int | None], data: st.DataObject
) -> None:
    pieces, row_bytes = expectation
    native, reference = (np.zeros(row_bytes, np.uint8) if row_bytes else None for _ in range(2))
    with sockets() as world:
        world.inlet.expect(b"peer", "", list(pieces), native)
        for _ in range(3):
            row_at, before, after = data.draw(st.sampled_from(pieces))
            hole = data.draw(st.binary(min_size=row_at - len(before) - len(after), max_size=5))
            row = data.draw(st.binary(min_size=row_bytes or 0, max_size=row_bytes or 0))
            piece = data.draw(st.just(before + hole + after + row) | st.binary(max_size=12))
            name = data.draw(st.sampled_from([b"peer", b"peer", b"else"]))
            more = data.draw(st.sampled_from([[], [], [b"two parts"]]))
            world.send(name, [piece, *more])
            is_of_peer = name == b"peer" and not more
            wanted = Expected(pieces, reference, nobody).hole_in(piece) if is_of_peer else None
            assert world.wait() == (ANOTHER if wanted is None else EXPECTED)
            if wanted is not None:
                assert world.inlet.hole() == wanted
            sender, user, _fd, parts = world.inlet.taken()
            assert (sender, user, parts) == (name, "", [piece, *more])
            if native is not None and reference is not None:
                assert native.tobytes() == reference.tobytes()


def test_pieces_that_can_not_be_are_refused() -> None:
    with sockets() as world:
        with pytest.raises(ValueError, match="overlap"):
            world.inlet.expect(b"peer", "", [(3, b"ab", b"cd")], None)
        with pytest.raises(ValueError, match="nothing was taken"):
            world.inlet.taken()
        with pytest.raises(ValueError, match="eight addresses"):
            Inlet([1, 2], world.router.underlying)


def test_nothing_is_taken_from_another_user() -> None:
    with sockets() as world:
        world.inlet.expect(b"peer", "somebody", [(1, b"", b"")], None)
        world.send(b"peer", [b"!"])
        assert world.wait() == ANOTHER


# ------------------------------------------------------------ over links


class Receiver:
    """The listener's end of two links. `seen`: holes that were looked at; `order`: that, and what was delivered."""

    def __init__(self, mine: Channel) -> None:
        self.channel = mine
        self.place = np.zeros(len(ROW), np.uint8)
        self.order: list[tuple[str, bytes]] = []
        self._noted = asyncio.Event()
        mine.on_list(lambda frames: self.note("delivered", b"|".join(map(bytes, frames))))

    def note(self, what: str, said: bytes) -> None:
        self.order.append((what, said))
        self._noted.set()

    def expect(self) -> None:
        """b"id:" and one byte, then a row."""
        head = self.channel.whole_head((4, len(ROW)))
        assert head is not None

        def look(hole: bytes) -> Callable[[], None]:
            self.note("looked", hole + self.place.tobytes())
            return lambda: self.note("settled", b"")

        self.channel.expect(Expected([ExpectedPiece(len(head) + 4, head + b"id:", b"")], self.place, look))

    async def until(self, count: int) -> list[tuple[str, bytes]]:
        async with asyncio.timeout(10):
            while len(self.order) < count:
                self._noted.clear()
                await self._noted.wait()
        found, self.order = self.order, []
        return found


@asynccontextmanager
async def links() -> AsyncIterator[tuple[Receiver, Channel, Receiver, Channel, Admission]]:
    """Two peers and what the listener has of each."""
    admission = Admission([PEER.public, OTHER.public])
    listener = await zeromq.listen("tcp://127.0.0.1:0", SERVER, admission)
    try:
        peer = await zeromq.connect(listener.address, PEER, SERVER.public)
        of_peer = Receiver(await listener.accept())  # type: ignore[arg-type]
        other = await zeromq.connect(listener.address, OTHER, SERVER.public)
        of_other = Receiver(await listener.accept())  # type: ignore[arg-type]
        try:
            yield of_peer, peer, of_other, other, admission
        finally:
            await peer.close()
            await other.close()
    finally:
        await listener.close()


def on_eager_loop(work: Callable[[], object]) -> None:
    with asyncio.Runner(loop_factory=EagerLoop) as runner:
        runner.run(work())  # type: ignore[arg-type]


DELIVERED = ("delivered", b"id:7|" + ROW.tobytes())
AT_ONCE = [("looked", b"7" + ROW.tobytes()), DELIVERED, ("settled", b"")]


def test_a_list_that_is_due_is_looked_at_before_it_is_delivered_and_any_other_is_delivered() -> None:
    async def work() -> None:
        async with links() as (of_peer, peer, of_other, other, _admission):
            of_peer.expect()
            looked = 0
            for _ in range(200):
                await asyncio.sleep(0.005)  # a loop that has other things to do delivers it as ever
                await peer.send([b"id:7", ROW.tobytes()])
                found = await of_peer.until(1)
                assert found in (AT_ONCE, [DELIVERED])
                looked += found == AT_ONCE
                if looked == 3:
                    break
            assert looked == 3
            await peer.send([b"no:7", ROW.tobytes()])
            assert await of_peer.until(1) == [("delivered", b"no:7|" + ROW.tobytes())]
            await peer.send([b"x" * 200_000, b"y"])  # in several parts
            assert await of_peer.until(1) == [("delivered", b"x" * 200_000 + b"|y")]
            await other.send([b"id:7", ROW.tobytes()])  # another peer's
            assert await of_other.until(1) == [DELIVERED]
            assert of_peer.order == []
            for number in range(200):  # several at once: none is lost, none comes twice, and all are in order
                await peer.send([b"n", str(number).encode()])
            numbers = [said for _what, said in await of_peer.until(200)]
            assert numbers == [b"n|%d" % number for number in range(200)]

    on_eager_loop(work)


def test_a_peer_that_was_revoked_or_has_gone_is_not_looked_at() -> None:
    async def work() -> None:
        async with links() as (of_peer, _peer, of_other, other, admission):
            of_peer.expect()
            admission.revoke(PEER.public)
            with_peer = of_peer.channel
            assert with_peer.closed
            of_other.expect()
            await other.send([b"id:7", ROW.tobytes()])
            assert (await of_other.until(1))[-1] is not None
            assert of_peer.order == []
            await other.close()
            await asyncio.sleep(0.1)
            assert of_other.channel.closed
            of_other.expect()  # of a link that is over: nothing happens

    on_eager_loop(work)


def test_on_an_ordinary_loop_lists_are_delivered_and_nothing_is_looked_at() -> None:
    async def work() -> None:
        async with links() as (of_peer, peer, _of_other, _other, _admission):
            of_peer.expect()
            await peer.send([b"id:7", ROW.tobytes()])
            assert await of_peer.until(1) == [DELIVERED]

    asyncio.run(work())


def test_timers_and_calls_of_other_threads_have_their_turn_while_a_list_is_due() -> None:
    async def work() -> None:
        async with links() as (of_peer, _peer, _of_other, _other, _admission):
            of_peer.expect()
            loop = asyncio.get_running_loop()
            began = loop.time()
            await asyncio.sleep(0.02)
            assert loop.time() - began >= 0.02
            assert await asyncio.to_thread(lambda: "from a thread") == "from a thread"

    on_eager_loop(work)
