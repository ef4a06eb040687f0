"""Muon (Jordan et al., 2024): momentum, made orthogonal, for the matrices inside a model.

torch has one (`torch.optim.Muon`), but it orthogonalises in bf16, which takes a CPU without
bf16 instructions four times as long as float32 does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

_NEWTON_SCHULZ_STEPS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315  # the coefficients of the original


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose every update has all its singular values near one."""

    def __init__(
        self, matrices: Iterable[torch.Tensor], *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(matrices, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        """Change every matrix by its gradient, which must be there and stays as it is."""
        for group in self.param_groups:
            for matrix in group["params"]:
                update = self._orthogonal_update(matrix, group["momentum"])
                # Tall matrices would otherwise move less per output than wide ones.
                scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * scale)

    def _orthogonal_update(self, matrix: torch.Tensor, momentum: float) -> torch.Tensor:
        assert matrix.grad is not None
        state = self.state[matrix]
        if not state:
            state["average"] = torch.zeros_like(matrix)
        average: torch.Tensor = state["average"].lerp_(matrix.grad, 1 - momentum)
        return _orthogonalize(matrix.grad.lerp(average, momentum))


def _orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Return U V of the singular value decomposition U S V, nearly (Newton-Schulz)."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if is_tall else matrix
    x: torch.Tensor = wide / (wide.norm() + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.T if is_tall else x
