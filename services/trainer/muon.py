"""Muon in float32: momentum whose update is made orthogonal, for the weight matrices.

torch.optim.Muon iterates in bfloat16, which a CPU without bfloat16 instructions emulates a hundred times slower.
Invariants: every parameter is a matrix; matrices of one shape are orthogonalised in one batch.
"""

from __future__ import annotations

from collections import defaultdict

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class Muon:
    def __init__(self, matrices: list[torch.nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        self._momentum = momentum
        self._weight_decay = weight_decay
        by_shape: dict[tuple[int, ...], list[torch.nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            assert matrix.ndim == 2
            by_shape[tuple(matrix.shape)].append(matrix)
        self._groups = list(by_shape.values())
        self._velocities = [torch.zeros(len(group), *group[0].shape) for group in self._groups]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for group, velocity in zip(self._groups, self._velocities, strict=True):
            gradient = torch.stack([_gradient(matrix) for matrix in group])
            velocity.lerp_(gradient, 1 - self._momentum)
            update = orthogonalized(gradient.lerp(velocity, self._momentum))  # Nesterov
            scale = 0.2 * max(group[0].shape) ** 0.5  # the root mean square of an AdamW update
            for matrix, change in zip(group, update.unbind(), strict=True):
                matrix.mul_(1 - learning_rate * self._weight_decay)
                matrix.add_(change, alpha=-learning_rate * scale)


def orthogonalized(batch: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly, by five Newton-Schulz steps. batch: [matrices, rows, columns]."""
    first, second, third = NEWTON_SCHULZ
    tall = batch.shape[1] > batch.shape[2]
    x = batch.mT if tall else batch
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = first * x + (second * gram + third * gram @ gram) @ x
    return x.mT if tall else x


def _gradient(matrix: torch.nn.Parameter) -> torch.Tensor:
    assert matrix.grad is not None
    return matrix.grad
