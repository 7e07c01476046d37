"""Similarity of neighbourhood walks: the STRUCTURE regularizer as a score, and CKA over several hops. [STRUCTURE, NeurIPS 2025]"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import _structure as structure
from ..ops._arguments import describe
from ._neighbors import check_paired
from .cka import ratio

__all__ = ["hcs", "l_hop_cka"]


def check_levels(metric: str, levels: object) -> int:
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 1:
        raise ValueError(f"{metric}: levels must be a whole number of 1 or more, got {describe(levels)}")
    return levels


def hcs(X: Tensor, Y: Tensor, levels: int = 3, *, temperature: float = 0.05, reduction: str = "sum", centering: str = "mean") -> Tensor:
    """``exp(-1/L sum_l JS(P^l, Q^l) / l)`` with the matrices of `ops.structure_loss`: 1 for equal neighbourhoods.

    >>> import torch
    >>> hcs(torch.eye(4), -torch.eye(4))
    tensor(1.)

    reduction: the divergence summed over rows, as released (nearly 0 for large n), or their "mean". centering: "mean" of the unit vectors; "released": the mean of the
    vectors as they are is taken off the unit ones; "none". X [n, D], Y [n, E]. Differentiable; matrices n x n. Raises ValueError and TypeError.
    """
    x, y = check_paired("hcs", X, Y)
    check_levels("hcs", levels)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise ValueError(f"hcs: temperature must be a positive number, got {describe(temperature)}")
    for name, value, choices in (("reduction", reduction, ("sum", "mean")), ("centering", centering, ("mean", "released", "none"))):
        if value not in choices:
            raise ValueError(f"hcs: {name} must be one of {', '.join(choices)}, got {value!r}")
    sides = []
    for each in (x, y):
        z = structure.unit(each.to(torch.promote_types(each.dtype, torch.float32)))
        z = z - z.mean(0) if centering == "mean" else z - each.to(z.dtype).mean(0) if centering == "released" else z
        sides.append(z * temperature**-0.5)
    dtype = torch.promote_types(sides[0].dtype, sides[1].dtype)
    rows, _ = structure.rows_of_levels(sides[0].to(dtype), sides[1].to(dtype), levels, "js", None)
    parts = [(row.sum() if reduction == "sum" else row.mean()) / level for level, row in enumerate(rows, 1)]
    return (-sum(parts[1:], parts[0]) / levels).exp()


def l_hop_cka(X: Tensor, Y: Tensor, levels: int = 3) -> Tensor:
    """The mean over l of the CKA of the l-th powers of the matrices of inner products, K = X X'.

    >>> import torch
    >>> l_hop_cka(torch.eye(4), -torch.eye(4))
    tensor(1.0000)

    X [n, D], Y [n, E]. Differentiable; matrices n x n, n^3 FLOP for each level. Raises as `cka`.
    """
    x, y = check_paired("l_hop_cka", X, Y)
    check_levels("l_hop_cka", levels)

    def scaled(K: Tensor) -> Tensor:  # a scale changes nothing, and powers stay in range
        return K / K.detach().abs().max().clamp(min=torch.finfo(K.dtype).tiny)

    kernels = [scaled(each.double() @ each.double().mT) for each in (x, y)]
    powers, found = list(kernels), []
    for level in range(levels):
        if level:
            powers = [scaled(power @ kernel) for power, kernel in zip(powers, kernels, strict=True)]
        k, m = (power - power.mean(0) - power.mean(1, keepdim=True) + power.mean() for power in powers)
        found.append(ratio("l_hop_cka", (k * m).sum(), k.square().sum(), m.square().sum(), X, Y))
    return torch.stack(found).mean()
