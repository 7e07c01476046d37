"""How often a neighbour's neighbour in the other space leads back. [Platonic Representation Hypothesis, ICML 2024]"""

from __future__ import annotations

import torch
from torch import Tensor

from ._neighbors import check_paired, neighbor_count, neighbor_lists

__all__ = ["cycle_knn"]


def cycle_knn(X: Tensor, Y: Tensor, k: int | str = 10, *, normalize: bool = True) -> Tensor:
    """The share of items i that are a neighbour by X of one of their neighbours by Y. float32 scalar, 0 to 1; not differentiable.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> cycle_knn(x, x, 1)
    tensor(1.)

    Arguments and errors as for `mutual_knn`. Memory n k.
    """
    x, y = check_paired("cycle_knn", X, Y)
    count = neighbor_count("cycle_knn", k, len(x))
    by_x, by_y = (neighbor_lists(each, count, normalize) for each in (x, y))
    own, back = torch.arange(len(x), device=x.device)[:, None], torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for place in range(count):
        back |= ((by_x[by_y[:, place]] == own) & (by_y[:, place : place + 1] >= 0)).any(1)
    return back.float().mean()
