"""How many points lie before each query's own, without the matrix of scores. [exact retrieval; Johnson et al., IEEE Big Data 2021]"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _knn_arguments as check
from ._knn_search import CENTER_BLOCK, METRICS, mean_of
from ._registration import refuse_forward_mode, register_looping_vmap
from .knn import at_once, csls_means, reference_scores

__all__ = ["reference_target_rank", "target_rank"]


def target_rank(
    queries: Tensor,
    points: Tensor | None,
    target: Tensor,
    *,
    metric: str = "cosine",
    bias: Tensor | None = None,
    exclude_self: bool = False,
    query_ids: Tensor | None = None,
    exclude_labels: tuple[Tensor, Tensor] | None = None,
    center: bool | str = "auto",
    csls_neighbors: int = 10,
) -> Tensor:
    r"""The place of point ``t_i`` in the list that `knn` would give for query i: the number of points before it, 0 for the nearest.

    ::

        rank_i = #{ j : z[i, j] > z[i, t_i], or z[i, j] = z[i, t_i] and j < t_i }

    with the scores z of `knn`. Recall at k, mean reciprocal rank and the median rank follow from it, and neither a matrix nor a sorted list is made.

    >>> import torch
    >>> target_rank(torch.eye(4)[:3], torch.eye(4), torch.tensor([0, 3, -1]))
    tensor([ 0,  3, -1])

    Parameters
    ----------
    queries, points, metric, bias, exclude_self, query_ids, exclude_labels, center, csls_neighbors
        See `knn`; ``points=None``: the queries among themselves.
    target : Tensor int64 [N]
        The point to find, 0 to M - 1; -1 (or -100) for a query without one.

    Returns
    -------
    Tensor int64 [N]: 0 to M - 1, and -1 where there is no target, or where it is left out or no neighbour (NaN).

    Gradient
    --------
    None: a count has none. Forward mode raises.

    Edges
    -----
    Equal scores go by index, so points that all look alike give ``t_i`` and not 0. N = 0: empty. The rank of the j-th neighbour that `knn` returns is
    j - 1, to the last tie.

    Raises
    ------
    TypeError, ValueError
        ``target_rank: <argument> must ..., got ...``; RuntimeError for a target out of range, whose values are looked at on the CPU only (on CUDA: -1).

    Complexity
    ----------
    2 N M D FLOP; memory beyond the result: on the CPU (N + M) D numbers, on CUDA 2 M and, of the rows in progress, D + 2.

    Paper: Johnson, Douze, Jegou, "Billion-scale similarity search with GPUs", IEEE Big Data 2021, for exact search; the count is the rank of retrieval tables.
    """
    op = "target_rank"
    queries = check.check_queries(op, queries, metric, exclude_self, points, query_ids, (*METRICS, "csls"))
    points = check.check_points(op, points, queries)
    labels = check.check_excluded(op, exclude_labels, queries, len(points))
    check.check_bias(op, bias, queries, len(points), metric)
    check.check_center(op, center, metric)
    _check_target(op, target, queries, points)
    refuse_forward_mode(op, (queries, points))
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        if metric == "csls":
            check.check_csls_neighbors(op, csls_neighbors, min(len(queries), len(points)) - exclude_self)
            metric, bias = "cosine", csls_means(queries, points, csls_neighbors, exclude_self, at_once)[1] / -2
        x, change = check.standardised(queries, metric, bias, center, lambda always: mean_of(points.split(CENTER_BLOCK), points, always))
        skip = torch.arange(len(queries), device=queries.device) if exclude_self else query_ids
        return torch.ops.modalign.target_rank(x, change(points), target, METRICS.index(metric), bias, skip, *labels)


def _check_target(op: str, target: object, queries: Tensor, points: Tensor) -> None:
    if not isinstance(target, Tensor) or target.dtype is not torch.int64:
        raise TypeError(f"{op}: target must be an int64 tensor [{len(queries)}], got {arguments.describe(target)}")
    if target.device != queries.device or tuple(target.shape) != (len(queries),):
        raise ValueError(f"{op}: target must have shape [{len(queries)}] on {queries.device}, got {arguments.describe(target)}")
    if len(points) == 0:
        raise ValueError(f"{op}: points must be at least one, got none")


# ------------------------------------------------------------------------------------------------------------------------- what torch needs to know


@torch.library.register_fake("modalign::target_rank")
def _fake(queries: Tensor, *rest: object) -> Tensor:
    return queries.new_empty((queries.shape[0],), dtype=torch.int64)


register_looping_vmap("modalign::target_rank")


# ----------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_target_rank(
    queries: Tensor,
    points: Tensor | None,
    target: Tensor,
    *,
    metric: str = "cosine",
    bias: Tensor | None = None,
    exclude_self: bool = False,
    query_ids: Tensor | None = None,
    exclude_labels: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`target_rank` in plain torch: all scores."""
    op = "reference_target_rank"
    queries = check.check_queries(op, queries, metric, exclude_self, points, query_ids)
    points = check.check_points(op, points, queries)
    labels = check.check_excluded(op, exclude_labels, queries, len(points))
    _check_target(op, target, queries, points)
    with torch.no_grad():
        score = reference_scores(queries, points, metric, bias, torch.arange(len(queries), device=queries.device) if exclude_self else query_ids, labels)
        own = score.gather(1, target.clamp(min=0)[:, None])
        ahead = (score > own) | ((score == own) & (torch.arange(len(points), device=points.device) < target[:, None]))
        return torch.where((target >= 0) & (own[:, 0] > -torch.inf), ahead.sum(1), -1)
