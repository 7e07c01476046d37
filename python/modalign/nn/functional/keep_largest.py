"""The k largest entries of every row, the others 0."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import _arguments as arguments
from ...ops._selection import smallest

__all__ = ["keep_largest"]


def keep_largest(x: Tensor, k: int) -> Tensor:
    """`x` with everything but the k largest entries of each row set to 0; of equal ones the first stay.

    >>> import torch
    >>> keep_largest(torch.tensor([[1.0, 3.0, 2.0, 2.0]]), 2)
    tensor([[0., 3., 2., 0.]])

    Parameters: x float [B, V], k from 1 to V. Returns [B, V] in the dtype of x. Differentiable in what stays. A NaN does not stay while there are k others.

    Raises TypeError and ValueError, ``keep_largest: <argument> must ..., got ...``."""
    op = "keep_largest"
    x = arguments.check_vectors(op, "x", x, "[B, V]")
    if x.dim() != 2:
        raise ValueError(f"{op}: x must have 2 dimensions [B, V], got {arguments.describe(x)}")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= x.shape[1]:
        raise ValueError(f"{op}: k must be a whole number from 1 to V = {x.shape[1]}, got {arguments.describe(k)}")
    _, indices = smallest(-x.detach(), k)
    return torch.where(torch.zeros_like(x, dtype=torch.bool).scatter(1, indices, True), x, 0)
