"""The experts of a stage where other devices hold some of them: rows go there, outputs come back, the sum is made here.

    router ─┬─ experts held here ── run_each ───────────────┐
            └─ the others: rows ──► peer ── run_each ──► ───┴─ outputs by (row, gate rank) ── combine ── row

Every expert's output is computed alone, with the kernel and in fp32 wherever it is, and `combine` sums in gate-rank
order: a row has the bits that it has on one device, whatever is where. Peers compute while this device does. Where one
peer holds all that a batch wants of a layer, the gates go along and it makes the sums: one output a row comes back.

Knows: who holds what, and the order among asking, computing and waiting. Does not know: links (`PeerPort`), routing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from edge_kernels.experts import combine
from numpy.typing import NDArray

from edge_runtime.errors import EngineError
from edge_runtime.experts.peer_shares import HERE, LayerOwners
from edge_runtime.experts.peer_store import PeerStore

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

PIECE_BYTES = (
    2 << 20
)  # of outputs asked for at once: bounds what is in flight, and the peer begins to answer early
PIECES_AHEAD = 3  # asked of one peer and not yet answered


class PeerPort(Protocol):
    """Devices that hold experts, as the compute thread asks them. Nothing here needs an event loop to turn."""

    def ask(
        self, device_id: str, layer: int, rows: Float32, uses: Int32, gates: Float32 | None = None
    ) -> int:
        """Send rows [n, hidden] and uses [m, 2] (row, expert); the ticket to wait with. Raises TransportError.

        With gates [m] (row after row, equally many of each) sums over the uses of each row are asked for.
        """
        ...

    def wait(self, device_id: str, ticket: int, outputs: int, hidden: int) -> Float32:
        """[outputs, hidden], of each use or each row. Raises TransportError (gone, silent), EngineError (refused)."""
        ...

    def forget(self, device_id: str) -> None:
        """Nobody waits for what was asked of it any more."""
        ...


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """`store`: filled. `owners`: of every layer with experts."""

    store: PeerStore
    owners: Mapping[int, LayerOwners]
    port: PeerPort


@dataclass(slots=True)
class PeerStatistics:
    local_uses: int = 0
    peer_uses: int = 0
    requests: int = 0


class PeerExperts:
    """Takes the place of a cache in a stage. One compute thread uses it."""

    def __init__(self, options: PeerOptions) -> None:
        self._store, self._owners, self._port = options.store, options.owners, options.port
        self.statistics = PeerStatistics()

    @property
    def arena_bytes(self) -> int:
        return self._store.held_bytes

    @property
    def total_bytes(self) -> int:
        return self._store.total_bytes

    def layer_of(self, tensor: str) -> int:
        for layer in self._store.layers.values():
            if layer.tensor == tensor:
                return layer.layer
        raise EngineError(f"no device of this plan holds {tensor}")

    def close(self) -> None:
        self._store.close()

    def run(
        self, layer: int, x: Float32, ids: Int32, gates: Float32, *, activation: str, threads: int
    ) -> Float32:
        """What `run_experts` gives, bit for bit. Raises TransportError, EngineError."""
        owners = self._owners[layer]
        owner = owners.of[ids.reshape(-1)]  # [R * top_k]
        away = np.flatnonzero(owner)
        self.statistics.local_uses += owner.size - away.size
        if not away.size:
            return self._store.run(layer, x, ids, gates, activation=activation, threads=threads)
        self.statistics.peer_uses += away.size
        if away.size == owner.size and (owner == owner[0]).all():
            return self._elsewhere(_Rows(self._port, owners.devices[owner[0] - 1], layer, x, ids, gates))
        outputs = np.empty((owner.size, x.shape[1]), np.float32)
        orders = [
            _Uses(self._port, owners.devices[number - 1], layer, x, ids, away[owner[away] == number])
            for number in sorted(set(owner[away].tolist()))
        ]
        try:
            for order in orders:
                order.ask()
            here = np.flatnonzero(owner == HERE)
            if here.size:
                rows, experts = x[here // ids.shape[1]], ids.reshape(-1)[here]
                outputs[here] = self._store.run_each(
                    layer, rows, experts, activation=activation, threads=threads
                )
            for order in orders:
                self.statistics.requests += order.collect(outputs)
        except BaseException:
            for order in orders:
                order.give_up()
            raise
        return combine(outputs, gates)

    def _elsewhere(self, order: _Rows) -> Float32:
        outputs = np.empty_like(order.x)
        try:
            order.ask()
            self.statistics.requests += order.collect(outputs)
        except BaseException:
            order.give_up()
            raise
        return outputs


class _Order(ABC):
    """What one peer is asked in one layer of one batch, in pieces. `places`: of the outputs."""

    def __init__(
        self, port: PeerPort, device_id: str, layer: int, places: NDArray[np.intp], piece_places: int
    ) -> None:
        self._port, self._device_id, self._layer = port, device_id, layer
        step = max(1, piece_places)
        self._waiting = deque(places[start : start + step] for start in range(0, len(places), step))
        self._asked: deque[tuple[int, NDArray[np.intp]]] = deque()

    @abstractmethod
    def _send(self, places: NDArray[np.intp]) -> int:
        """The ticket."""

    def ask(self) -> None:
        while self._waiting and len(self._asked) < PIECES_AHEAD:
            places = self._waiting.popleft()
            self._asked.append((self._send(places), places))

    def collect(self, outputs: Float32) -> int:
        """Answers into their places; how many there were."""
        count = 0
        while self._asked:
            ticket, places = self._asked[0]
            outputs[places] = self._port.wait(self._device_id, ticket, len(places), outputs.shape[1])
            self._asked.popleft()
            count += 1
            self.ask()
        return count

    def give_up(self) -> None:
        if self._asked:
            self._port.forget(self._device_id)


class _Uses(_Order):
    """Some of the experts of some rows; `places` in the ids, row after row."""

    def __init__(
        self, port: PeerPort, device_id: str, layer: int, x: Float32, ids: Int32, places: NDArray[np.intp]
    ) -> None:
        super().__init__(port, device_id, layer, places, PIECE_BYTES // (4 * x.shape[1]))
        self._x, self._ids, self._top_k = x, ids.reshape(-1), ids.shape[1]

    def _send(self, places: NDArray[np.intp]) -> int:
        rows, uses = rows_and_uses(self._x, self._ids, self._top_k, places)
        return self._port.ask(self._device_id, self._layer, rows, uses)


class _Rows(_Order):
    """All experts of all rows."""

    def __init__(
        self, port: PeerPort, device_id: str, layer: int, x: Float32, ids: Int32, gates: Float32
    ) -> None:
        super().__init__(
            port, device_id, layer, np.arange(len(x)), PIECE_BYTES // (4 * x.shape[1] * ids.shape[1])
        )
        self.x, self._ids, self._gates = x, ids, gates

    def _send(self, places: NDArray[np.intp]) -> int:
        rows = slice(places[0], places[-1] + 1)
        ids = self._ids[rows]
        uses = np.empty((ids.size, 2), np.int32)
        uses[:, 0] = np.arange(ids.size) // ids.shape[1]
        uses[:, 1] = ids.reshape(-1)
        return self._port.ask(self._device_id, self._layer, self.x[rows], uses, self._gates[rows])


def rows_and_uses(
    x: Float32, ids: Int32, top_k: int, places: NDArray[np.intp]
) -> tuple[Float32, NDArray[np.int32]]:
    """What is sent for some places in `ids` [R * top_k]: each row once, and which of them goes through which expert."""
    uses = np.zeros((len(places), 2), np.int32)
    uses[:, 1] = ids[places]
    if len(x) == 1:  # there is nothing to choose: every decoded token waits for this
        return x, uses
    wanted, uses[:, 0] = np.unique(places // top_k, return_inverse=True)
    return x[wanted], uses


def peers_of(owners: Mapping[int, LayerOwners]) -> Sequence[str]:
    """Every device that may be asked for anything."""
    return list(
        dict.fromkeys(
            layer.devices[number - 1] for layer in owners.values() for number in np.unique(layer.of) if number
        )
    )
