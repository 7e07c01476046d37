"""The share of neighbours that two spaces have in common. [Platonic Representation Hypothesis, ICML 2024]"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._arguments import describe
from ._neighbors import check_paired, in_common, neighbor_count, neighbor_lists

__all__ = ["knn_overlap", "mutual_knn", "without_outliers"]


def mutual_knn(X: Tensor, Y: Tensor, k: int | str = 10, *, normalize: bool = True, clamp_quantile: float | None = None, exact_quantile: bool = False) -> Tensor:
    r"""``1/n sum_i |N_k(x_i) and N_k(y_i)| / k``, N_k the k nearest others of a row in its own space.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> mutual_knn(x, x @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), 1)
    tensor(1.)

    Parameters
    ----------
    X, Y : Tensor [n, D], [n, E]
        Row i of both is the same item.
    k : int, "rice", "sqrt" or "sturges"
        1 to n - 1. Rules of thumb: ``ceil(2 n^(1/3))``, ``ceil(sqrt n)``, ``ceil(log2 n + 1)``, at most n - 1.
    normalize : bool
        Neighbours by cosine; False: by inner product.
    clamp_quantile : float, optional
        First clamp elements to this quantile of their absolute values, the mean of the rows' quantiles; published 0.95.
    exact_quantile : bool
        The quantile of all elements at once instead.

    Returns
    -------
    Tensor scalar from 0 to 1, float32 (float64 if X or Y is). Unrelated spaces give k / (n - 1) in expectation. Not differentiable. Equal similarities go by index: constant
    features have the lowest indices for neighbours, and agree with themselves.

    Raises
    ------
    TypeError, ValueError
        ``mutual_knn: <argument> must ..., got ...``.

    Paper: Huh, Cheung, Wang, Isola, "The Platonic Representation Hypothesis", ICML 2024, section 2; memory n k, and no mask n x n.
    """
    x, y = check_paired("mutual_knn", X, Y)
    count = neighbor_count("mutual_knn", k, len(x))
    if clamp_quantile is not None:
        x, y = (without_outliers("mutual_knn", each, clamp_quantile, exact_quantile) for each in (x, y))
    return knn_overlap(*(neighbor_lists(each, count, normalize) for each in (x, y))).to(torch.promote_types(torch.float32, torch.promote_types(x.dtype, y.dtype)))


def knn_overlap(a: Tensor, b: Tensor) -> Tensor:
    """The mean share of the entries of each list [n, k] that the other has as well; -1 is no entry. float64 scalar.

    >>> import torch
    >>> knn_overlap(torch.tensor([[1, 2], [0, 2], [0, 1]]), torch.tensor([[2, 1], [2, 3], [3, 4]]))
    tensor(0.5000, dtype=torch.float64)
    """
    for name, each in (("a", a), ("b", b)):
        if not isinstance(each, Tensor) or each.dtype is not torch.int64 or each.dim() != 2 or each.numel() == 0:
            raise ValueError(f"knn_overlap: {name} must be an int64 tensor [n, k], got {describe(each)}")
    if a.shape != b.shape or a.device != b.device:
        raise ValueError(f"knn_overlap: b must have the shape of a {list(a.shape)} and its device, got {describe(b)}")
    return in_common(a, b.sort(1).values).sum().double() / a.numel()


def without_outliers(metric: str, x: Tensor, quantile: float, exact: bool) -> Tensor:
    """Elements clamped to a quantile of their absolute values."""
    if isinstance(quantile, bool) or not isinstance(quantile, (int, float)) or not 0 < quantile <= 1:
        raise ValueError(f"{metric}: clamp_quantile must be above 0 and at most 1, got {quantile!r}")
    size = x.detach().abs().to(torch.promote_types(x.dtype, torch.float32))
    if exact:  # torch.quantile takes 2^24 elements
        place = quantile * (size.numel() - 1)
        low = size.flatten().sort().values
        limit = torch.lerp(low[int(place)], low[min(int(place) + 1, size.numel() - 1)], place - int(place))
    else:
        limit = torch.quantile(size, quantile, dim=1).mean()
    return x.clamp(-limit.to(x.dtype), limit.to(x.dtype))
