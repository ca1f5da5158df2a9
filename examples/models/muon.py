"""Muon: steps of orthogonalised momentum (Jordan et al. 2024), as long as AdamW's (Moonlight, Liu et al. 2025).

Knows: matrices and stacks of matrices. Our own, because torch's takes no stacks, and the experts are stacks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the odd quintic that drives singular values towards one
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Every parameter is a matrix [rows, columns] or a stack of them [count, rows, columns], each stepped by itself."""

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._step(matrix, group)

    def _step(self, matrix: torch.Tensor, group: dict[str, Any]) -> None:
        momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
        momentum.lerp_(matrix.grad, 1 - group["momentum"])
        ahead = torch.lerp(matrix.grad, momentum, group["momentum"])
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        scale = 0.2 * max(matrix.shape[-2:]) ** 0.5  # a root mean square of 0.2, as AdamW's
        matrix.add_(orthogonalized(ahead), alpha=-group["lr"] * scale)


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """U V^T of each matrix U S V^T, roughly: singular values end between 0.7 and 1.2 (Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if is_tall else x
