"""The reference executor: a bundle's operations, interpreted in NumPy. Short and slow.

It is the specification of what a stage computes; the other executors are compared with it in tests.
Knows: blocks, values, sessions' keys and values. Does not know: compiled segments, native kernels, threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import Block
from edge_runtime.bundle.operations import Operation
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine import reference_operations as ops
from edge_runtime.engine.base import Batch, Rows
from edge_runtime.engine.page_table import PageTable, pages_for
from edge_runtime.engine.rope import rope_tables
from edge_runtime.engine.spans import RowLayout, StageShape, check_batch, check_open, lay_out
from edge_runtime.engine.weights import RowTable, read_expert, read_tensor
from edge_runtime.engine.wire import check_wire, rounded

Values = dict[str, Rows]


class ReferenceStage:
    """A Stage. Attention's keys and values are plain lists of rows per session and operation."""

    def __init__(
        self, bundle: Bundle, layers: LayerRange, *, kv_tokens: int = 4096, wire: str = "fp32"
    ) -> None:
        manifest = bundle.manifest
        self.layers = layers
        self.numeric_class = (
            f"reference/numpy-{np.__version__}/w:{manifest.model.weights}/kv:fp32/wire:{wire}"
        )
        self.weight_bytes = manifest.stage_weight_bytes(layers.first, layers.last)
        self._bundle = bundle
        self._shape = StageShape(manifest.model, layers, manifest.num_layers)
        self._wire = check_wire(wire)
        self._boundaries = self._shape.boundaries
        self._blocks = manifest.blocks(layers.first, layers.last)
        self._table = PageTable(pages_for(kv_tokens))
        self._kv: dict[SessionId, dict[str, tuple[list[Rows], list[Rows]]]] = {}
        self._ropes = {
            name: rope_tables(rope, min(manifest.model.max_context_tokens, self._table.capacity_tokens))
            for name, rope in manifest.ropes.items()
        }
        self._weights: dict[str, Rows] = {}

    @property
    def kv_capacity_tokens(self) -> int:
        return self._table.capacity_tokens

    @property
    def kv_used_tokens(self) -> int:
        return self._table.reserved_tokens

    @property
    def spare_pages(self) -> int:
        """Side rows take none here."""
        return self._table.num_pages

    def open(self, session: SessionId, max_rows: int, page_names: Sequence[bytes] = ()) -> Sequence[int]:
        """Nothing is ever kept for another session: what others reuse is compared with this."""
        check_open(self._shape, session, max_rows)
        self._table.open(session, max_rows)
        self._kv[session] = {}
        return ()

    def keep(
        self, session: SessionId, first_page: int, page_names: Sequence[bytes], ids: Sequence[int]
    ) -> None:
        return None

    def give_back(self, *, all_pages: bool = False) -> None:
        return None

    def drop(self, session: SessionId, from_row: int = 0) -> None:
        if session not in self._table:
            return
        if from_row > 0:
            self._table.truncate(session, from_row)
        else:
            self._table.close(session)
            del self._kv[session]

    def close(self) -> None:
        for session in self._table.sessions():
            self.drop(session)
        self._weights.clear()

    def run(self, batch: Batch) -> Rows:
        check_batch(batch, self._shape, self._table)
        for span in batch.spans:
            self._table.append(span.session, span.base_row, len(span.ids))
        rows = batch.hidden if batch.hidden is not None else np.zeros((0, 0), np.float32)
        layout = lay_out(batch.spans)
        for block in self._blocks:
            if block.name == "head" and self._shape.model.kind == "generator":
                rows = rows[layout.logit_rows]
                if not len(rows):
                    return np.zeros((0, self._shape.model.vocab_size), np.float32)
            rows = self._run_block(block, rows, batch, layout)
            if block.name in self._boundaries:
                rows = rounded(rows, self._wire)
        return rows

    def _run_block(self, block: Block, rows: Rows, batch: Batch, layout: RowLayout) -> Rows:
        values: Values = {"hidden": rows}
        for operation in block.operations:
            inputs = [values[name] for name in operation.inputs]
            if operation.kind == "embedding":
                result = self._embedding(operation, batch, layout)
            elif operation.kind == "attention":
                result = self._attention(operation, inputs, batch, layout)
            elif operation.kind == "experts":
                result = self._experts(operation, inputs)
            elif operation.kind == "pool":
                result = self._pool(operation, inputs, layout)
            else:
                result = self._dense(operation, inputs)
            values[operation.outputs[0]] = result.astype(np.float32, copy=False)
        return values["hidden"]

    def _weight(self, operation: Operation, slot: str) -> Rows:
        name = operation.weights[slot]
        if name not in self._weights:
            self._weights[name] = read_tensor(self._bundle, name)
        return self._weights[name]

    def _optional(self, operation: Operation, slot: str) -> Rows | None:
        return self._weight(operation, slot) if slot in operation.weights else None

    def _dense(self, operation: Operation, inputs: list[Rows]) -> Rows:
        attributes = operation.attributes
        table: dict[str, Callable[[], Rows]] = {
            "rms_norm": lambda: ops.rms_norm(
                inputs[0], self._weight(operation, "weight"), float(attributes["epsilon"])
            ),
            "layer_norm": lambda: ops.layer_norm(
                inputs[0],
                self._weight(operation, "weight"),
                self._optional(operation, "bias"),
                float(attributes["epsilon"]),
            ),
            "linear": lambda: ops.linear(
                inputs[0], self._weight(operation, "weight"), self._optional(operation, "bias")
            ),
            "add": lambda: inputs[0] + inputs[1],
            "mul": lambda: inputs[0] * inputs[1],
            "scale": lambda: inputs[0] * np.float32(attributes["factor"]),
            "softcap": lambda: ops.softcap(inputs[0], float(attributes["cap"])),
        }
        if operation.kind in table:
            return table[operation.kind]()
        return ops.ACTIVATIONS[operation.kind](inputs[0])

    def _embedding(self, operation: Operation, batch: Batch, layout: RowLayout) -> Rows:
        ids = np.array([token for span in batch.spans for token in span.ids + span.sides.ids])
        rows = RowTable(self._bundle, operation.weights["weight"])[ids] * np.float32(
            operation.attributes["factor"]
        )
        if "position" in operation.weights:
            rows = rows + self._weight(operation, "position")[layout.positions]
        if "token_type" in operation.weights:
            rows = rows + self._weight(operation, "token_type")[0]
        return rows

    def _attention(self, operation: Operation, inputs: list[Rows], batch: Batch, layout: RowLayout) -> Rows:
        attributes = operation.attributes
        heads, kv_heads = int(attributes["heads"]), int(attributes["kv_heads"])
        epsilon, rope = float(attributes["norm_epsilon"]), str(attributes["rope"])
        q_norm, k_norm = self._optional(operation, "q_norm"), self._optional(operation, "k_norm")

        def prepare(row: Rows, position: int, norm: Rows | None, count: int) -> Rows:
            split = ops.norm_heads(row, norm, count, epsilon)
            if not rope:
                return split
            cos, sin = self._ropes[rope]
            return ops.rotate(split, cos[position], sin[position])

        out = []
        for index, span in enumerate(batch.spans):
            rows = range(layout.starts[index], layout.starts[index] + len(span.ids))
            new_keys = [prepare(inputs[1][r], layout.positions[r], k_norm, kv_heads) for r in rows]
            new_values = [inputs[2][r].reshape(kv_heads, -1) for r in rows]
            held = self._kv[span.session].setdefault(operation.name, ([], []))
            held[0][span.base_row :], held[1][span.base_row :] = new_keys, new_values
            keys, values = np.array(held[0]), np.array(held[1])
            for r in rows:
                position = int(layout.positions[r])
                seen = ops.visible(position, len(keys), attributes)
                query = prepare(inputs[0][r], position, q_norm, heads)
                out.append(ops.attend(query, keys[seen], values[seen], attributes))
            for side in range(len(span.sides)):
                left_at, above = span.sides.path(side)
                path = [rows.stop + one for one in above]
                position = int(layout.positions[path[-1]])
                side_keys = [prepare(inputs[1][r], layout.positions[r], k_norm, kv_heads) for r in path]
                side_values = [inputs[2][r].reshape(kv_heads, -1) for r in path]
                keys = np.array([*held[0][: left_at + 1], *side_keys])
                values = np.array([*held[1][: left_at + 1], *side_values])
                seen = ops.visible(position, len(keys), attributes)
                query = prepare(inputs[0][path[-1]], position, q_norm, heads)
                out.append(ops.attend(query, keys[seen], values[seen], attributes))
        return np.stack(out)

    def _experts(self, operation: Operation, inputs: list[Rows]) -> Rows:
        attributes, name = operation.attributes, operation.weights["experts"]
        activation = ops.ACTIVATIONS[str(attributes["activation"])]
        out = []
        for row, logits in zip(*inputs, strict=True):
            total = np.zeros_like(row)
            chosen, gates = ops.route(
                logits,
                int(attributes["top_k"]),
                bool(attributes["normalize"]),
                bool(attributes["softmax_after"]),
            )
            for expert, gate in zip(chosen.tolist(), gates, strict=True):
                gate_rows = read_expert(self._bundle, name, expert, "gate") @ row
                up_rows = read_expert(self._bundle, name, expert, "up") @ row
                down = read_expert(self._bundle, name, expert, "down")
                total = total + gate * (down @ (activation(gate_rows) * up_rows))
            out.append(total)
        return np.stack(out)

    def _pool(self, operation: Operation, inputs: list[Rows], layout: RowLayout) -> Rows:
        mode, normalize = str(operation.attributes["mode"]), bool(operation.attributes["normalize"])
        starts = layout.starts
        return np.stack([ops.pool(inputs[0][a:b], mode, normalize) for a, b in pairwise(starts)])
