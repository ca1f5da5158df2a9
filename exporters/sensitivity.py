"""How far a quantized weight's output is from the exact one, on inputs the calibration text really gave it.

Activations are rounded as MatMulNBits rounds them: to int8, in blocks of 32, each with its own scale.
Knows: that arithmetic. Does not know: what is done about a weight that fails.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from edge_kernels.quantization import BLOCK

from edge_runtime.engine.reference_operations import silu
from exporters.checkpoint import Floats
from exporters.experts import quantized_expert
from exporters.quantize import restored
from exporters.reference_pass import Observations, Observed
from exporters.sources import ExpertsSource

# Above these a weight stays fp32. Plain rounding of Gaussian weights gives about 0.01 and 0.09.
DEFAULT_MAX_ERROR = {"int8": 0.05, "int4": 0.25, "nested4": 0.25, "nested8": 0.05}
_JUDGED_EXPERTS = 4  # of a layer: those that most rows reached


class ErrorMeter:
    """Relative error of a linear's output, added up over pieces of its rows."""

    def __init__(self, x: Floats) -> None:
        self._x = x
        self._rounded = round_activations(x)
        self._error = 0.0
        self._norm = 0.0

    def add(self, exact: Floats, quantized: Floats) -> None:
        y = self._x @ exact.T
        self._error += float(np.square(self._rounded @ quantized.T - y).sum())
        self._norm += float(np.square(y).sum())

    @property
    def relative_error(self) -> float:
        return float(np.sqrt(self._error / self._norm)) if self._norm else 0.0


def round_activations(x: Floats) -> Floats:
    """What int8 activations in blocks of 32 stand for."""
    rows, width = x.shape
    padded = np.zeros((rows, -(-width // BLOCK) * BLOCK), np.float32)
    padded[:, :width] = x
    blocks = padded.reshape(rows, -1, BLOCK)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    codes = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    return np.asarray((np.rint(codes) * scale).reshape(rows, -1)[:, :width], np.float32)


def experts_error(source: ExpertsSource, format: str, observed: Observations) -> float:
    """Relative error of a layer's busiest experts, gate, up and down together."""
    name = source.plan.name
    counts = {e: len(observed[f"{name}/{e}/gate"].sample) for e in range(source.plan.experts)}
    inputs = partial(inputs_of, observed, name)
    error = norm = 0.0
    for number in sorted(counts, key=lambda e: (-counts[e], e))[:_JUDGED_EXPERTS]:
        if not counts[number]:
            continue
        expert = source.expert(number)
        x = observed[f"{name}/{number}/gate"].judged
        matrices = quantized_expert(expert, number, format, inputs)
        quantized = {
            part: restored(matrices[part], format, matrix.shape[1]) for part, matrix in expert.parts()
        }
        exact = (silu(x @ expert.gate.T) * (x @ expert.up.T)) @ expert.down.T
        rounded = round_activations(x)
        inner = silu(rounded @ quantized["gate"].T) * (rounded @ quantized["up"].T)
        error += float(np.square(round_activations(inner) @ quantized["down"].T - exact).sum())
        norm += float(np.square(exact).sum())
    return float(np.sqrt(error / norm)) if norm else 0.0


def inputs_of(observed: Observations, name: str, expert: int, part: str) -> Observed | None:
    """gate and up see the same inputs; an expert no row reached has no `down` inputs to go by."""
    return observed.get(f"{name}/{expert}/{'down' if part == 'down' else 'gate'}")
