"""Rotary embedding, as the ops and modules that turn vectors share it. [RoFormer, 2021]"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotary_tables", "turned"]


def rotary_tables(positions: Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [..., N, width / 2] of the angles ``position base^(-2 f / width)``; these are in float64, so that far positions keep their digits."""
    frequencies = base ** (torch.arange(width // 2, dtype=torch.float64, device=positions.device) * (-2 / width))
    angle = positions.double()[..., None] * frequencies
    return angle.cos().to(dtype), angle.sin().to(dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Entries f and f + D / 2 of vectors [..., D], turned against each other."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
