"""Centred kernel alignment. [Kornblith et al., ICML 2019; Platonic Representation Hypothesis, ICML 2024]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ops._arguments import describe
from ._neighbors import check_paired

__all__ = ["cka", "cka_rbf", "hsic_unbiased_of_sums", "unbiased_cka"]

ADDED = 1e-6  # to the denominator, as published
PANEL_ROWS = 512


def ratio(metric: str, cross: Tensor, own_x: Tensor, own_y: Tensor, X: Tensor, Y: Tensor) -> Tensor:
    if not bool((own_x != 0) & (own_y != 0)):
        raise ValueError(f"{metric}: X and Y must vary over their rows, got constant ones")
    dtype = torch.promote_types(torch.float32, torch.promote_types(X.dtype, Y.dtype))
    return (cross / ((own_x * own_y).clamp(min=0).sqrt() + ADDED)).to(dtype)


def cka(X: Tensor, Y: Tensor) -> Tensor:
    """Linear CKA: ``|Xc' Yc|^2 / (|Xc' Xc| |Yc' Yc| + 1e-6)`` with Frobenius norms and centred columns. From 0 to 1; 1 for turned and scaled copies.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    >>> cka(x, -3 * x.flip(1))
    tensor(1.)

    X [n, D], Y [n, E]: row i of both is the same item, n of 2 or more. Differentiable. Sums in float64; n D E FLOP, no matrix n x n. Raises ValueError and TypeError for
    other shapes and for constant rows. HSIC with uncentred products, which it centres itself, is the same number.
    """
    x, y = (each.double() - each.double().mean(0) for each in check_paired("cka", X, Y))
    cross, own_x, own_y = ((a.mT @ b).square().sum() for a, b in ((x, y), (x, x), (y, y)))
    return ratio("cka", cross, own_x, own_y, X, Y)


def hsic_unbiased_of_sums(product: Tensor, sum_k: Tensor, sum_l: Tensor, sum_kl: Tensor, n: int) -> Tensor:
    """The unbiased estimate from sum K_ij L_ji, sum K, sum L and sum (K L), all without diagonals."""
    return (product + sum_k * sum_l / ((n - 1) * (n - 2)) - 2 * sum_kl / (n - 2)) / (n * (n - 3))


def unbiased_cka(X: Tensor, Y: Tensor) -> Tensor:
    """Linear CKA from unbiased estimates of HSIC: near 0 for unrelated spaces of any width, where `cka` is not. At most 1, may be below 0.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(50, 500), torch.randn(50, 500)
    >>> bool(cka(x, y) > 0.8), bool(unbiased_cka(x, y).abs() < 0.1)
    (True, True)

    As `cka`, with n of 4 or more. ``sum K o L`` without the diagonal is ``|X'Y|^2 - sum |x_i|^2 |y_i|^2``, and row sums are ``X (X'1)`` less it: no matrix n x n.
    """
    x, y = (each.double() - each.double().mean(0) for each in check_paired("unbiased_cka", X, Y, fewest=4))  # which changes nothing and keeps digits

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        square_a, square_b = a.square().sum(1), b.square().sum(1)
        rows_a, rows_b = a @ a.sum(0) - square_a, b @ b.sum(0) - square_b
        return hsic_unbiased_of_sums((a.mT @ b).square().sum() - (square_a * square_b).sum(), rows_a.sum(), rows_b.sum(), rows_a @ rows_b, len(a))

    return ratio("unbiased_cka", hsic(x, y), hsic(x, x), hsic(y, y), X, Y)


def cka_rbf(X: Tensor, Y: Tensor, sigma: float | str = 1.0, *, unbiased: bool = False) -> Tensor:
    """CKA with the kernel ``exp(-|x_i - x_j|^2 / (2 sigma^2))``.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    >>> cka_rbf(x, x.flip(1))
    tensor(1.0000)

    sigma: a number, or "median": its square is the median of all squared distances, the diagonal's zeros included (this stores them, n^2 numbers). Otherwise panels
    of rows and memory linear in n, in training too. As `cka` in all else.
    """
    x, y = (each.double() - each.double().mean(0) for each in check_paired("cka_rbf", X, Y, fewest=4 if unbiased else 2))
    if sigma != "median" and (isinstance(sigma, (bool, str)) or not isinstance(sigma, (int, float)) or not sigma > 0):
        raise ValueError(f'cka_rbf: sigma must be a positive number or "median", got {describe(sigma)}')
    squares, n = [each.square().sum(1) for each in (x, y)], len(x)
    widths = [2 * torch.cdist(each, each).square().median().detach() if sigma == "median" else 2 * sigma**2 for each in (x, y)]

    def panel(start: int, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        here = slice(start, start + PANEL_ROWS)
        kernels = []
        for z, square, width in zip((a, b), squares, widths, strict=True):
            distance = (square[here, None] + square - 2 * z[here] @ z.mT).clamp(min=0)
            distance = distance.diagonal_scatter(torch.zeros_like(square[here]), start)
            kernel = (-distance / width).exp()
            kernels.append(kernel.diagonal_scatter(torch.zeros_like(square[here]), start) if unbiased else kernel)
        k, m = kernels
        return (k * m).sum(), k.square().sum(), m.square().sum(), k.sum(1), m.sum(1)

    found: list[Any] = [checkpoint(panel, start, x, y, use_reentrant=False) for start in range(0, n, PANEL_ROWS)]
    cross, own_x, own_y = (torch.stack(parts).sum() for parts in list(zip(*found, strict=True))[:3])
    rows_x, rows_y = (torch.cat(parts) for parts in list(zip(*found, strict=True))[3:])

    def hsic(product: Tensor, r: Tensor, s: Tensor) -> Tensor:
        if unbiased:
            return hsic_unbiased_of_sums(product, r.sum(), s.sum(), r @ s, n)
        return product - 2 / n * (r @ s) + r.sum() * s.sum() / n**2

    return ratio("cka_rbf", hsic(cross, rows_x, rows_y), hsic(own_x, rows_x, rows_x), hsic(own_y, rows_y, rows_y), X, Y)
