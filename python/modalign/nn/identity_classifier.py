"""The classifier of identities that both modalities share. [IRRA, CVPR 2023]"""

from __future__ import annotations

from torch import Tensor, nn

from .functional import id_loss

__all__ = ["IdentityClassifier"]


class IdentityClassifier(nn.Linear):
    """`functional.id_loss` with its classifier: weight [identities, width] from N(0, 0.001), bias 0, as published.

    >>> import torch
    >>> classifier = IdentityClassifier(width=8, identities=100)
    >>> classifier(torch.zeros(4, 8), torch.zeros(4, 8), torch.arange(4))                      # log 100
    tensor(4.6052, grad_fn=<DivBackward0>)

    Parameters: width D, identities K. The call takes x, y [B, D] and ids int64 [B]; errors are those of `functional.id_loss`."""

    def __init__(self, width: int, identities: int) -> None:
        super().__init__(width, identities)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.001)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        return id_loss(x, y, ids, self.weight, self.bias)
