"""A device's answers to those who have rows for its experts.

Knows: what it holds, and what a request must look like. Does not know: links, or who may ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ProtocolError
from edge_runtime.experts.peer_runner import PIECE_BYTES
from edge_runtime.experts.peer_store import PeerStore

Float32 = NDArray[np.float32]

_USE_BYTES = 8  # two int32


class PeerServer:
    """`activations`: of each layer. One compute thread uses it."""

    def __init__(self, store: PeerStore, activations: Mapping[int, str], *, threads: int) -> None:
        self._store, self._activations, self._threads = store, activations, threads
        self.answered_uses = 0

    @property
    def held_bytes(self) -> int:
        return self._store.held_bytes

    def answer(self, layer: int, payloads: Sequence[memoryview]) -> Float32:
        """Payloads as `ExpertRows` has them; outputs [uses, hidden] or sums [rows, hidden]. Raises ProtocolError."""
        if layer not in self._store.layers or len(payloads) not in (2, 3):
            raise ProtocolError(f"rows for layer {layer} that do not fit this device's plan")
        row_bytes = 4 * self._store.layers[layer].hidden
        rows, uses = payloads[:2]
        if not rows.nbytes or rows.nbytes % row_bytes or not uses.nbytes or uses.nbytes % _USE_BYTES:
            raise ProtocolError(f"rows of {row_bytes} bytes and uses of {_USE_BYTES} are needed")
        count = uses.nbytes // _USE_BYTES
        if count > 1 and count * row_bytes > PIECE_BYTES:
            raise ProtocolError(
                f"{count} outputs were asked for at once; ask for {PIECE_BYTES} bytes at most"
            )
        index, experts = np.frombuffer(uses, np.int32).reshape(-1, 2).T
        if index.min() < 0 or index.max() >= rows.nbytes // row_bytes:
            raise ProtocolError("a use of a row that was not sent")
        if not self._store.holds(layer, experts):
            raise ProtocolError(f"experts of layer {layer} that this device does not hold")
        self.answered_uses += count
        x = np.frombuffer(rows, np.float32).reshape(-1, row_bytes // 4)
        activation = self._activations[layer]
        if len(payloads) == 2:
            return self._store.run_each(
                layer, x[index], experts, activation=activation, threads=self._threads
            )
        gates = _gates(payloads[2], index, len(x))
        ids = experts.reshape(gates.shape)
        return self._store.run(layer, x, ids, gates, activation=activation, threads=self._threads)

    def close(self) -> None:
        self._store.close()


def _gates(payload: memoryview, index: NDArray[np.int32], rows: int) -> Float32:
    """[rows, uses of each]. Raises ProtocolError where they are not those of every row in turn."""
    if payload.nbytes != 4 * len(index) or len(index) % rows:
        raise ProtocolError("sums need a gate for every use, and equally many of every row")
    if (index.reshape(rows, -1) != np.arange(rows)[:, None]).any():
        raise ProtocolError("sums need the uses of one row after the other")
    return np.frombuffer(payload, np.float32).reshape(rows, -1)
