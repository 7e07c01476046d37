"""Prototypes that two modalities share, with their loss. [MGCA, NeurIPS 2022]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops._gram_schmidt import unit
from .functional.prototype_alignment_loss import prototype_alignment_loss

__all__ = ["PrototypeAlignment"]


class PrototypeAlignment(nn.Module):
    """`nn.functional.prototype_alignment_loss` with prototypes of its own, made unit length at every use. [MGCA, NeurIPS 2022]

    >>> import torch
    >>> loss = PrototypeAlignment(8, count=5, generator=torch.Generator().manual_seed(0))
    >>> loss.frozen = True                                      # for the first epoch, as published
    >>> loss(torch.eye(8), torch.eye(8)).requires_grad
    False

    Parameters: width D; count K of prototypes, drawn at random directions, from `generator` if there is one; frozen: they take part but get no gradient, an
    attribute that may be set at any time; any further option of the function. The call takes x and y [B, D] and may override options. Raises ValueError for
    sizes below 1."""

    def __init__(self, width: int, *, count: int = 500, frozen: bool = False, generator: torch.Generator | None = None, **options: Any) -> None:
        super().__init__()
        for name, size in (("width", width), ("count", count)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"PrototypeAlignment: {name} must be a whole number of at least 1, got {size!r}")
        self.prototypes = nn.Parameter(unit(torch.randn(count, width, generator=generator)))
        self.frozen, self.options = frozen, options

    def forward(self, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        prototypes = self.prototypes.detach() if self.frozen else self.prototypes
        return prototype_alignment_loss(x, y, prototypes, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join([f"frozen={self.frozen}", *(f"{key}={value}" for key, value in self.options.items())])
