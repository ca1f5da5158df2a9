"""Cut operations: what our own kernels do between compiled segments.

Knows: the embedding, attention, experts and pooling of one block, and where their weights lie in the bundle.
Does not know: which sessions the rows belong to, or how segments are compiled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from edge_kernels.attention import Pool, RaggedRows, append_kv, paged_attention, prepare_qk
from edge_kernels.chain import AttentionPart
from edge_kernels.experts import route
from numpy.typing import NDArray

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.operations import Operation
from edge_runtime.engine.spans import RowLayout
from edge_runtime.engine.weights import RowTable, read_tensor
from edge_runtime.errors import EngineError
from edge_runtime.experts.runner import ExpertSource, expert_runner

Float32 = NDArray[np.float32]
RopeTables = Mapping[str, tuple[Float32, Float32]]  # name -> cos and sin [positions, rotary / 2]


@dataclass(frozen=True, slots=True)
class RunContext:
    """What a cut operation may know of the batch. `kv_layer` is the block's first layer in the pool."""

    ids: NDArray[np.int64]  # [R]
    layout: RowLayout
    rows: RaggedRows
    pool: Pool
    kv_layer: int
    ropes: RopeTables
    written: RaggedRows | None = (
        None  # with side rows: keys and values of rows `layout.written.index` go here
    )


class EmbeddingStep:
    """Only the rows asked for are read and dequantised; the table stays mapped."""

    def __init__(self, bundle: Bundle, operation: Operation) -> None:
        self.inputs, self.outputs = operation.inputs, operation.outputs
        self._table = RowTable(bundle, operation.weights["weight"])
        self._factor = np.float32(operation.attributes["factor"])
        self._position = (
            RowTable(bundle, operation.weights["position"]) if "position" in operation.weights else None
        )
        self._token_type = (
            RowTable(bundle, operation.weights["token_type"])[np.array([0])]
            if "token_type" in operation.weights
            else None
        )

    def run(self, values: Sequence[Float32], context: RunContext) -> list[Float32]:
        rows = self._table[context.ids]
        if self._factor != 1:
            rows = rows * self._factor
        if self._position is not None:
            rows = rows + self._position[context.layout.positions]
        if self._token_type is not None:
            rows = rows + self._token_type
        return [rows]


class AttentionStep:
    def __init__(self, bundle: Bundle, operation: Operation, kv_index: int, threads: int) -> None:
        self.inputs, self.outputs = operation.inputs, operation.outputs
        attributes = operation.attributes
        self._threads = threads
        self._kv_index = kv_index  # among the attention operations of its block
        self._heads = int(attributes["heads"])
        self._kv_heads = int(attributes["kv_heads"])
        self._head_dim = int(attributes["head_dim"])
        self._scale = float(attributes["scale"])
        self._window = int(attributes["window"])
        self._softcap = float(attributes["softcap"])
        self._causal = bool(attributes["causal"])
        self._rope = str(attributes["rope"])
        self._epsilon = float(attributes["norm_epsilon"])
        self._q_norm = _optional(bundle, operation, "q_norm")
        self._k_norm = _optional(bundle, operation, "k_norm")
        self._as_is = not self._rope and self._q_norm is None and self._k_norm is None

    def run(self, values: Sequence[Float32], context: RunContext) -> list[Float32]:
        q, k, v = values
        rows, layer = context.rows, context.kv_layer + self._kv_index
        if not self._as_is:
            cos, sin = context.ropes[self._rope] if self._rope else (None, None)
            q, k = prepare_qk(
                q,
                k,
                rows.positions,
                heads=self._heads,
                kv_heads=self._kv_heads,
                head_dim=self._head_dim,
                cos=cos,
                sin=sin,
                q_norm=self._q_norm,
                k_norm=self._k_norm,
                norm_epsilon=self._epsilon,
            )
        self._append(context, layer, k, v)
        attended = paged_attention(
            q,
            context.pool,
            layer,
            rows,
            heads=self._heads,
            kv_heads=self._kv_heads,
            head_dim=self._head_dim,
            scale=self._scale,
            window=self._window,
            softcap=self._softcap,
            causal=self._causal,
            threads=self._threads,
        )
        return [attended]

    def part(self, kv_layer: int, ropes: RopeTables) -> AttentionPart:
        """The same, of a chain. `kv_layer` is the block's first layer in the pool."""
        cos, sin = ropes[self._rope] if self._rope else (None, None)
        q, k, v = self.inputs
        return AttentionPart(
            (q, k, v),
            self.outputs[0],
            kv_layer + self._kv_index,
            self._heads,
            self._kv_heads,
            self._head_dim,
            self._scale,
            window=self._window,
            softcap=self._softcap,
            causal=self._causal,
            cos=cos,
            sin=sin,
            q_norm=self._q_norm,
            k_norm=self._k_norm,
            norm_epsilon=self._epsilon,
        )

    @staticmethod
    def _append(context: RunContext, layer: int, k: Float32, v: Float32) -> None:
        if context.written is None or context.layout.written is None:
            append_kv(context.pool, layer, k, v, context.rows)
        else:
            index = context.layout.written.index
            append_kv(context.pool, layer, k[index], v[index], context.written)


class ExpertsStep:
    """Routes here; who runs the chosen experts, and where these are, is the runner's business."""

    def __init__(
        self, bundle: Bundle, operation: Operation, threads: int, experts: ExpertSource | None
    ) -> None:
        self.inputs, self.outputs = operation.inputs, operation.outputs
        attributes = operation.attributes
        self._threads = threads
        self._top_k = int(attributes["top_k"])
        self._normalize = bool(attributes["normalize"])
        self._softmax_after = bool(attributes["softmax_after"])
        self._activation = str(attributes["activation"])
        self._tensor = operation.weights["experts"]
        self.use_experts(bundle, experts)

    def use_experts(self, bundle: Bundle, experts: ExpertSource | None) -> None:
        """From now on through these; None: where they are mapped."""
        self.runner = expert_runner(bundle, self._tensor, self._activation, self._threads, experts)

    def run(self, values: Sequence[Float32], context: RunContext) -> list[Float32]:
        rows, logits = values
        ids, gates = route(
            logits, top_k=self._top_k, normalize=self._normalize, softmax_after=self._softmax_after
        )
        return [self.runner.run(rows, ids, gates)]


class PoolStep:
    """One vector per span. Sums run row after row in order, so that a vector depends on its own rows alone."""

    def __init__(self, operation: Operation) -> None:
        self.inputs, self.outputs = operation.inputs, operation.outputs
        self._mode = str(operation.attributes["mode"])
        self._normalize = bool(operation.attributes["normalize"])

    def run(self, values: Sequence[Float32], context: RunContext) -> list[Float32]:
        rows, starts = values[0], np.array(context.layout.starts)
        vectors = rows[starts[:-1]]
        if self._mode == "mean":
            counts = np.diff(starts)[:, None].astype(np.float32)
            vectors = np.add.reduceat(rows, starts[:-1], axis=0) / counts
        if self._normalize:
            norms = np.sqrt(np.add.accumulate(vectors * vectors, axis=1)[:, -1:])
            vectors = vectors / np.maximum(norms, np.float32(1e-12))
        return [vectors]


CutStep = EmbeddingStep | AttentionStep | ExpertsStep | PoolStep


def cut_step(
    bundle: Bundle, operation: Operation, kv_index: int, threads: int, experts: ExpertSource | None
) -> CutStep:
    if operation.kind == "embedding":
        return EmbeddingStep(bundle, operation)
    if operation.kind == "attention":
        return AttentionStep(bundle, operation, kv_index, threads)
    if operation.kind == "experts":
        return ExpertsStep(bundle, operation, threads, experts)
    if operation.kind == "pool":
        return PoolStep(operation)
    raise EngineError(f"{operation.name}: {operation.kind} is not a cut operation")


def _optional(bundle: Bundle, operation: Operation, slot: str) -> Float32 | None:
    if slot not in operation.weights:
        return None
    return read_tensor(bundle, operation.weights[slot]).reshape(-1).copy()
