"""Is a similarity more than chance gives? Calibration by permuted pairs. [The Aristotelian View, 2026]"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops._arguments import describe
from ._neighbors import check_paired, neighbor_count, neighbor_lists
from .alignment_score import ALIGNMENT_SCORES, alignment_score
from .mutual_knn import knn_overlap

__all__ = ["NullCalibration", "calibrated", "null_calibration"]


class NullCalibration(NamedTuple):
    """score: as it is; threshold: what chance stays below with probability 1 - alpha; calibrated: 0 up to the threshold, 1 at the largest possible score; p_value."""

    score: float
    threshold: float
    calibrated: float
    p_value: float


def calibrated(score: float, null: Tensor, alpha: float, maximum: float) -> NullCalibration:
    """From the scores of K permutations: threshold the ceil((1 - alpha) (K + 1))-th smallest of them and the score, p = (1 + #{null >= score}) / (K + 1)."""
    everything = torch.cat([null.double().cpu(), torch.tensor([score], dtype=torch.float64)]).sort().values
    threshold = float(everything[min(len(everything), math.ceil(round((1 - alpha) * len(everything), 9))) - 1])
    above = (score - threshold) / (maximum - threshold) if maximum > threshold else 0.0
    return NullCalibration(score, threshold, min(max(above, 0.0), 1.0), (1 + int((null.double() >= score).sum())) / len(everything))


def check_calibration(name: str, permutations: object, alpha: object) -> None:
    if isinstance(permutations, bool) or not isinstance(permutations, int) or permutations < 1:
        raise ValueError(f"{name}: permutations must be a whole number of 1 or more, got {describe(permutations)}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1:
        raise ValueError(f"{name}: alpha must be between 0 and 1, got {describe(alpha)}")


def permuted(lists: Tensor, order: Tensor) -> Tensor:
    """The neighbour lists of rows in another order: those of row order[i] in place i, under the new names of their entries."""
    return torch.argsort(order)[lists[order]]


def null_calibration(
    score: str | Callable[[Tensor, Tensor], Any],
    X: Tensor,
    Y: Tensor,
    *,
    permutations: int = 200,
    alpha: float = 0.05,
    maximum: float = 1.0,
    seed: int = 0,
    topk: int | str = 10,
    **options: Any,
) -> NullCalibration:
    """A similarity against those of pairs that do not belong together: the rows of Y in random orders.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> x, unrelated = torch.randn(80, 6), torch.randn(80, 300)
    >>> null_calibration("cka", x, unrelated).calibrated, null_calibration("mutual_knn", x, 2 * x).calibrated
    (0.0, 1.0)

    Parameters
    ----------
    score : str or function
        A name of `alignment_score`, or a function of (X, Y) that gives a number.
    X, Y : Tensor [n, D], [n, E]
    permutations, alpha : int, float
        Published: 200 and 0.05.
    maximum : float
        The largest possible score.
    seed : int
        Of the permutations: the same ones for every score of n items.
    topk, options
        As for `alignment_score`.

    Returns
    -------
    NullCalibration(score, threshold, calibrated, p_value), floats.

    For mutual_knn no search is made again: permuted lists have permuted names. For linear CKA only the cross term changes. Others are evaluated anew.
    Raises ValueError and TypeError.
    """
    x, y = check_paired("null_calibration", X, Y)
    check_calibration("null_calibration", permutations, alpha)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(x), generator=generator).to(x.device) for _ in range(permutations)]
    evaluate = _evaluation(score, x.detach(), y.detach(), topk, options)
    found = float(evaluate(None))
    return calibrated(found, torch.tensor([float(evaluate(order)) for order in orders], dtype=torch.float64), alpha, maximum)


def _evaluation(score: Any, x: Tensor, y: Tensor, topk: Any, options: dict[str, Any]) -> Callable[[Tensor | None], Any]:
    """The score with the rows of y in an order."""
    if not isinstance(score, str):
        if not callable(score):
            raise TypeError(f"null_calibration: score must be a name or a function of (X, Y), got {describe(score)}")
        if options:
            raise TypeError(f"null_calibration: options must go with a score by name, got {', '.join(options)} with a function")
        return lambda order: score(x, y if order is None else y[order])
    if score not in ALIGNMENT_SCORES:
        raise ValueError(f"null_calibration: score must be one of {', '.join(ALIGNMENT_SCORES)}, or a function, got {score!r}")
    if score == "mutual_knn" and set(options) <= {"normalize"}:
        lists = [neighbor_lists(each, neighbor_count("mutual_knn", topk, len(each)), **options) for each in (x, y)]
        return lambda order: knn_overlap(lists[0], lists[1] if order is None else permuted(lists[1], order))
    if score == "cka":
        a, b = (each.double() - each.double().mean(0) for each in (x, y))
        alignment_score(score, x, y)  # refuses what it cannot take
        own = (a.mT @ a).square().sum().sqrt() * (b.mT @ b).square().sum().sqrt() + 1e-6
        return lambda order: (a.mT @ (b if order is None else b[order])).square().sum() / own
    return lambda order: alignment_score(score, x, y if order is None else y[order], topk, **options)
