"""A real DataPlane with a plan, a toy engine and a clock, between links that only note what was sent.

Knows: how a data plane is driven by hand, event by event. Does not know: sockets, threads, what is tested.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edge_runtime.agent.data_plane import DataPlane
from edge_runtime.agent.peer_outbox import PeerOutbox
from edge_runtime.agent.row_queue import RowQueue
from edge_runtime.agent.stage_steps import LoadedStage
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import Batch, Rows
from edge_runtime.engine.wire import FP32
from edge_runtime.protocol import codec
from edge_runtime.protocol.messages import LoadStage, Message
from edge_runtime.transport.base import Frame, Peer
from edge_runtime.transport.channel import DATA, Channel
from edge_runtime.transport.expected import Expected
from edge_runtime.transport.zeromq import delivery
from edge_runtime.trust.identity import KeyPair
from tests.support.bare_stage import LEASE, loaded, order

HIDDEN = 2
VOCAB = 50  # as `bare_stage.loaded` says
STEP_SECONDS = 1.0


class Links:
    """Stands for the mesh: every peer is reached, and what it gets is noted."""

    def __init__(self) -> None:
        self.sent: dict[str, list[list[bytes]]] = {}
        self.channels: dict[str, Channel] = {}
        self.wires: list[Noted] = []
        self.incoming: dict[str, tuple[Channel, Noted]] = {}

    def ready(self, device_id: str) -> Channel | None:
        channel = self.channels.get(device_id)
        if channel is None or channel.closed:
            noted = Noted(self.sent.setdefault(device_id, []))
            self.wires.append(noted)
            channel = self.channels[device_id] = Channel(Peer(device_id, b""), noted)
        return channel

    def heard_on(self, device_id: str) -> Channel | None:
        found = self.incoming.get(device_id)
        return None if found is None else found[0]

    @property
    def pieces(self) -> int:
        """Lists that were sent as one piece."""
        return sum(wire.pieces for wire in self.wires)

    def try_send(self, device_id: str, message: Message, payloads: Sequence[Frame] = ()) -> bool:
        channel = self.ready(device_id)
        assert channel is not None
        return channel.try_send(codec.encode(message, payloads))


class Noted:
    """A wire whose other end is a list."""

    def __init__(self, sent: list[list[bytes]]) -> None:
        self._sent = sent
        self.pieces = 0  # lists that came as one
        self.expected: Expected | None = None

    def write(self, parts: Sequence[Frame]) -> None:
        self._sent.append([bytes(part) for part in parts])

    def head(self, sizes_bytes: Sequence[int]) -> bytes | None:
        return delivery.head(sizes_bytes)

    def expect(self, expected: Expected) -> None:
        self.expected = expected

    def write_whole(self, piece: bytes) -> None:
        self.write([DATA, *delivery.unpacked(memoryview(piece))])
        self.pieces += 1

    def cut(self) -> None:
        return

    async def finish(self) -> None:
        return


class ToyStage:
    """Rows and logits depend on every id and row before them; a step takes STEP_SECONDS of the plane's clock."""

    layers = LayerRange(0, 0)
    numeric_class = "toy"
    weight_bytes = 1
    kv_capacity_tokens = 10_000
    kv_used_tokens = 0
    spare_pages = 0

    def __init__(self, plane: PacedPlane, *, is_tail: bool) -> None:
        self._plane = plane
        self._is_tail = is_tail
        self.held: dict[SessionId, list[int]] = {}
        self.batches: list[list[tuple[int, int, tuple[int, ...], int]]] = []

    def open(self, session: SessionId, max_rows: int, page_names: Sequence[bytes] = ()) -> Sequence[int]:
        self.held[session] = []
        return ()

    def run(self, batch: Batch) -> Rows:
        self._plane.now += STEP_SECONDS
        self.batches.append([(s.session, s.base_row, s.ids, s.logit_rows) for s in batch.spans])
        rows: list[Rows] = []
        at = 0
        for span in batch.spans:
            held = self.held[span.session]
            del held[span.base_row :]
            for index, token in enumerate(span.ids):
                value = token if batch.hidden is None else token + int(batch.hidden[at, 0])
                at += 1
                held.append(value)
                total = sum((place + 3) * each for place, each in enumerate(held)) % 997
                if self._is_tail and index >= len(span.ids) - span.logit_rows:
                    rows.append(np.eye(VOCAB, dtype=np.float32)[total % VOCAB])
                elif not self._is_tail:
                    rows.append(np.array([total, total + 1], np.float32))
        return np.array(rows, np.float32).reshape(-1, VOCAB if self._is_tail else HIDDEN)

    def drop(self, session: SessionId, from_row: int = 0) -> None:
        self.held.pop(session, None)

    def keep(self, *what: object) -> None:
        return

    def give_back(self, *, all_pages: bool = False) -> None:
        return

    def close(self) -> None:
        return


class Control:
    """What the coordinator is told, and what may not happen."""

    def __init__(self) -> None:
        self.told: list[Message] = []

    def post(self, message: Message, payloads: Sequence[Frame]) -> None:
        self.told.append(message)

    def start_loading(self, order: LoadStage) -> None:
        return

    def stop_loading(self) -> None:
        return

    async def relay(self, message: Message, payloads: Sequence[Frame]) -> None:
        raise AssertionError("nothing is relayed here")

    def broke(self, problem: Exception) -> None:
        raise problem


class PacedPlane:
    """Stage `stage` of `stages`. `fast` False: no row is ever foreseen.

    `takes_first`: lists that are expected are looked at before they are delivered.
    """

    def __init__(self, stage: int, stages: int, *, fast: bool, takes_first: bool = False) -> None:
        self.now = 100.0
        self.takes_first = takes_first
        self.links, self.control = Links(), Control()
        self.plane: Any = DataPlane(self.control, KeyPair.generate(), "own", b"", "")  # Any: driven by hand
        self.worker = self.plane.worker
        self.worker._clock = self.worker.stage._clock = lambda: self.now
        self.plane.fast._sleep = lambda seconds: None
        self.plane._mesh = self.links
        self.plane._peers = PeerOutbox(None, self.links.try_send, None, None)  # type: ignore[arg-type]
        if not fast:
            self.plane.fast.prepare = lambda: None
        self.plane.received(order(stage, stages, chunk=4))
        self.turn()
        self.stage = ToyStage(self, is_tail=stage == stages - 1)
        tail = stage == stages - 1
        queue = RowQueue(8)
        kinds = {"is_tail": tail, "vocab_size": VOCAB, "queue": queue, "is_first": stage == 0}
        self.worker.put(lambda: self.worker.install(LoadedStage(LEASE, self.stage, **kinds)))  # type: ignore[arg-type]
        self.plane.loaded(loaded(), HIDDEN, FP32)
        self.turn()
        self.at_once = 0  # rows that were taken before they were delivered

    @property
    def state(self) -> Any:
        return self.plane._state

    def turn(self) -> None:
        """Turns until nothing is left to do. Whoever waits for company, waits."""
        while self.worker._turn_asked or self.worker._later is not None:
            if not self.worker._turn_asked:
                self.now += 1.0
            self.worker._later = None
            self.worker._turn()

    def arrives(self, source: str, message: Message, payloads: Sequence[bytes] = ()) -> None:
        """Over a link from a peer."""
        if source not in self.links.incoming:
            noted = Noted([])
            channel = Channel(Peer(source, b""), noted)
            self.links.incoming[source] = channel, noted
            channel.on_list(
                functools.partial(self._taken, source), functools.partial(self.plane._look, source)
            )
        channel, noted = self.links.incoming[source]
        frames = [bytes(frame) for frame in codec.encode(message, payloads)]
        then = self._looked_at(noted.expected, frames) if self.takes_first else None
        channel.deliver(DATA, [memoryview(frame) for frame in frames])
        if then is not None:
            then()

    def _looked_at(self, expected: Expected | None, frames: Sequence[bytes]) -> Callable[[], None] | None:
        """As the socket does where the event loop lets it."""
        hole = None
        if expected is not None:
            hole = expected.hole_in(
                (delivery.head([len(frame) for frame in frames]) or b"") + b"".join(frames)
            )
        then = expected.look(hole) if expected is not None and hole is not None else None
        self.at_once += then is not None
        return then

    def _taken(self, source: str, frames: list[memoryview]) -> None:
        self.plane._arrived(source, *codec.decode(frames))

    def close(self) -> None:
        self.worker.stop()


def all_of(thing: object) -> object:
    """What an object holds, down to plain values, so that two of them can be compared."""
    if isinstance(thing, dict):
        return {key: all_of(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple | set | frozenset):
        return type(thing)(*map(all_of, thing)) if hasattr(thing, "_fields") else [*map(all_of, thing)]
    names = list(getattr(thing, "__dict__", ())) or list(getattr(type(thing), "__slots__", ()))
    if type(thing).__module__.startswith("edge_runtime") and names:
        return {name: all_of(getattr(thing, name)) for name in names}
    return thing
