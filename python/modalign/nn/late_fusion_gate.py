"""A gate between an embedding and the picture's own features. [NoteLLM-2, 2024]"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LateFusionGate"]


class LateFusionGate(nn.Module):
    """``z * visual + (1 - z) * embedding`` with ``z = sigmoid(W [embedding; visual] + b)``, for each of the D numbers on its own.

    >>> import torch
    >>> LateFusionGate(width=8)(torch.randn(4, 8), torch.randn(4, 8)).shape
    torch.Size([4, 8])

    Parameters: width D. The call takes embedding and visual [..., D]. Put together from the paper's abstract."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * width, width)

    def forward(self, embedding: Tensor, visual: Tensor) -> Tensor:
        return torch.lerp(embedding, visual, torch.sigmoid(self.gate(torch.cat([embedding, visual], -1))))
