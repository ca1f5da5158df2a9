"""Where Triton programs run in tests: a CUDA device where there is one, else Triton's interpreter (see conftest)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def few(examples: int) -> settings:
    """The interpreter is too slow to shrink a failing example."""
    return settings(
        max_examples=examples, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate)
    )


def products_in_order(patch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies tiles with NumPy, whose products depend on a row's place in the tile (measured).

    A GPU's do not. This makes the interpreter's add up in one order too, so that tests of bits see the programs alone.
    """
    if DEVICE != "cpu":
        return
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        total = d.data.copy()
        for k in range(a.data.shape[1]):
            total += a.data[:, k, None].astype(np.float32) * b.data[None, k].astype(np.float32)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
