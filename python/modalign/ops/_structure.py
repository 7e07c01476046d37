"""Parts of `structure_loss` in plain torch: the vectors that are compared, divergences from logarithms, whole matrices, lists of neighbours."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._registration import accumulation_dtype
from .knn_values import knn_values
from .pairwise_logsumexp import pairwise_logsumexp

FLOOR = 1e-12  # of lengths and deviations
EPSILON = 1e-12  # of the released divergence


def unit(x: Tensor) -> Tensor:
    """Rows of length 1. Divided by their largest element first, so that squares neither overflow nor vanish; rows shorter than 1e-12 are 0, with gradient 0; NaN and
    infinity make their row NaN."""
    largest = x.detach().abs().amax(1, keepdim=True)
    there = ~(largest <= torch.finfo(x.dtype).tiny)
    scaled = x / torch.where(there, largest, 1)
    length = torch.where(there, scaled, 1).square().sum(1, keepdim=True).sqrt()
    return torch.where(there & ~(largest * length <= FLOOR), scaled / length, 0)


def centred(x: Tensor, centering: str) -> Tensor:
    if centering == "none":
        return x
    x = x - x.mean(0)
    if centering == "mean":
        return x
    variance = x.square().mean(0)
    there = variance > FLOOR**2
    return x / torch.where(there, variance, 1).sqrt()


def features(x: Tensor, centering: str, centering_first: bool, distance: str) -> Tensor:
    """What products are taken of, in the accumulation dtype."""
    x = x.to(accumulation_dtype(x.dtype)).contiguous()
    if distance == "spearman":
        ranks = x.detach().argsort(dim=1, stable=True).argsort(dim=1).to(x.dtype)
        x = torch.where(x.detach().isnan().any(1, keepdim=True), torch.nan, ranks)
    return unit(centred(x, centering)) if centering_first else centred(unit(x), centering)


# --------------------------------------------------------------------------------------------------------------------------------- divergences


def divergence_of_rows(log_p: Tensor, log_q: Tensor, divergence: str) -> Tensor:
    """[B] from logarithms of probabilities [B, n]; -inf for none."""
    p, q = log_p.exp(), log_q.exp()
    lowest = math.log(torch.finfo(p.dtype).tiny)
    log_p, log_q = log_p.clamp(min=lowest), log_q.clamp(min=lowest)
    if divergence == "js":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return (p * (log_p - log_m) + q * (log_q - log_m)).sum(1) / 2
    floor = torch.full_like(p, math.log(EPSILON))
    log_p, log_q = torch.logaddexp(log_p, floor), torch.logaddexp(log_q, floor)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (((p + q) / 2 + EPSILON) * (log_m - (log_p + log_q) / 2)).sum(1)


def rows_of_levels(x: Tensor, y: Tensor, levels: int, divergence: str, gamma: float | None) -> tuple[list[Tensor], Tensor]:
    """([B] for each level, mean of the diagonals of P and Q [2]) from whole matrices. `gamma`: logits exp(-gamma |x_i - x_j|^2) in place of products."""

    def logits(z: Tensor) -> Tensor:
        if gamma is None:
            return z @ z.mT
        square = z.square().sum(1)
        return (-gamma * (square[:, None] + square - 2 * z @ z.mT).clamp(min=0)).exp()

    log_p, log_q = (logits(z).log_softmax(1) for z in (x, y))
    mass = torch.stack([each.detach().diagonal().exp().mean() for each in (log_p, log_q)])
    found = [divergence_of_rows(log_p, log_q, divergence)]
    if levels > 1:
        p, q = log_p.exp(), log_q.exp()
        power_p, power_q = p, q
        for _ in range(levels - 1):
            power_p, power_q = power_p @ p, power_q @ q
            tiny = torch.finfo(p.dtype).tiny
            found.append(divergence_of_rows(power_p.clamp(min=tiny).log(), power_q.clamp(min=tiny).log(), divergence))
    return found, mass


# ----------------------------------------------------------------------------------------------------------------------------------- neighbours


def rows_of_neighbors(x: Tensor, y: Tensor, neighbors: Tensor, tail: bool, divergence: str) -> tuple[Tensor, Tensor]:
    """([B], [2]) with the probabilities of listed pairs [B, k]: true ones and the rest as one bucket (`tail`), or those of a softmax over the list."""
    own = neighbors == torch.arange(len(neighbors), device=neighbors.device)[:, None]
    sides, masses = [], []
    for z in (x, y):
        logits = knn_values(z, z, neighbors, metric="dot")
        if tail:
            log_p = logits - pairwise_logsumexp(z, z, logit_scale=1.0).rows[:, None]
            # A list that holds all has a rest of rounding: nothing below the digits of the log-sum-exp is called a probability.
            together = log_p.logsumexp(1, keepdim=True).clamp(max=-torch.finfo(z.dtype).eps)
            log_p = torch.cat([log_p, (-torch.expm1(together)).log()], 1)
        else:
            log_p = torch.where((neighbors < 0).all(1, keepdim=True), 0, logits).log_softmax(1) + 0 * z.sum(1, keepdim=True)   # an empty list has no divergence; NaN stays
        masses.append(torch.where(own, log_p[:, : own.shape[1]].detach().exp(), 0).sum(1).mean())
        sides.append(log_p)
    return divergence_of_rows(sides[0], sides[1], divergence), torch.stack(masses)
