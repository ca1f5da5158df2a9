"""Tensors of a plan, read from a checkpoint: renamed, cut out of fused ones, shifted, a few rows at a time.

Both forms of expert tensors are read: one tensor per expert and projection, or all experts fused
(`gate_up_proj` [E, 2I, H] with gate first, `down_proj` [E, H, I]).
Knows: plans and checkpoints. Does not know: formats, slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edge_runtime.errors import ExportError
from exporters.architectures.plan import ExpertsPlan, ModelPlan, TensorPlan
from exporters.checkpoint import Checkpoint, Floats


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert's matrices."""

    gate: Floats  # [intermediate, hidden]
    up: Floats  # [intermediate, hidden]
    down: Floats  # [hidden, intermediate]

    def parts(self) -> tuple[tuple[str, Floats], ...]:
        return (("gate", self.gate), ("up", self.up), ("down", self.down))


class TensorSource:
    """One tensor of the bundle. Constructing it checks that the checkpoint has it, in the right shape."""

    def __init__(self, checkpoint: Checkpoint, plan: TensorPlan) -> None:
        self.plan = plan
        self.stored = checkpoint.require(plan.sources, plan.stored_shape)
        self._checkpoint = checkpoint

    @property
    def shape(self) -> tuple[int, ...]:
        return self.plan.shape

    def read(self) -> Floats:
        return self._shifted(self._checkpoint.read(self.stored.name, self.plan.first_row, self._rows))

    def chunks(self) -> Iterator[tuple[int, Floats]]:
        """(first row, rows) in order; never the whole of a large tensor at once."""
        for first, rows in self._checkpoint.chunks(self.stored.name, self.plan.first_row, self._rows):
            yield first, self._shifted(rows)

    def rows_at(self, ids: list[int]) -> Floats:
        """Single rows, for looking up embeddings."""
        return np.concatenate(
            [self._checkpoint.read(self.stored.name, self.plan.first_row + row, 1) for row in ids]
        )

    @property
    def _rows(self) -> int | None:
        return None if self.plan.rows < 0 else self.plan.rows

    def _shifted(self, values: Floats) -> Floats:
        if not np.isfinite(values).all():
            raise ExportError(
                f"tensor {self.stored.name} in {self.stored.path.name} holds infinite or undefined values",
                hint="the checkpoint is damaged; download it again",
            )
        return values + np.float32(self.plan.offset) if self.plan.offset else values


class ExpertsSource:
    """All experts of a layer, one at a time. Constructing it checks every tensor's presence and shape."""

    def __init__(self, checkpoint: Checkpoint, plan: ExpertsPlan) -> None:
        self.plan = plan
        self._checkpoint = checkpoint
        wide, hidden = plan.intermediate, plan.hidden
        self._fused = checkpoint.find(plan.names.fused_gate_up) is not None
        if self._fused:
            checkpoint.require((plan.names.fused_gate_up,), (plan.experts, 2 * wide, hidden))
            checkpoint.require((plan.names.fused_down,), (plan.experts, hidden, wide))
            return
        for expert in range(plan.experts):
            for name, shape in (
                (plan.names.gate, (wide, hidden)),
                (plan.names.up, (wide, hidden)),
                (plan.names.down, (hidden, wide)),
            ):
                checkpoint.require((name.format(expert=expert),), shape)

    def expert(self, number: int) -> Expert:
        names, read = self.plan.names, self._checkpoint.read
        if self._fused:
            both = read(names.fused_gate_up, number, 1)[0]  # [2I, H]
            wide = self.plan.intermediate
            return self._checked(Expert(both[:wide], both[wide:], read(names.fused_down, number, 1)[0]))
        gate, up, down = (read(name.format(expert=number)) for name in (names.gate, names.up, names.down))
        return self._checked(Expert(gate, up, down))

    def _checked(self, expert: Expert) -> Expert:
        for part, values in expert.parts():
            if not np.isfinite(values).all():
                raise ExportError(
                    f"{self.plan.name}: {part} of an expert holds infinite or undefined values",
                    hint="the checkpoint is damaged; download it again",
                )
        return expert


class Sources:
    """Every tensor of a model, checked before the first byte of the bundle is written."""

    def __init__(self, checkpoint: Checkpoint, plan: ModelPlan) -> None:
        self.tensors: dict[str, TensorSource] = {}
        self.experts: dict[str, ExpertsSource] = {}
        for block in plan.blocks:
            for tensor in block.tensors:
                if isinstance(tensor, ExpertsPlan):
                    self.experts[tensor.name] = ExpertsSource(checkpoint, tensor)
                else:
                    self.tensors[tensor.name] = TensorSource(checkpoint, tensor)
