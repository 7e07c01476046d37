"""Gram-Schmidt run twice, in plain torch: the factorisation behind the references and behind the path for more vectors than a kernel takes."""

from __future__ import annotations

import torch
from torch import Tensor

DEPENDENT = 16.0  # a vector whose residual is at most this many eps_m of its own length is dependent on those before it
NOISE = 8.0  # an anchor's residual of at most this many eps_m of its length is rounding noise


def squared_length(vectors: Tensor) -> Tensor:
    return (vectors * vectors).sum(-1)


def safe_sqrt(square: Tensor, positive: Tensor) -> Tensor:
    """sqrt where `positive`, and 0 with gradient 0 elsewhere (NaN stays NaN where `positive` says so)."""
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)


def negligible(square: Tensor, bound: Tensor) -> Tensor:
    """square <= bound, but False for NaN and Inf: these go on to make their row or column NaN instead of a finite 0."""
    return (square <= bound) & (square < torch.inf)


def orthonormalize(vectors: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Q [..., m, D] with orthonormal rows and L [..., m, m] lower triangular with vectors = L Q, for vectors [..., m, D]; present is bool [..., m].

    An absent vector leaves a zero row in Q and a row of the identity in L, and its content is never read into anything. A dependent one leaves
    zeros on its row of Q and on the diagonal of L. A NaN stays NaN. Everything is made of differentiable steps, none in place."""
    m = vectors.shape[-2]
    eps_m = torch.finfo(vectors.dtype).eps
    rows: list[Tensor] = []
    lower: list[list[Tensor]] = []
    for p in range(m):
        vector = vectors[..., p, :]
        here = torch.ones_like(vector[..., 0], dtype=torch.bool) if present is None else present[..., p]
        vector = torch.where(here.unsqueeze(-1), vector, 0)
        length_squared = squared_length(vector)
        coefficients = [torch.zeros_like(length_squared) for _ in range(m)]
        residual = vector
        for _ in range(2):
            for q in range(p):
                along = (rows[q] * residual).sum(-1)
                residual = residual - along.unsqueeze(-1) * rows[q]
                coefficients[q] = coefficients[q] + along
        residual_squared = squared_length(residual)
        independent = ~negligible(residual_squared, (DEPENDENT * eps_m) ** 2 * length_squared)
        norm = safe_sqrt(residual_squared, independent)
        rows.append(torch.where(independent.unsqueeze(-1), residual / torch.where(independent, norm, 1).unsqueeze(-1), 0))
        coefficients[p] = torch.where(here, norm, 1)
        lower.append(coefficients)
    return torch.stack(rows, -2), torch.stack([torch.stack(row, -1) for row in lower], -2)


def solve_transposed(lower: Tensor, right: Tensor) -> Tensor:
    """L^-T right for L [..., m, m] lower triangular and right [..., m, D]; a zero on the diagonal counts as 1, the caller drops what comes of it."""
    m = lower.shape[-1]
    solved: list[Tensor] = [right] * m
    for p in reversed(range(m)):
        row = right[..., p, :]
        for q in range(p + 1, m):
            row = row - lower[..., q, p].unsqueeze(-1) * solved[q]
        diagonal = lower[..., p, p].unsqueeze(-1)
        solved[p] = row / torch.where(diagonal == 0, 1, diagonal)
    return torch.stack(solved, -2)


def unit(vectors: Tensor) -> Tensor:
    """Rows of unit length; a zero row stays zero and has zero gradient. Computed in float32 (float64), returned in the input dtype.

    The division by the largest entry keeps squares in range. It is a constant for autograd, which is exact: the direction does not depend on it."""
    real = vectors if vectors.dtype is torch.float64 else vectors.float()
    largest = real.detach().abs().amax(-1, keepdim=True)
    some = largest != 0
    scaled = real / torch.where(some, largest, 1)
    length = safe_sqrt(squared_length(scaled), some.squeeze(-1)).unsqueeze(-1)
    return torch.where(some, scaled / torch.where(some, length, 1), 0).to(vectors.dtype)


def root_of_volume(volume: Tensor, count: Tensor | int) -> Tensor:
    """volume ** (1 / count), 0 with gradient 0 where the volume is 0, 1 where nothing is counted. `count` broadcasts against volume."""
    real = volume if volume.dtype is torch.float64 else volume.float()
    exponent = 1.0 / torch.as_tensor(count, device=volume.device).clamp(min=1).to(real.dtype)
    some = real != 0
    return torch.where(some, torch.where(some, real, 1).pow(exponent), 0).to(volume.dtype)
