"""Anchors by self-repellent random walks: rows that many walks reach, none near another. [CAPIMAC, IJCAI 2025; self-repellent walks: Doshi, Hu and Eun, ICML 2023]"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import knn
from ..ops._arguments import describe

__all__ = ["random_walk_visits", "self_repellent_anchors"]

PANEL_NUMBERS = 1 << 24
LEAST = 1e-4  # of a transition in the released code, whose power is infinite otherwise


def self_repellent_anchors(
    x: Tensor,
    count: int,
    *,
    variant: str = "srrw",
    alpha: float = 0.5,
    neighbors: int = 50,
    walks: int | None = None,
    length: int | None = None,
    radius: float | None = None,
    seed: int = 0,
) -> Tensor:
    r"""`count` rows of x as anchors, the most important first.

    Walks start at every row and go along similar rows; a row is as important as it is often visited. In the order of importance, a row that is not covered becomes an anchor and
    covers what lies within the radius; where all are covered, only anchors stay covered.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> clusters = torch.eye(4).repeat_interleave(25, 0) + 0.03 * torch.randn(100, 4)
    >>> sorted((self_repellent_anchors(clusters, 4) // 25).tolist())                      # one of each
    [0, 1, 2, 3]

    Parameters
    ----------
    x : Tensor [N, D]
        Features of one view; anchors of several views are the union of theirs.
    count : int
        1 to N.
    variant : "srrw" or "released"
        The transition i -> j of a walk that has been at j v_j times is as likely as

        ::

            srrw       P_ij ((1 + v_j) / mu_j)^-alpha       P: cosines of the `neighbors` nearest, scaled to 0 ... 1; mu_j: the share of j in all similarities
            released   P_ij^-alpha                          P: all cosines, scaled by the extremes of their column, the diagonal 0, at least 1e-4

        The second is what the released code does: once for all, whatever was visited, and so towards what is least similar.
    alpha : float
        0: the plain walk along P, for both.
    neighbors : int
        For "srrw": edges of a row, at most N - 1.
    walks, length : int, optional
        Walks of each row and their steps; default as published (20, 3), (10, 5), (5, 10), (3, 20) for N < 100, 1 000, 10 000 and more.
    radius : float, optional
        Euclidean; default 0.3 of the mean distance of two rows. 0 takes the most important rows.
    seed : int
        Draws are made on the CPU, so walks are the same on every device where similarities are.

    Returns
    -------
    Tensor int64 [count], all different.

    Raises
    ------
    TypeError, ValueError
        ``self_repellent_anchors: <argument> must ..., got ...``, in the name of `random_walk_visits` for what that takes. (The released code does not end where count > N.)

    Paper: "Incomplete and Unpaired Multi-View Graph Clustering ...", CAPIMAC, IJCAI 2025 (its text has the decay, its formula of visits does not); Doshi, Hu, Eun, "Self-Repellent Random
    Walks on General Graphs", ICML 2023.
    """
    op = "self_repellent_anchors"
    _check_features(op, x)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(x):
        raise ValueError(f"{op}: count must be from 1 to the number of rows, {len(x)}, got {count!r}")
    if radius is not None and not (isinstance(radius, (int, float)) and radius >= 0):
        raise ValueError(f"{op}: radius must be 0 or more, got {radius!r}")
    with torch.no_grad():
        visits = random_walk_visits(x, variant=variant, alpha=alpha, neighbors=neighbors, walks=walks, length=length, seed=seed)
        order = visits.sort(descending=True, stable=True).indices
        rows = x.double()
        reach = 0.3 * _mean_distance(rows) if radius is None else radius
        covered, chosen = torch.zeros(len(x), dtype=torch.bool, device=x.device), []
        taken = covered.clone()
        while len(chosen) < count:
            free = ~covered[order]
            if not bool(free.any()):
                covered = taken.clone()
                continue
            anchor = order[int(free.to(torch.uint8).argmax())]
            chosen.append(anchor)
            taken[anchor] = True
            if reach > 0:
                covered |= (rows - rows[anchor]).square().sum(1).sqrt() <= reach
            covered[anchor] = True
        return torch.stack(chosen)


def random_walk_visits(
    x: Tensor, *, variant: str = "srrw", alpha: float = 0.5, neighbors: int = 50, walks: int | None = None, length: int | None = None, seed: int = 0
) -> Tensor:
    """How often walks from all rows reach each row, without their starts: int64 [N]. Arguments of `self_repellent_anchors`."""
    op = "random_walk_visits"
    _check_features(op, x)
    if variant not in ("srrw", "released"):
        raise ValueError(f'{op}: variant must be "srrw" or "released", got {describe(variant)}')
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < math.inf:
        raise ValueError(f"{op}: alpha must be 0 or more, got {alpha!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"{op}: seed must be a whole number, got {seed!r}")
    N = len(x)
    published = (20, 3) if N < 100 else (10, 5) if N < 1000 else (5, 10) if N < 10_000 else (3, 20)
    walks, length = published[0] if walks is None else walks, published[1] if length is None else length
    for name, value in (("walks", walks), ("length", length), ("neighbors", neighbors)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{op}: {name} must be a whole number of 1 or more, got {value!r}")
    if N == 1:
        return x.new_full((1,), walks * length, dtype=torch.int64)
    to, share, rarity = _released(x, alpha) if variant == "released" else _similar_rows(x, min(neighbors, N - 1))
    repel = alpha if variant == "srrw" else 0.0
    generator = torch.Generator().manual_seed(seed)
    visits = torch.zeros(N, dtype=torch.int64, device=x.device)
    starts = torch.arange(N, device=x.device).repeat_interleave(walks)
    for here in starts.split(max(1, PANEL_NUMBERS // (share.shape[1] * (length if repel else 1)))):
        seen, at = [here], here
        for _ in range(length):
            candidates = to[at]
            weight = share[at]
            if repel:
                times = sum((candidates == earlier[:, None]).to(weight.dtype) for earlier in seen)
                weight = weight * ((1 + times) * rarity[candidates]) ** -repel
            total = weight.cumsum(1)
            draw = torch.rand(len(at), 1, generator=generator, dtype=torch.float64).to(x.device) * total[:, -1:]
            at = candidates.gather(1, torch.searchsorted(total, draw, right=True).clamp(max=total.shape[1] - 1))[:, 0]
            visits += at.bincount(minlength=N)
            seen.append(at)
    return visits


def _similar_rows(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row may go [N, k], how likely before anything was visited, and 1 / mu: the inverse share of every row in all similarities, both ways."""
    found = knn(x, k=k, exclude_self=True)
    weight = (1 + found.values.double()).clamp(min=0) / 2
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, 1)  # a row like no other goes anywhere on its list
    degree = weight.sum(1) + torch.zeros(len(x), dtype=torch.float64, device=x.device).index_add(0, found.indices.flatten(), weight.flatten())
    return found.indices, weight, degree.sum() / degree


def _released(x: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    cosine = unit @ unit.T
    low, high = cosine.amin(0), cosine.amax(0)
    scaled = (cosine - low) / (high - low).clamp(min=1e-12)
    scaled.fill_diagonal_(0)
    scaled = torch.where(scaled.sum(1, keepdim=True) > 0, scaled, 1)
    share = scaled / scaled.sum(1, keepdim=True)
    weight = share.clamp(min=LEAST) ** -alpha if alpha > 0 else share
    return torch.arange(len(x), device=x.device).expand(len(x), -1), weight, torch.ones(len(x), dtype=torch.float64, device=x.device)


def _mean_distance(x: Tensor) -> float:
    """Of two different rows."""
    total = sum(float(torch.cdist(rows, x).sum()) for rows in x.split(max(1, PANEL_NUMBERS // len(x))))
    return total / max(1, len(x) * (len(x) - 1))


def _check_features(op: str, x: object) -> None:
    if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point() or len(x) == 0:
        raise ValueError(f"{op}: x must be a floating-point matrix [N, D] with one row or more, got {describe(x)}")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{op}: x must be finite, got NaN or infinity")
