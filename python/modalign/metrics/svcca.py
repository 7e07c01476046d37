"""Canonical correlation of the leading directions of two spaces. [SVCCA, NeurIPS 2017]"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._arguments import describe
from ._neighbors import check_paired

__all__ = ["pwcca", "svcca"]


def standardised(x: Tensor) -> Tensor:
    """Columns of mean 0 and variance 1; constant ones stay 0."""
    x = x.double() - x.double().mean(0)
    deviation = x.square().mean(0).sqrt()
    return torch.where(deviation > 0, x / torch.where(deviation > 0, deviation, 1), 0)


def left_vectors(metric: str, name: str, x: Tensor, q: int) -> Tensor:
    """The q leading left singular vectors, by the eigenvectors of the smaller Gram matrix."""
    gram = x.mT @ x if x.shape[1] <= len(x) else x @ x.mT
    values, vectors = torch.linalg.eigh(gram)
    rank = int((values > values[-1] * max(x.shape) * torch.finfo(x.dtype).eps).sum())
    if rank < q:
        raise ValueError(f"{metric}: q must be at most the rank of {name}, {rank}, got {q}")
    leading = vectors[:, -q:]
    return x @ leading / values[-q:].sqrt() if x.shape[1] <= len(x) else leading


def svcca(X: Tensor, Y: Tensor, q: int = 10) -> Tensor:
    """The mean canonical correlation of the q leading directions of both spaces: the mean singular value of Ux' Uy, U the left singular vectors of the standardised columns.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(50, 4)
    >>> svcca(x, x @ torch.randn(4, 4), 4)
    tensor(1.)

    X [n, D], Y [n, E]; q at most the ranks and n - 1 (published 10). From 0 to 1; float32 (float64 if X or Y is), computed in float64. Deterministic, where released code draws a random
    sketch. Differentiable where the q-th and the next singular value differ. Raises ValueError and TypeError.
    """
    x, y = check_paired("svcca", X, Y)
    if isinstance(q, bool) or not isinstance(q, int) or q < 1:
        raise ValueError(f"svcca: q must be a whole number of 1 or more, got {describe(q)}")
    bases = [left_vectors("svcca", name, standardised(each), q) for name, each in (("X", x), ("Y", y))]
    return torch.linalg.svdvals(bases[0].mT @ bases[1]).clamp(max=1).mean().to(torch.promote_types(torch.float32, torch.promote_types(X.dtype, Y.dtype)))


def pwcca(X: Tensor, Y: Tensor, ridge: float = 1e-6) -> Tensor:
    """The canonical correlations of X and Y, weighted by how much of X each canonical variate carries: ``w_i = sum_j |<h_i, x_j>|`` over the columns of X.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(50, 4)
    >>> pwcca(x, x @ torch.randn(4, 4))
    tensor(1.0000)

    ridge: added to the diagonals of both covariances. Not symmetric. The variates are those of the smaller rank, at most n - 1. Raises as `svcca`. [Morcos et al., NeurIPS 2018]
    """
    x, y = (each.double() - each.double().mean(0) for each in check_paired("pwcca", X, Y))
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or ridge < 0:
        raise ValueError(f"pwcca: ridge must be a number of 0 or more, got {describe(ridge)}")
    whitened = []
    for z in (x, y):
        values, vectors = torch.linalg.eigh(z.mT @ z / len(z))
        kept = values > values[-1] * max(z.shape) * torch.finfo(z.dtype).eps
        if not bool(kept.any()):
            raise ValueError("pwcca: X and Y must vary over their rows, got constant ones")
        whitened.append(z @ vectors[:, kept] / (values[kept] + ridge).sqrt() / len(z) ** 0.5)
    left, correlations, _ = torch.linalg.svd(whitened[0].mT @ whitened[1], full_matrices=False)
    count = min(len(correlations), len(x) - 1)
    variates = whitened[0] @ left[:, :count]
    weights = (variates.mT @ x).abs().sum(1)
    found = (weights * correlations[:count].clamp(max=1)).sum() / weights.sum()
    return found.to(torch.promote_types(torch.float32, torch.promote_types(X.dtype, Y.dtype)))
