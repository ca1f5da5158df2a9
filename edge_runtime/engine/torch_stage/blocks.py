"""A block on a device: its operations as steps, in order, independent of which stage it is part of.

Knows: how values flow from step to step. Does not know: layers' places in a stage, sessions, batches.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from edge_kernels.triton.shapes import Matrix
from torch import Tensor

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import Block
from edge_runtime.engine.resident import forget_pages
from edge_runtime.engine.torch_stage.arithmetic import Arithmetic
from edge_runtime.engine.torch_stage.rows import TorchContext
from edge_runtime.engine.torch_stage.steps import make_step
from edge_runtime.engine.torch_stage.weights import DeviceWeights
from edge_runtime.errors import CapacityError, EngineError


class TorchBlock:
    """The embedding, one layer, or the head. `shared`: matrices by name that other blocks hold, or will."""

    def __init__(
        self, bundle: Bundle, block: Block, arithmetic: Arithmetic, shared: dict[str, Matrix]
    ) -> None:
        self.name = block.name
        self.is_causal = all(o.attributes.get("causal", True) for o in block.operations)
        self.attention_count = sum(operation.kind == "attention" for operation in block.operations)
        self.matrices = {
            name
            for o in block.operations
            for slot, name in o.weights.items()
            if slot in ("weight", "position")
        }
        weights = DeviceWeights(bundle, arithmetic.device, shared)
        try:
            self._steps = []
            kv_index = 0
            for operation in block.operations:
                exact = block.name == "head" or _is_router(block, operation.outputs[0])
                self._steps.append((operation, make_step(operation, weights, arithmetic, kv_index, exact)))
                kv_index += operation.kind == "attention"
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"block {block.name} does not fit into the memory of {arithmetic.device}",
                hint="give this device fewer layers, or end what else uses its memory",
            ) from error
        except (ValueError, TypeError, KeyError, RuntimeError) as error:  # numbers that contradict each other
            raise EngineError(
                f"block {block.name} can't be loaded: {error}", hint="export the bundle again"
            ) from error
        forget_pages(bundle, block.slices)

    def run(self, hidden: Tensor, context: TorchContext, kv_layer: int) -> Tensor:
        values = {"hidden": hidden}
        context = replace(context, kv_layer=kv_layer)
        for operation, step in self._steps:
            values[operation.outputs[0]] = step([values[name] for name in operation.inputs], context)
        return values["hidden"]


def _is_router(block: Block, value: str) -> bool:
    """Logits that choose experts: rounding them would make ties."""
    return any(o.kind == "experts" and o.inputs[1] == value for o in block.operations)
