"""Several losses as one, with weights that are learned. [Kendall, Gal and Cipolla, CVPR 2018; MCLEA, COLING 2022]"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["UncertaintyWeighting"]


class UncertaintyWeighting(nn.Module):
    r"""``sum_i exp(-v_i) L_i + v_i`` with a parameter v_i for each loss, 0 at first.

    A loss that stays large is given a smaller weight, and v_i keeps the weight from going to 0. At the best v_i the weight is 1 / L_i.

    >>> import torch
    >>> UncertaintyWeighting(2)([torch.tensor(1.0), torch.tensor(3.0)]).item()
    4.0
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"UncertaintyWeighting: count must be a whole number of 1 or more, got {count!r}")
        self.log_variance = nn.Parameter(torch.zeros(count))

    def forward(self, losses: Sequence[Tensor]) -> Tensor:
        if len(losses) != len(self.log_variance):
            raise ValueError(f"UncertaintyWeighting: losses must be {len(self.log_variance)} scalars, got {len(losses)}")
        if any(loss.numel() != 1 for loss in losses):
            raise ValueError(f"UncertaintyWeighting: losses must be scalars, got {[list(loss.shape) for loss in losses]}")
        return sum((loss.reshape(()) * torch.exp(-v) + v for loss, v in zip(losses, self.log_variance, strict=True)), start=self.log_variance.new_zeros(()))

    def extra_repr(self) -> str:
        return str(len(self.log_variance))
