"""Which neighbours a map invents, and which it loses. [Venna and Kaski, 2001; logged by STRUCTURE, NeurIPS 2025]"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import knn
from ..ops._arguments import describe
from ._neighbors import check_paired

__all__ = ["continuity", "trustworthiness"]

ROWS = 256  # whose full order is looked at together


def trustworthiness(X: Tensor, Z: Tensor, k: int = 10, *, metric: str = "euclidean") -> Tensor:
    r"""``1 - 2 / (n k (2n - 3k - 1)) sum_i sum_j max(rank_X(i, j) - k, 0)`` over the k nearest j of i in Z: neighbours in Z that were far in X.

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [2.0], [4.0], [8.0], [9.0], [11.0], [15.0]])
    >>> trustworthiness(x, x, 2), continuity(x, x[[7, 1, 2, 3, 4, 5, 6, 0]], 2) < 1
    (tensor(1.), tensor(True))

    Parameters
    ----------
    X : Tensor [n, D]
        Before, such as features of an encoder.
    Z : Tensor [n, E]
        The same items after, such as behind a head.
    k : int
        1 or more, less than (2n - 1) / 3.
    metric : str
        Of `ops.knn`; rank 1 is the nearest other point, equally near ones go by index. A point is left out by its index, not as the first of a list.

    Returns
    -------
    Tensor scalar, float32 (float64 for float64): 1 where nothing is invented. Not differentiable.

    Raises
    ------
    TypeError, ValueError
        ``trustworthiness: <argument> must ..., got ...``.

    The order of a panel of rows is found at a time, only for rows with neighbours that were not neighbours before. [Venna, Kaski, ICANN 2001]
    """
    return _preserved("trustworthiness", "Z", X, Z, k, metric)


def continuity(X: Tensor, Z: Tensor, k: int = 10, *, metric: str = "euclidean") -> Tensor:
    """`trustworthiness` with X and Z exchanged: neighbours in X that are far in Z."""
    return _preserved("continuity", "Z", Z, X, k, metric)


def _preserved(name: str, second: str, X: Tensor, Z: Tensor, k: int, metric: str) -> Tensor:
    x, z = (each.detach() for each in check_paired(name, X, Z))
    n = len(x)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{name}: k must be a whole number, got {describe(k)}")
    if not (k >= 1 and 3 * k < 2 * n - 1):
        raise ValueError(f"{name}: k must be 1 or more and less than (2n - 1) / 3 = {(2 * n - 1) / 3:.4g}, got {k}")
    near_x, near_z = (knn(each, k=k, metric=metric, exclude_self=True).indices for each in (x, z))
    sorted_x = near_x.sort(1).values
    place = torch.searchsorted(sorted_x, near_z).clamp(max=k - 1)
    invented = (sorted_x.gather(1, place) != near_z) & (near_z >= 0)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in invented.any(1).nonzero()[:, 0].split(ROWS):
        order = knn(x[rows], x, n, metric=metric, query_ids=rows).indices[:, : n - 1]  # any k; the last is the row itself, left out
        rank = torch.full((len(rows), n + 1), n, dtype=torch.int64, device=x.device).scatter(1, order.where(order >= 0, n), torch.arange(1, n, device=x.device).expand_as(order))
        total += torch.where(invented[rows], rank.gather(1, near_z[rows].clamp(min=0)) - k, 0).sum()
    return (1 - 2 / (n * k * (2 * n - 3 * k - 1)) * total).to(torch.promote_types(torch.float32, torch.promote_types(X.dtype, Z.dtype)))
