"""Types of the C++ extension. Arrays must be contiguous and of the exact type; results are written into arguments."""

from typing import overload

import numpy as np
from numpy.typing import NDArray

_F32 = NDArray[np.float32]
_F64 = NDArray[np.float64]
_I8 = NDArray[np.int8]
_I32 = NDArray[np.int32]
_I64 = NDArray[np.int64]
_U32 = NDArray[np.uint32]
_U8 = NDArray[np.uint8]

def isa() -> str:
    """The instruction set in use: avx512, avx2, neon_dot, neon or scalar."""

def available_isas() -> list[str]:
    """What this processor can run, best first."""

def set_isa(name: str) -> None:
    """Use another path; ValueError where the processor lacks it. For tests."""

def prepare_heads(
    x: _F32,
    positions: _I32,
    heads: int,
    head_dim: int,
    cos: _F32 | None,
    sin: _F32 | None,
    weight: _F32 | None,
    epsilon: float,
) -> None: ...
def append_kv(
    pool: _F32,
    layer: int,
    k: _F32,
    v: _F32,
    positions: _I32,
    sequence: _I32,
    block_tables: _I32,
    lengths: _I32,
) -> None: ...
def paged_attention(
    q: _F32,
    pool: _F32,
    layer: int,
    positions: _I32,
    sequence: _I32,
    block_tables: _I32,
    lengths: _I32,
    out: _F32,
    heads: int,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
    threads: int,
) -> None: ...
def append_kv_codes(
    pool: _I8,
    layer: int,
    k: _F32,
    v: _F32,
    positions: _I32,
    sequence: _I32,
    block_tables: _I32,
    lengths: _I32,
) -> None: ...
def paged_attention_codes(
    q: _F32,
    pool: _I8,
    layer: int,
    positions: _I32,
    sequence: _I32,
    block_tables: _I32,
    lengths: _I32,
    out: _F32,
    heads: int,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
    threads: int,
) -> None: ...
def route(logits: _F32, normalize: bool, softmax_after: bool, ids: _I32, gates: _F32) -> None: ...
def run_experts(
    x: _F32,
    ids: _I32,
    gates: _F32,
    buffer: _U8,
    format: str,
    num_experts: int,
    hidden: int,
    intermediate: int,
    stride_bytes: int,
    offsets: _I64,
    y: _F32,
    threads: int,
) -> None: ...

class PackedMatrix:
    """A weight matrix in the order `Program.linear` reads it."""

    @overload
    def __init__(self, data: _U8, scales: _F32, columns: int, threads: int) -> None: ...
    @overload
    def __init__(self, weights: _F32, threads: int) -> None: ...
    @property
    def outputs(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def bytes(self) -> int: ...

class Program:
    """Operations over slots: 0, 1, … are the inputs, then come the outputs, then those of `slot` and `quantized`."""

    def __init__(self, input_widths: list[int], output_widths: list[int]) -> None: ...
    def slot(self, width: int) -> int: ...
    def quantized(self, columns: int, bits: int) -> int: ...
    def row(
        self,
        kind: str,
        a: int,
        b: int,
        out: int,
        weight: _F32 | None,
        bias: _F32 | None,
        parameter: float,
    ) -> None: ...
    def quantize(self, input: int, out: int) -> None: ...
    def linear(self, matrix: PackedMatrix, input: int, out: int, bias: _F32 | None) -> None: ...
    def run(self, inputs: list[_F32], outputs: list[_F32], threads: int) -> None: ...

class Chain:
    """Programs and attention over numbered values: 0 comes in, `result` goes out."""

    def __init__(self, widths: list[int], result: int) -> None: ...
    def program(self, program: Program, inputs: list[int], outputs: list[int]) -> None: ...
    def attention(
        self,
        values: list[int],
        layer: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        window: int,
        softcap: float,
        causal: bool,
        cos: _F32 | None,
        sin: _F32 | None,
        q_norm: _F32 | None,
        k_norm: _F32 | None,
        epsilon: float,
    ) -> None: ...
    def run(
        self,
        x: _F32,
        out: _F32,
        pool: _F32,
        positions: _I32,
        sequence: _I32,
        block_tables: _I32,
        lengths: _I32,
        threads: int,
    ) -> None: ...
    def run_codes(
        self,
        x: _F32,
        out: _F32,
        pool: _I8,
        positions: _I32,
        sequence: _I32,
        block_tables: _I32,
        lengths: _I32,
        threads: int,
    ) -> None: ...

def combine_experts(outputs: _F32, gates: _F32, y: _F32) -> None: ...
def threefry(k0: int, k1: int, c0: _U32, c1: _U32, x0: _U32, x1: _U32) -> None: ...
def gumbel_noise(seed: int, position: int, ids: _U32, out: _F64) -> None: ...
def sample(
    logits: _F64, seed: int, position: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> int: ...
def log_probabilities(logits: _F64, chosen: int, top: int) -> tuple[float, list[tuple[int, float]]]: ...
def blake3(data: _U8, digest: _U8, threads: int) -> None: ...

class FlashReads:
    """Raises RuntimeError where the system has no io_uring to give."""

    def __init__(self, piece_bytes: int) -> None: ...
    def submit(self, memory: _U8, places: _I64, targets: _I64, digests: _U8) -> None: ...
    def land(self, threads: int) -> list[tuple[int, int]]: ...
    def time_reads(self, memory: _U8, places: _I64, targets: _I64) -> float: ...
    def give_up(self) -> None: ...
    def check(self, threads: int) -> list[tuple[int, int, int]]: ...
    def cancel(self) -> None: ...
    @property
    def waited_seconds(self) -> float: ...
    @property
    def times(self) -> tuple[int, int, int, int, int]: ...
    @property
    def parts(self) -> int: ...

class ExpertSlots:
    """Raises ValueError for slots or keys that it does not have."""

    def __init__(self, slots: int, keys: int) -> None: ...
    @property
    def slots(self) -> int: ...
    @property
    def resident(self) -> int: ...
    def slot(self, key: int) -> int: ...
    def key(self, slot: int) -> int: ...
    def use(self, key: int, step: int, rows: int) -> int: ...
    def admit(self, key: int, step: int, rows: int) -> int: ...
    def unpin(self, key: int) -> None: ...
    def unpin_all(self) -> None: ...
    def forget(self, key: int) -> None: ...
    def hold(self, slot: int) -> None: ...
    def release(self, slot: int) -> None: ...

class FlashLayer:
    def __init__(
        self,
        slots: ExpertSlots,
        reads: FlashReads,
        memory: _U8,
        place: tuple[int, int, int, int],
        plane_bytes: _I64,
        digests: _U8,
        format: str,
        hidden: int,
        intermediate: int,
        stride_bytes: int,
        offsets: _I64,
    ) -> None: ...
    def run(
        self, x: _F32, ids: _I32, gates: _F32, step: int, y: _F32, threads: int, owner: int = -1
    ) -> tuple[int, int, float, list[tuple[int, int]]]: ...

def time_reads_beside(
    reads: FlashReads,
    memory: _U8,
    places: _I64,
    targets: _I64,
    x: _F32,
    ids: _I32,
    gates: _F32,
    buffer: _U8,
    format: str,
    experts: int,
    hidden: int,
    intermediate: int,
    stride_bytes: int,
    offsets: _I64,
    y: _F32,
    threads: int,
) -> float: ...
def run_arriving(
    reads: FlashReads,
    keys: _I64,
    slots: _I32,
    x: _F32,
    ids: _I32,
    gates: _F32,
    buffer: _U8,
    format: str,
    experts: int,
    hidden: int,
    intermediate: int,
    stride_bytes: int,
    offsets: _I64,
    y: _F32,
    threads: int,
) -> list[tuple[int, int]]: ...

class Inlet:
    """Takes a due list from a ROUTER socket of libzmq while an event loop waits. For the loop's thread alone."""

    def __init__(self, calls: list[int], socket: int) -> None:
        """Addresses of zmq_msg_init, recv, close, data, size, more, get and gets; `socket` as libzmq's own pointer."""

    def expect(
        self, routing_id: bytes, user: str, pieces: list[tuple[int, bytes, bytes]], place: _U8 | None
    ) -> None:
        """One part of this peer's: before, a hole, after, up to a row's beginning; then a row as long as `place`.

        Pieces are told apart by their sizes.
        """

    def wait(self, epoll_fd: int, socket_fd: int, timeout_milliseconds: int) -> int:
        """0: nothing was taken. 1: what is expected, its row is in its place. 2: another list. -1 ms: for ever."""

    def hole(self) -> bytes:
        """Of the list that was expected."""

    def taken(self) -> tuple[bytes, str, int, list[bytes]]:
        """Once: routing id, user, descriptor of the link, parts."""
