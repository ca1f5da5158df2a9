"""Operations on rows, compiled to one native call.

`compile_program` takes operations over named values, in any order that respects their names' last definitions, and
arranges them: products that share an input run together and quantize it once, silu and the product after it become one
operation, and results replace inputs that nobody reads again. None of this changes a bit.

Knows: names, widths, arithmetic. Does not know: bundles, blocks, or what lies before and after a program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge_kernels import _native
from edge_kernels._native import PackedMatrix

F32 = NDArray[np.float32]

ROW_KINDS = frozenset(
    ("rms_norm", "layer_norm", "add", "mul", "silu", "gelu", "gelu_tanh", "tanh", "scale", "softcap")
)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """`kind` is "linear" or one of ROW_KINDS; `parameter` is a norm's epsilon, a factor or a cap."""

    kind: str
    inputs: tuple[str, ...]
    output: str
    matrix: PackedMatrix | None = None
    weight: F32 | None = None
    bias: F32 | None = None
    parameter: float = 0.0


class Program:
    """Compiled steps. `run` takes and gives arrays [R, width]; one call at a time."""

    def __init__(self, native: _native.Program, output_widths: Sequence[int]) -> None:
        self.native = native  # for a chain
        self.output_widths = tuple(output_widths)

    def run(self, inputs: Sequence[F32], *, threads: int = 1) -> list[F32]:
        rows = len(inputs[0])
        outputs = [np.empty((rows, width), np.float32) for width in self.output_widths]
        self.native.run(list(inputs), outputs, threads)
        return outputs


def compile_program(steps: Sequence[Step], inputs: Mapping[str, int], outputs: Sequence[str]) -> Program:
    """`inputs` are the widths of the values that come in, in order; `outputs` the values wanted at the end."""
    unique, results = _name_once(steps, tuple(inputs), outputs)
    arranged = _arrange(_fuse_silu(unique, results), tuple(inputs))
    widths = dict(inputs)
    for step in arranged:
        widths[step.output] = step.matrix.outputs if step.matrix is not None else widths[step.inputs[0]]
    output_widths = [widths[name] for name in results]
    native = _native.Program(list(inputs.values()), output_widths)
    slots = {name: index for index, name in enumerate((*inputs, *results))}
    _emit(native, arranged, slots, widths, kept=len(slots))
    return Program(native, output_widths)


def _name_once(
    steps: Sequence[Step], inputs: tuple[str, ...], outputs: Sequence[str]
) -> tuple[list[Step], list[str]]:
    """A value that is assigned again gets a new name, so that order no longer matters."""
    current = {name: name for name in inputs}
    unique = []
    for index, step in enumerate(steps):
        read = tuple(current[name] for name in step.inputs)
        current[step.output] = f"{step.output}#{index}"
        unique.append(replace(step, inputs=read, output=current[step.output]))
    return unique, [current[name] for name in outputs]


def _fuse_silu(steps: Sequence[Step], results: Sequence[str]) -> list[Step]:
    """silu(a) * b, where nobody else wants silu(a), is one operation."""
    uses = Counter(name for step in steps for name in step.inputs) + Counter(results)
    silus = {step.output: step for step in steps if step.kind == "silu" and uses[step.output] == 1}
    fused = []
    gone = set()
    for step in steps:
        gates = [name for name in step.inputs if name in silus] if step.kind == "mul" else []
        if gates:
            gone.add(gates[0])
            other = step.inputs[1] if step.inputs[0] == gates[0] else step.inputs[0]
            step = replace(step, kind="silu_mul", inputs=(silus[gates[0]].inputs[0], other))
        fused.append(step)
    return [step for step in fused if step.output not in gone]


def _arrange(steps: Sequence[Step], inputs: tuple[str, ...]) -> list[Step]:
    """All operations on rows that can run, then all products that can, and again: few phases."""
    known = set(inputs)
    left = list(steps)
    arranged: list[Step] = []
    while left:
        runnable = [step for step in left if known.issuperset(step.inputs)]
        ready = [step for step in runnable if step.kind != "linear"] or runnable
        if not ready:
            raise ValueError(f"{left[0].kind} reads a value that nothing makes: {', '.join(left[0].inputs)}")
        arranged += ready
        known.update(step.output for step in ready)
        left = [step for step in left if step not in ready]
    return arranged


def _emit(
    native: _native.Program,
    steps: Sequence[Step],
    slots: dict[str, int],
    widths: Mapping[str, int],
    kept: int,
) -> None:
    """`kept` slots are inputs and outputs, which stay as they are; others are reused by the last to read them."""
    last_use = {name: index for index, step in enumerate(steps) for name in step.inputs}
    quantized: dict[tuple[str, int], int] = {}
    for index, step in enumerate(steps):
        if step.matrix is not None and step.matrix.bits != 32:
            _quantize_all(native, steps[index:], slots, quantized)
        if step.output not in slots:
            name = step.inputs[0]
            is_free = step.kind != "linear" and slots[name] >= kept and last_use[name] == index
            is_free = is_free and widths[name] == widths[step.output]
            slots[step.output] = slots[name] if is_free else native.slot(widths[step.output])
        if step.matrix is None:
            read = [slots[name] for name in step.inputs]
            second = read[1] if len(read) > 1 else -1
            native.row(
                step.kind,
                read[0],
                second,
                slots[step.output],
                _vector(step.weight),
                _vector(step.bias),
                step.parameter,
            )
        else:
            name, bits = step.inputs[0], step.matrix.bits
            source = slots[name] if bits == 32 else quantized[name, bits]
            native.linear(step.matrix, source, slots[step.output], _vector(step.bias))


def _quantize_all(
    native: _native.Program,
    steps: Sequence[Step],
    slots: Mapping[str, int],
    quantized: dict[tuple[str, int], int],
) -> None:
    """Inputs of the products that follow, before the first of them: the rows phase must not come between them."""
    for step in steps:
        if step.matrix is None:
            return
        key = (step.inputs[0], step.matrix.bits)
        if step.matrix.bits != 32 and key not in quantized and step.inputs[0] in slots:
            quantized[key] = native.quantized(step.matrix.columns, step.matrix.bits)
            native.quantize(slots[step.inputs[0]], quantized[key])


def _vector(x: F32 | None) -> F32 | None:
    return None if x is None else np.ascontiguousarray(x.reshape(-1), np.float32)
