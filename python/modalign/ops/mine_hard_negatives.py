"""Hard negatives out of a whole corpus: the nearest points that are not a query's own, nor so near that they are likely right."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _knn_arguments as check
from ._knn_search import METRICS
from ._results import Neighbors
from .knn import knn

__all__ = ["mine_hard_negatives"]

LIST_BYTES = 256 << 20  # of lists, with what is made of them


def mine_hard_negatives(
    queries: Tensor,
    points: Tensor,
    positives: Tensor | tuple[Tensor, Tensor],
    k: int,
    skip_top: int = 0,
    max_similarity: float | None = None,
    *,
    metric: str = "cosine",
    workspace_bytes: int | None = None,
) -> Neighbors:
    r"""The k nearest points of every query without its positives, without the ``skip_top`` nearest of the rest and those above ``max_similarity``.

    The nearest points that nobody labelled are often right answers; both limits leave such false negatives out.

    >>> import torch
    >>> points = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.7, 0.7], [0.0, 1.0]])
    >>> mine_hard_negatives(points[:1], points, torch.tensor([0]), 2, max_similarity=0.95).indices
    tensor([[2, 3]])

    Parameters
    ----------
    queries : Tensor [N, D]
    points : Tensor [M, D]
    positives : Tensor int64 [N] or [N, P], or (Tensor int64 [N], Tensor int64 [M])
        The points that are right for a query, by index (-1 for none), or labels: points with the query's label are right.
    k : int
        1 or more.
    skip_top : int
        So many of the nearest negatives are passed over.
    max_similarity : float, optional
        Points more similar than this are passed over, besides: a limit to the value of `metric`.
    metric : "cosine" or "dot"
    workspace_bytes : int, optional
        As in `knn`.

    Returns
    -------
    Neighbors(values, indices): [N, k], hardest first; where a query has fewer than k such points, -1 and -inf. Equally similar ones by index.

    Gradient
    --------
    None.

    Edges
    -----
    Exact: lists are made longer until every query has its k or there are no more points. N = 0: empty.

    Raises
    ------
    TypeError, ValueError
        ``mine_hard_negatives: <argument> must ..., got ...``.

    Complexity
    ----------
    One search for skip_top + k + P neighbours; with `max_similarity` further ones, twice as long each time, for the queries that lack some.
    Lists of at most 256 MiB are looked at together.

    Paper: Chen et al., "mmE5: Improving Multimodal Multilingual Embeddings via High-quality Synthetic Data", ACL Findings 2025, trains on k of them for each
    query; the limits are those of Moreira et al., "NV-Retriever", 2024.
    """
    op = "mine_hard_negatives"
    queries = check.check_queries(op, queries, metric, False, points, None, ("cosine", "dot"))
    points = check.check_points(op, check.check_matrix(op, "points", points, "[M, D]"), queries)
    N, M = len(queries), len(points)
    for name, value, least in (("k", k, 1), ("skip_top", skip_top, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{op}: {name} must be a whole number, got {arguments.describe(value)}")
        if value < least:
            raise ValueError(f"{op}: {name} must be {least} or more, got {value}")
    if max_similarity is not None and (isinstance(max_similarity, bool) or not isinstance(max_similarity, (int, float))):
        raise TypeError(f"{op}: max_similarity must be None or a number, got {arguments.describe(max_similarity)}")
    if isinstance(positives, Tensor):
        labels = None
        if positives.dtype is not torch.int64:
            raise TypeError(f"{op}: positives must be an int64 tensor [N], [N, P], or a pair of labels, got {arguments.describe(positives)}")
        if positives.dim() not in (1, 2) or len(positives) != N or positives.device != queries.device:
            raise ValueError(f"{op}: positives must have shape [{N}] or [{N}, P] on {queries.device}, got {arguments.describe(positives)}")
        if bool(((positives < -1) | (positives >= M)).any()):
            raise ValueError(f"{op}: positives must be from 0 to M - 1 = {M - 1}, or -1, got {int(positives.min())} to {int(positives.max())}")
        own = positives if positives.dim() == 2 else positives[:, None]
    else:
        labels, own = check.check_excluded(op, positives, queries, M), queries.new_empty(N, 0, dtype=torch.int64)

    values, indices = queries.new_full((N, k), -torch.inf, dtype=torch.float64 if queries.dtype is torch.float64 else torch.float32), own.new_full((N, k), -1)
    rows, length = torch.arange(N, device=queries.device), min(M, skip_top + k + own.shape[1])
    while len(rows) and M:
        short = []
        for some in rows.split(max(1, LIST_BYTES // (length * (32 + own.shape[1])))):
            pair = None if labels is None else (labels[0][some], labels[1])
            found = knn(queries[some], points, length, metric=metric, exclude_labels=pair, workspace_bytes=workspace_bytes)
            negative = (found.indices >= 0) & ~(found.indices[:, :, None] == own[some][:, None]).any(2)
            kept = negative & (negative.cumsum(1) > skip_top)
            if max_similarity is not None:
                kept &= found.values <= max_similarity
            kept &= kept.cumsum(1) <= k
            row, place = kept.nonzero(as_tuple=True)
            at = some[row], kept.cumsum(1)[row, place] - 1
            values[at], indices[at] = found.values[row, place], found.indices[row, place]
            short.append(some[(kept.sum(1) < k) & (found.indices[:, -1] >= 0)])
        rows = torch.cat(short)
        if length == M:
            break
        length = min(M, 2 * length)
    return Neighbors(values, indices)
