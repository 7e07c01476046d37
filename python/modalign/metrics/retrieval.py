"""Cross-modal retrieval: recall at k and median rank, with any candidate of the query's group counting as a hit."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..ops import target_rank

__all__ = ["Retrieval", "chance_retrieval", "hit_ranks", "mean_reciprocal_rank", "median_rank", "recall_at_k", "retrieval", "search_ranks", "search_retrieval"]


def hit_ranks(scores: Tensor, *, query_groups: Tensor | None = None, candidate_groups: Tensor | None = None, larger_is_better: bool = True) -> Tensor:
    """Rank of the best-placed hit of each query: int64 [Q], 0 is the top of the list.

    Candidates of equal score are listed by index, so a model that gives one score to everything is not rewarded.

    >>> import torch
    >>> hit_ranks(torch.tensor([[0.9, 0.1], [0.8, 0.5]]))
    tensor([0, 1])

    Parameters
    ----------
    scores : float Tensor [Q, C]
    query_groups, candidate_groups : int64 Tensors [Q] and [C], optional
        A candidate is a hit when its group is the query's. Without them candidate i is the one hit of query i and Q must equal C. `candidate_groups`
        defaults to `query_groups`.
    larger_is_better : bool
        False for distances and volumes.

    Raises
    ------
    ValueError
        where a score is NaN, and where a query has no hit among the candidates.
    """
    if scores.dim() != 2 or not scores.is_floating_point():
        raise ValueError(f"hit_ranks: scores must be a floating-point matrix [Q, C], got {scores.dtype} {list(scores.shape)}")
    if bool(scores.isnan().any()):
        raise ValueError(f"hit_ranks: scores must not be NaN, got {int(scores.isnan().sum())} NaN of {scores.numel()}")
    queries, candidates = scores.shape
    if query_groups is None:
        if candidate_groups is not None:
            raise ValueError("hit_ranks: query_groups must be given with candidate_groups, got None")
        if queries != candidates:
            raise ValueError(f"hit_ranks: scores must be square when no groups are given, got {list(scores.shape)}")
        query_groups = torch.arange(queries, device=scores.device)
    candidate_groups = query_groups if candidate_groups is None else candidate_groups
    if query_groups.shape != (queries,) or candidate_groups.shape != (candidates,):
        found = f"{list(query_groups.shape)} and {list(candidate_groups.shape)}"
        raise ValueError(f"hit_ranks: query_groups and candidate_groups must be [{queries}] and [{candidates}], got {found}")
    return first_hits("hit_ranks", scores.argsort(dim=1, descending=larger_is_better, stable=True), query_groups, candidate_groups)


def first_hits(metric: str, order: Tensor, query_groups: Tensor, candidate_groups: Tensor) -> Tensor:
    """Place of the first candidate of the query's group in each row of `order` [Q, C], indices of candidates."""
    hits = candidate_groups[order] == query_groups[:, None]
    if not bool(hits.any(1).all()):
        raise ValueError(f"{metric}: every query must have a candidate of its group, got {int((~hits.any(1)).sum())} queries without")
    return hits.int().argmax(1)


def search_ranks(
    queries: Tensor, candidates: Tensor, *, query_groups: Tensor | None = None, candidate_groups: Tensor | None = None, metric: str = "cosine"
) -> Tensor:
    """`hit_ranks` of all similarities, from the vectors and without their matrix: int64 [Q].

    >>> import torch
    >>> search_ranks(torch.eye(3), torch.eye(3)[[1, 0, 2]])
    tensor([1, 1, 0])

    queries [Q, D], candidates [C, D]; metric: of `ops.knn` (also distances, and "csls"). Groups as for `hit_ranks`. Ranks are counted by `ops.target_rank`, once for each hit
    of a query, so that candidates of equal score are listed by index here too. Raises ValueError where a query has no hit, or NaN.
    """
    op = "search_ranks"
    if query_groups is None:
        if candidate_groups is not None:
            raise ValueError(f"{op}: query_groups must be given with candidate_groups, got None")
        if len(queries) != len(candidates):
            raise ValueError(f"{op}: candidates must be as many as queries when no groups are given, got {len(candidates)} and {len(queries)}")
        query_groups = torch.arange(len(queries), device=queries.device)
    candidate_groups = query_groups if candidate_groups is None else candidate_groups
    if query_groups.shape != (len(queries),) or candidate_groups.shape != (len(candidates),):
        found = f"{list(query_groups.shape)} and {list(candidate_groups.shape)}"
        raise ValueError(f"{op}: query_groups and candidate_groups must be [{len(queries)}] and [{len(candidates)}], got {found}")
    # The candidates of a group lie together in `order`, and a query's begin at `first`.
    in_order, order = candidate_groups.sort(stable=True)
    first, last = (torch.searchsorted(in_order, query_groups, right=right) for right in (False, True))
    if bool((first == last).any()):
        raise ValueError(f"{op}: every query must have a candidate of its group, got {int((first == last).sum())} queries without")
    best = torch.full_like(first, len(candidates))
    for place in range(int((last - first).max()) if len(first) else 0):
        rows = (first + place < last).nonzero()[:, 0]
        rank = target_rank(queries[rows], candidates, order[first[rows] + place], metric=metric)
        best[rows] = torch.minimum(best[rows], torch.where(rank < 0, len(candidates), rank))
    if bool((best == len(candidates)).any()):
        raise ValueError(f"{op}: queries and candidates must not be NaN, got hits without a rank for {int((best == len(candidates)).sum())} queries")
    return best


def mean_reciprocal_rank(ranks: Tensor) -> float:
    """The mean of 1 / position of the best hit, positions from 1.

    >>> import torch
    >>> mean_reciprocal_rank(torch.tensor([0, 1, 3]))
    0.5833333333333334
    """
    _count(ranks, "mean_reciprocal_rank")
    return float((1 / (ranks.double() + 1)).mean())


def recall_at_k(ranks: Tensor, k: int) -> float:
    """Share of queries whose best hit is among the first k, from the ranks of `hit_ranks`.

    >>> import torch
    >>> recall_at_k(torch.tensor([0, 4, 12]), 5)
    0.6666666666666666
    """
    if k < 1:
        raise ValueError(f"recall_at_k: k must be at least 1, got {k}")
    return _count(ranks, "recall_at_k") and float((ranks < k).double().mean())


def median_rank(ranks: Tensor) -> float:
    """Median position of the best hit, counted from 1 as the papers do; the mean of the middle two for an even number of queries.

    >>> import torch
    >>> median_rank(torch.tensor([0, 4, 12]))
    5.0
    """
    _count(ranks, "median_rank")
    return float(torch.quantile(ranks.double(), 0.5)) + 1.0


def _count(ranks: Tensor, metric: str) -> int:
    if ranks.dim() != 1 or ranks.is_floating_point() or ranks.numel() == 0:
        raise ValueError(f"{metric}: ranks must be a non-empty integer vector (see hit_ranks), got {ranks.dtype} {list(ranks.shape)}")
    return ranks.numel()


@dataclass(frozen=True)
class Retrieval:
    """R@1, R@5, R@10 (as shares) and the median rank of one direction."""

    r1: float
    r5: float
    r10: float
    median: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def retrieval(
    scores: Tensor, *, query_groups: Tensor | None = None, candidate_groups: Tensor | None = None, larger_is_better: bool = True
) -> Retrieval:
    """All four figures of one direction; arguments as for `hit_ranks`."""
    return figures_of(hit_ranks(scores, query_groups=query_groups, candidate_groups=candidate_groups, larger_is_better=larger_is_better))


def search_retrieval(
    queries: Tensor, candidates: Tensor, *, query_groups: Tensor | None = None, candidate_groups: Tensor | None = None, metric: str = "cosine"
) -> Retrieval:
    """All four figures of one direction from the vectors; arguments as for `search_ranks`."""
    return figures_of(search_ranks(queries, candidates, query_groups=query_groups, candidate_groups=candidate_groups, metric=metric))


def figures_of(ranks: Tensor) -> Retrieval:
    """The four figures of the ranks of `hit_ranks`."""
    return Retrieval(recall_at_k(ranks, 1), recall_at_k(ranks, 5), recall_at_k(ranks, 10), median_rank(ranks))


def chance_retrieval(groups: Tensor) -> Retrieval:
    """What a random order gives in expectation when items with these groups [N] search among themselves. Exact for the recalls.

    >>> import torch
    >>> round(chance_retrieval(torch.arange(500)).r10, 6)
    0.02
    """
    _count(groups, "chance_retrieval")
    size = groups.numel()
    _, inverse, counts = groups.unique(return_inverse=True, return_counts=True)
    hits = counts[inverse].tolist()

    def recall(k: int) -> float:
        return math.fsum(1 - math.comb(size - h, min(k, size)) / math.comb(size, min(k, size)) for h in hits) / size

    # The best of h hits among n places lies at (n + 1) / (h + 1) in the mean.
    expected = torch.tensor([(size + 1) / (h + 1) for h in hits], dtype=torch.float64)
    return Retrieval(recall(1), recall(5), recall(10), float(torch.quantile(expected, 0.5)))
