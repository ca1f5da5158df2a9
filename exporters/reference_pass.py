"""The checkpoint's own answer on a calibration text, at full precision, one block of weights after another.

All rows of the text go through a block before the next block's weights are read, so memory holds the rows and a few
rows of one weight, whatever the model's size. On the way it notes what each linear's inputs look like.
Knows: operations on whole sequences, in NumPy. Does not know: formats, bundles, engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from edge_kernels.experts import route
from numpy.typing import NDArray

from edge_runtime.bundle.manifest import Rope
from edge_runtime.bundle.operations import Operation
from edge_runtime.engine import reference_operations as ops
from exporters.architectures.plan import BlockPlan, ModelPlan
from exporters.checkpoint import Floats
from exporters.scores import LOGIT_COLUMNS, ScoreBuilder, Scores
from exporters.sources import Expert, Sources

SAMPLE_ROWS = 1024  # inputs of a linear kept, and up to twice as many: how its columns go together
JUDGED_ROWS = 256  # of them, to judge a quantized weight by


@dataclass(slots=True)
class Observed:
    """What reached one weight: the mean square of each input channel, and some rows. Experts: one per expert."""

    square_sum: NDArray[np.float64]
    rows: int = 0
    sample: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    @classmethod
    def of(cls, x: Floats) -> Observed:
        return cls(np.square(x, dtype=np.float64).sum(axis=0), len(x), _thinned(x, SAMPLE_ROWS).copy())

    @property
    def judged(self) -> Floats:
        return _thinned(self.sample, JUDGED_ROWS)

    @property
    def importance(self) -> Floats:
        """Never quite zero: a channel the text did not touch still matters a little."""
        mean = self.square_sum / max(self.rows, 1)
        return np.asarray(mean + 1e-3 * mean.mean() + 1e-12, np.float32)


def _thinned(x: Floats, rows: int) -> Floats:
    """Of many rows so many, and up to twice as many, evenly spread."""
    return x[:: max(1, len(x) // rows)]


Observations = dict[str, Observed]  # by tensor name; experts by "name/expert/part"


class ReferencePass:
    """`run` each block in order; `scores` after the head."""

    def __init__(self, plan: ModelPlan, sources: Sources, sequences: Sequence[Sequence[int]]) -> None:
        self.plan = plan
        self._sources = sources
        self._ids = [token for sequence in sequences for token in sequence]
        self._starts = np.cumsum([0, *(len(sequence) for sequence in sequences)]).tolist()
        self._positions = np.concatenate([np.arange(len(sequence)) for sequence in sequences])
        self._hidden = np.zeros((0, 0), np.float32)
        self.scores: Scores | None = None
        self.pooled: Floats | None = None  # [sequences, E], of an encoder

    @property
    def hidden(self) -> Floats:
        return self._hidden

    def run(self, block: BlockPlan) -> Observations:
        """Move all rows through a block."""
        observed: Observations = {}
        if block is self.plan.head and self.plan.kind == "generator":
            self._run_head(block, observed)
            return observed
        values: dict[str, Floats] = {"hidden": self._hidden}
        for operation in block.operations:
            inputs = [values[name] for name in operation.inputs]
            values[operation.outputs[0]] = self._step(operation, inputs, observed)
        self._hidden = values["hidden"]
        if block is self.plan.head:
            self.pooled = self._hidden
        return observed

    def _step(self, operation: Operation, inputs: list[Floats], observed: Observations) -> Floats:
        attributes = operation.attributes
        match operation.kind:
            case "embedding":
                return self._embedding(operation)
            case "linear":
                observed[operation.weights["weight"]] = Observed.of(inputs[0])
                return self._linear(operation, inputs[0])
            case "attention":
                return self._attention(operation, inputs)
            case "experts":
                return self._experts(operation, inputs, observed)
            case "pool":
                mode, normalize = str(attributes["mode"]), bool(attributes["normalize"])
                spans = pairwise(self._starts)
                return np.stack([ops.pool(inputs[0][a:b], mode, normalize) for a, b in spans])
            case "rms_norm":
                return ops.rms_norm(
                    inputs[0], self._weight(operation, "weight"), float(attributes["epsilon"])
                )
            case "layer_norm":
                bias = self._weight(operation, "bias") if "bias" in operation.weights else None
                weight = self._weight(operation, "weight")
                return ops.layer_norm(inputs[0], weight, bias, float(attributes["epsilon"]))
        return _elementwise(operation, inputs)

    def _weight(self, operation: Operation, slot: str) -> Floats:
        return self._sources.tensors[operation.weights[slot]].read()

    def _embedding(self, operation: Operation) -> Floats:
        distinct, places = np.unique(np.asarray(self._ids), return_inverse=True)
        table = self._sources.tensors[operation.weights["weight"]].rows_at(distinct.tolist())
        rows = table[places] * np.float32(operation.attributes["factor"])
        if "position" in operation.weights:
            rows = rows + self._weight(operation, "position")[self._positions]
        if "token_type" in operation.weights:
            rows = rows + self._weight(operation, "token_type")[0]
        return rows

    def _linear(self, operation: Operation, x: Floats) -> Floats:
        source = self._sources.tensors[operation.weights["weight"]]
        y = np.empty((len(x), source.shape[0]), np.float32)
        for first, rows in source.chunks():
            y[:, first : first + len(rows)] = x @ rows.T
        return y + self._weight(operation, "bias") if "bias" in operation.weights else y

    def _attention(self, operation: Operation, inputs: list[Floats]) -> Floats:
        attributes = operation.attributes
        rope = self.plan.ropes.get(str(attributes["rope"]))
        epsilon = float(attributes["norm_epsilon"])
        query, key = (
            _prepare(
                value,
                self._weight(operation, norm) if norm in operation.weights else None,
                int(attributes[count]),
                epsilon,
                rope,
                self._positions,
            )
            for value, norm, count in zip(inputs, ("q_norm", "k_norm"), ("heads", "kv_heads"), strict=False)
        )
        value = inputs[2].reshape(len(inputs[2]), int(attributes["kv_heads"]), -1)
        spans = pairwise(self._starts)
        return np.concatenate([_attend(query[a:b], key[a:b], value[a:b], attributes) for a, b in spans])

    def _experts(self, operation: Operation, inputs: list[Floats], observed: Observations) -> Floats:
        attributes, name = operation.attributes, operation.weights["experts"]
        x, logits = inputs
        source = self._sources.experts[name]
        ids, gates = route(
            logits,
            top_k=int(attributes["top_k"]),
            normalize=bool(attributes["normalize"]),
            softmax_after=bool(attributes["softmax_after"]),
        )
        everywhere = Observed.of(x)
        out = np.zeros_like(x)
        for expert in range(source.plan.experts):
            rows, ranks = np.nonzero(ids == expert)
            observed[f"{name}/{expert}/gate"] = _with_prior(Observed.of(x[rows]), everywhere)
            if len(rows):
                inner, y = _run_expert(source.expert(expert), x[rows])
                observed[f"{name}/{expert}/down"] = Observed.of(inner)
                out[rows] += gates[rows, ranks, None] * y
        return out

    def _run_head(self, block: BlockPlan, observed: Observations) -> None:
        """Logits are made a few vocabulary entries at a time, and only their statistics kept."""
        place = next(i for i, operation in enumerate(block.operations) if operation.kind == "linear")
        values: dict[str, Floats] = {"hidden": self._hidden}
        for operation in block.operations[:place]:
            inputs = [values[name] for name in operation.inputs]
            values[operation.outputs[0]] = self._step(operation, inputs, observed)
        head, after = block.operations[place], block.operations[place + 1 :]
        x = values[head.inputs[0]]
        observed[head.weights["weight"]] = Observed.of(x)
        builder = ScoreBuilder(next_tokens(self._ids, self._starts))
        for first, rows in self._sources.tensors[head.weights["weight"]].chunks():
            for start in range(0, len(rows), LOGIT_COLUMNS):
                logits = x @ rows[start : start + LOGIT_COLUMNS].T
                for operation in after:
                    logits = _elementwise(operation, [logits])
                builder.add(first + start, logits)
        self.scores = builder.scores()


def next_tokens(ids: Sequence[int], starts: Sequence[int]) -> NDArray[np.int64]:
    """What each row should predict: the id after it; -1 at the end of a sequence."""
    following = np.append(np.asarray(ids[1:], np.int64), -1)
    following[np.asarray(starts[1:]) - 1] = -1
    return following


def _elementwise(operation: Operation, inputs: list[Floats]) -> Floats:
    attributes = operation.attributes
    table: Mapping[str, Callable[[], Floats]] = {
        "add": lambda: inputs[0] + inputs[1],
        "mul": lambda: inputs[0] * inputs[1],
        "scale": lambda: inputs[0] * np.float32(attributes["factor"]),
        "softcap": lambda: ops.softcap(inputs[0], float(attributes["cap"])),
    }
    if operation.kind in table:
        return table[operation.kind]()
    return ops.ACTIVATIONS[operation.kind](inputs[0])


def _prepare(
    x: Floats,
    norm: Floats | None,
    heads: int,
    epsilon: float,
    rope: Rope | None,
    positions: NDArray[np.int64],
) -> Floats:
    """Rows of q or k as [R, heads, d]: normalised and rotated."""
    if norm is not None and norm.size == x.shape[1]:
        x = ops.rms_norm(x, norm, epsilon)
    split = x.reshape(len(x), heads, -1)
    if norm is not None and norm.size != x.shape[1]:
        split = ops.rms_norm(split, norm, epsilon)
    if rope is None:
        return split
    angles = positions[:, None, None] * np.asarray(rope.inverse_frequencies)  # [R, 1, rotary / 2]
    cos, sin = ((turn(angles) * rope.scale).astype(np.float32) for turn in (np.cos, np.sin))
    half = cos.shape[-1]
    low, high, rest = split[..., :half], split[..., half : 2 * half], split[..., 2 * half :]
    return np.concatenate((low * cos - high * sin, high * cos + low * sin, rest), axis=-1)


def _attend(query: Floats, key: Floats, value: Floats, attributes: Mapping[str, object]) -> Floats:
    """One whole sequence: q [L, heads, d], k and v [L, kv_heads, d] -> [L, heads * d]."""
    length, heads = len(query), query.shape[1]
    group = heads // key.shape[1]
    cap, window = float(str(attributes["softcap"])), int(str(attributes["window"]))
    row, column = np.arange(length)[:, None], np.arange(length)[None, :]
    hidden = (column > row) & bool(attributes["causal"])
    if window and attributes["causal"]:
        hidden = hidden | (column <= row - window)
    out = np.empty_like(query, shape=(length, heads, value.shape[-1]))
    for head in range(heads):
        scores = query[:, head] @ key[:, head // group].T * np.float32(str(attributes["scale"]))
        scores = ops.softcap(scores, cap) if cap > 0 else scores
        out[:, head] = ops.softmax(np.where(hidden, np.float32(-np.inf), scores)) @ value[:, head // group]
    return out.reshape(length, -1)


def _run_expert(expert: Expert, x: Floats) -> tuple[Floats, Floats]:
    """(what goes into `down`, what comes out of it)"""
    inner = ops.silu(x @ expert.gate.T) * (x @ expert.up.T)
    return inner, inner @ expert.down.T


def _with_prior(observed: Observed, everywhere: Observed, prior_rows: int = 16) -> Observed:
    """An expert that few rows reached is judged by all rows too."""
    mean = everywhere.square_sum / max(everywhere.rows, 1)
    return Observed(observed.square_sum + prior_rows * mean, observed.rows + prior_rows, observed.sample)
