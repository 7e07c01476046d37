"""How much of one space an orthogonal map of the other makes. [orthogonal Procrustes; Schoenemann 1966]"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._arguments import check_flag
from ._neighbors import check_paired

__all__ = ["procrustes"]


def procrustes(X: Tensor, Y: Tensor, *, scale_free: bool = False) -> Tensor:
    """``1 - sqrt(|Xc|^2 + |Yc|^2 - 2 |Xc' Yc|_*) / |Yc|``: 1 less the relative error of the best turned copy of X. 1 for turned copies, unbounded below, not symmetric.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    >>> procrustes(x, x.flip(1)), procrustes(x, 3 * x, scale_free=True)
    (tensor(1.), tensor(1.))

    scale_free: ``|Xc' Yc|_* / (|Xc| |Yc|)`` instead, 0 to 1 and symmetric. Columns are centred; the narrower space counts as padded with zeros. X [n, D], Y [n, E].
    Differentiable where the singular values of Xc' Yc are positive. Computed in float64. Raises ValueError and TypeError for other shapes and constant rows.
    """
    check_flag("procrustes", "scale_free", scale_free)
    x, y = (each.double() - each.double().mean(0) for each in check_paired("procrustes", X, Y))
    nuclear, square_x, square_y = torch.linalg.svdvals(x.mT @ y).sum(), x.square().sum(), y.square().sum()
    if not bool((square_x > 0) & (square_y > 0)):
        raise ValueError("procrustes: X and Y must vary over their rows, got constant ones")
    if scale_free:
        found = nuclear / (square_x * square_y).sqrt()
    else:
        square = square_x + square_y - 2 * nuclear
        # Below rounding the square is 0, and so is the gradient of its root.
        there = square > 16 * torch.finfo(torch.float64).eps * (square_x + square_y)
        found = 1 - torch.where(there, square, 1).sqrt() * there / square_y.sqrt()
    return found.to(torch.promote_types(torch.float32, torch.promote_types(X.dtype, Y.dtype)))
