"""The STRUCTURE regularizer over several modalities, with its warm-up."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import structure_loss

__all__ = ["StructureRegularizer"]


class StructureRegularizer(nn.Module):
    """`ops.structure_loss` of every modality times a weight that rises from 0: lambda min(1, t / warmup) on the t-th training step. [STRUCTURE, NeurIPS 2025]

    >>> import torch
    >>> regularizer = StructureRegularizer(weight=2.0, warmup_steps=1, temperature=0.5)
    >>> pictures, texts = (torch.eye(4), torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])), (torch.eye(4), torch.eye(4))
    >>> regularizer(pictures, texts), regularizer(pictures, texts)
    (tensor(0.), tensor(0.0755))

    Parameters: weight lambda; warmup_steps (0: none); reduction over modalities, "mean" or "sum"; any option of the op. The call takes a pair
    (source [B, D], aligned [B, A]) for each modality, batches of any sizes. With the weight 0 nothing is computed. Steps are counted in training mode, in
    the buffer ``steps``, which is saved with the state. ``diagonal_mass`` holds the means of P_ii and Q_ii of the last call, [modalities, 2]: near 1 there is no signal.

    ``paper()`` and ``released()`` have the published settings; the released code has the divergence the other way round and half the weight.

    Raises ValueError and TypeError for a weight or number of steps below 0, a reduction of another name, and what the op refuses."""

    steps: Tensor

    def __init__(self, weight: float = 10.0, warmup_steps: int = 1000, *, reduction: str = "mean", **options: Any) -> None:
        super().__init__()
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"StructureRegularizer: weight must be a number of 0 or more, got {weight!r}")
        if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 0:
            raise ValueError(f"StructureRegularizer: warmup_steps must be a whole number of 0 or more, got {warmup_steps!r}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f'StructureRegularizer: reduction must be "mean" or "sum", got {reduction!r}')
        if "return_diagonal_mass" in options:
            raise TypeError("StructureRegularizer: options must not hold return_diagonal_mass, which is always kept as diagonal_mass")
        self.weight, self.warmup_steps, self.reduction, self.options = float(weight), warmup_steps, reduction, options
        self.diagonal_mass: Tensor | None = None
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @classmethod
    def paper(cls, **changes: Any) -> StructureRegularizer:
        return cls(**{"weight": 10.0, "warmup_steps": 1000, "reduction": "sum", "temperature": 0.05, "divergence": "js", **changes})

    @classmethod
    def released(cls, **changes: Any) -> StructureRegularizer:
        return cls(
            **{"weight": 10.0, "warmup_steps": 1000, "reduction": "mean", "temperature": 0.05, "divergence": "released", "weighting": "none", **changes}
        )

    def current_weight(self) -> float | Tensor:
        """While it rises a tensor: its steps are counted where the module is, and nothing waits for them."""
        return self.weight * (self.steps / self.warmup_steps).clamp(max=1) if self.warmup_steps else self.weight

    def forward(self, *modalities: tuple[Tensor, Tensor]) -> Tensor:
        if not modalities:
            raise ValueError("StructureRegularizer: modalities must be one pair (source, aligned) or more, got none")
        weight = self.current_weight()
        if self.training:
            self.steps += 1
        if self.weight == 0:
            return modalities[0][1].new_zeros((), dtype=torch.promote_types(modalities[0][1].dtype, torch.float32))
        losses, masses = zip(*(structure_loss(source, aligned, return_diagonal_mass=True, **self.options) for source, aligned in modalities), strict=True)
        self.diagonal_mass = torch.stack(masses)
        total = sum(losses[1:], losses[0])
        return weight * (total / len(losses) if self.reduction == "mean" else total)

    def extra_repr(self) -> str:
        given = {"weight": self.weight, "warmup_steps": self.warmup_steps, "reduction": self.reduction, **self.options}
        return ", ".join(f"{key}={value}" for key, value in given.items())
