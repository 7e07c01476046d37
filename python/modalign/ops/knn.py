"""Exact nearest neighbours, without the matrix of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from . import _arguments as arguments
from . import _knn_arguments as check
from . import _knn_search as search
from . import _selection as selection
from ._knn_batches import item_by_item
from ._knn_search import METRICS, Query
from ._registration import accumulation_dtype, refuse_forward_mode, register_looping_vmap
from ._results import Neighbors
from ._selection import best_of
from .knn_values import knn_values

__all__ = ["knn", "reference_knn"]

PRECISIONS = ("highest", "certified", "high")


def knn(
    queries: Tensor,
    points: Tensor | NDArray[Any] | Iterable[Tensor | NDArray[Any]] | None = None,
    k: int = 10,
    *,
    metric: str = "cosine",
    bias: Tensor | None = None,
    exclude_self: bool = False,
    query_ids: Tensor | None = None,
    exclude_labels: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | tuple[Tensor, Tensor] | None = None,
    precision: str = "highest",
    refine: bool = False,
    center: bool | str = "auto",
    csls_neighbors: int = 10,
    workspace_bytes: int | None = None,
    process_group: Any = None,
    exchange: str = "gather",
) -> Neighbors:
    r"""The k nearest points of every query, nearest first, equally near ones by index.

    A tile of products is made, compared with the k-th best of each of its rows so far, and forgotten: nothing of N x M is stored. The order is total
    (score, then lower index), so the result does not depend on threads, chunks, processes or k: the first 10 of k = 100 are those of k = 10.

    >>> import torch
    >>> knn(torch.tensor([[0.0], [1.0], [3.0]]), k=1, metric="euclidean", exclude_self=True)
    Neighbors(values=tensor([[1.],
            [1.],
            [2.]]), indices=tensor([[1],
            [0],
            [1]]))

    Parameters
    ----------
    queries : Tensor [N, D], or [B, N, D]
        Three dimensions: each item of the batch is searched alone, and the points have three dimensions too.
    points : Tensor [M, D] (or [B, M, D]), array [M, D], or iterable of either with [rows, D], optional
        M < 2^31. Default: the queries are searched among themselves. Arrays, also memory-mapped ones, and iterables are read chunk after chunk.
    k : int
        1 to M; with `exclude_self` to M - 1.
    metric : "cosine", "dot", "euclidean", "sqeuclidean" or "csls"
        The first two are similarities, larger is nearer; a zero vector has cosine 0 with everything. "csls" is
        ``2 cos(q, x) - r(q) - r(x)``: twice the cosine less the mean cosines of both to their `csls_neighbors` nearest of the other side, so that points
        near to everything are not everyone's neighbour.
    bias : Tensor [M] in the accumulation dtype, optional
        Added to the similarity of every query with that point; for "cosine" and "dot".
    exclude_self : bool
        Without `points`: no query is its own neighbour. An equal row with another index still is one.
    query_ids : Tensor int64 [N], optional
        The point that is left out for a query, by its index; -1 for none.
    exclude_labels : (Tensor int64 [N], Tensor int64 [M]), optional
        Points with the query's label are left out, such as the captions of one image. Without `points` the two may be one tensor.
    lengths : Tensor int64 [B], or a pair of them, optional
        Sizes of the items of a batch: of the queries, and of the points (the same without `points`). With three dimensions rows behind an item's length are
        padding, and indices count within the item. With two dimensions items lie one behind the other, and indices count through all of them. Either way
        k may exceed an item's points, and bias, query_ids and exclude_labels have the rows of the queries and points.
    precision : "highest", "certified" or "high"
        Of products of float32 on CUDA; others have one precision. "high": three products of bfloat16 parts on the tensor cores, off by 2^-15 |q| |x|, so that
        near ties may change places. "certified": the result of "highest", bit by bit, mostly at the speed of "high": 32 candidates more than k, their exact
        scores, and a bound that says whether another point can belong to them; queries for which it can are searched again. That asks the device how many, for
        every search, so it is no part of a compiled graph or of vmap there.
    refine : bool
        For distances of points in one tensor: the neighbours' distances are made again as sums of squared differences, and put into their order. Digits that
        ``|q|^2 - 2 q . x + |x|^2`` loses where points lie close to each other return; the first 10 of k = 100 are those of k = 10 up to near ties.
    center : "auto", True or False
        For distances, which do not change when all vectors move: the mean of the points is subtracted first, where the points are far from the origin
        (|mean|^2 > 4 times their mean squared distance from it), always, or never. Digits that a product loses there are kept by it.
    csls_neighbors : int
        For "csls": neighbours in each mean, without a query itself under `exclude_self`; at most the fewer of queries and points.
    workspace_bytes : int, optional
        Points and queries are taken in blocks whose copies need no more than this (but blocks have 512 rows or more). Default: tensors at once, other points
        in blocks of 64 MiB.
    process_group : torch.distributed.ProcessGroup, optional
        Every rank holds some of the queries and of the points (of its own `bias` and labels), any number of each; indices and `query_ids` count the points
        of all ranks, rank after rank. Each rank gets the neighbours of its queries.
    exchange : "gather" or "ring"
        Between ranks: all queries meet each rank's points and the lists go back, or the points travel round.

    Returns
    -------
    Neighbors(values, indices)
        values [N, k] in the accumulation dtype, float32 (float64 for float64): similarities or distances. indices int64 [N, k]. Where fewer than k points
        are left, index -1 and value -inf (distances: inf). A named tuple with ``.to(device)``. Batched: [B, N, k].

    Gradient
    --------
    None: the result does not require grad. Forward mode raises.

    Edges
    -----
    Equal scores come in the order of their indices, also where k cuts through them. NaN is never a neighbour, and a point with NaN or infinity leaves the
    others' mean alone. Squared lengths must be finite in the accumulation dtype (below 1e19 in float32) for cosines and distances. The distance of a row to an equal one is
    exactly 0. N = 0: empty. No points: an error, as k > M is.

    Raises
    ------
    TypeError, ValueError
        ``knn: <argument> must ..., got ...``; on every rank, if it is so on one. An iterator can be read once: with automatic centring or "csls", which need
        the points twice, it is refused.

    Complexity
    ----------
    2 N M D FLOP. Memory beyond the result: on the CPU (N + M) D numbers and 2 k keys for each row in progress; on CUDA 2 M numbers, and lists of 64 to 4 k
    entries for the rows in progress, at most 256 MiB where 128 rows fit; below the highest precision also (N + M) D numbers.

    Papers: exact search by products and a running selection: Johnson, Douze, Jegou, "Billion-scale similarity search with GPUs", IEEE Big Data 2021. CSLS:
    Conneau et al., "Word Translation Without Parallel Data", ICLR 2018, section 2.3.
    """
    op = "knn"
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ValueError(f"{op}: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    arguments.check_flag(op, "refine", refine)
    if lengths is not None or getattr(queries, "ndim", 2) == 3:
        if workspace_bytes is not None or process_group is not None or not (points is None or isinstance(points, Tensor)):
            raise ValueError(f"{op}: a batch must be of tensors in one process and without workspace_bytes, got more")
        check.check_k(op, k, None, False)
        labels = (None, None) if exclude_labels is None else exclude_labels
        beside = {"bias": bias, "query_ids": query_ids, "exclude_labels[0]": labels[0], "exclude_labels[1]": labels[1]}

        def one(x: Tensor, y: Tensor | None, k: int, own: dict[str, Tensor | None]) -> Neighbors:
            pair = None if exclude_labels is None else (own["exclude_labels[0]"], own["exclude_labels[1]"])
            options = dict(metric=metric, exclude_self=exclude_self, precision=precision, refine=refine, center=center, csls_neighbors=csls_neighbors)
            return knn(x, y, k, bias=own["bias"], query_ids=own["query_ids"], exclude_labels=pair, **options)

        return item_by_item(op, one, queries, points, k, lengths, beside, exclude_self, torch.inf if metric in check.DISTANCES else -torch.inf)
    if exchange not in ("gather", "ring"):
        raise ValueError(f'{op}: exchange must be "gather" or "ring", got {arguments.describe(exchange)}')
    several = process_group is not None and dist.get_world_size(process_group) > 1
    streamed = workspace_bytes is not None or not (points is None or isinstance(points, Tensor))
    workspace = _check_workspace(op, workspace_bytes)

    def checked() -> tuple[tuple[_Asked, Any], list[int]]:
        x = check.check_queries(op, queries, metric, exclude_self, points, query_ids, (*METRICS, "csls"))
        beside = {"bias": bias, "exclude_labels[1]": exclude_labels[1] if isinstance(exclude_labels, (tuple, list)) and len(exclude_labels) == 2 else None}
        y = search.Chunks(op, x if points is None else points, x, workspace, beside) if streamed and not several else check.check_points(op, points, x)
        M = len(y) if isinstance(y, Tensor) else y.known()
        labels = check.check_excluded(op, exclude_labels, x, M)
        check.check_bias(op, bias, x, M, metric)
        check.check_center(op, center, metric)
        if refine and (metric not in check.DISTANCES or streamed or several):
            found = f"metric {metric}" if metric not in check.DISTANCES else "points of several processes" if several else "points in chunks, or workspace_bytes"
            raise ValueError(f"{op}: refine must go with a distance and points in one tensor that is taken at once, got {found}")
        check.check_k(op, k, None if several else M, exclude_self)
        fewest = None if several or M is None else min(len(x), M) - exclude_self
        means = check.check_csls_neighbors(op, csls_neighbors, fewest) if metric == "csls" else 0
        if isinstance(y, search.Chunks) and y.once and (metric == "csls" or (metric in check.DISTANCES and center is not False)):
            why = 'metric "csls"' if metric == "csls" else f"center={center!r}"
            raise ValueError(f"{op}: points must be readable twice with {why}, got an iterator, which is not; give a list, an array, or an object with __iter__")
        refuse_forward_mode(op, (x, *([y] if isinstance(y, Tensor) else [])))
        asked = _Asked(x, k, metric, bias, exclude_self, query_ids, labels, center, precision)
        flags = [exclude_self, query_ids is not None, exclude_labels is not None, bias is not None]
        dtype, which, centers = arguments.FLOATING_DTYPES.index(x.dtype), (*METRICS, "csls").index(metric), (False, True, "auto").index(center)
        return (asked, y), [x.shape[1], dtype, k, which, *map(int, flags), centers, means, int(exchange == "ring"), PRECISIONS.index(precision)]

    device = queries.device if isinstance(queries, Tensor) else torch.device("cpu")
    asked, y = search.agree(op, checked, device, process_group) if several else checked()[0]
    layout = partial(_in_shards, op, group=process_group, exchange=exchange, workspace=workspace) if several else partial(_in_chunks, op) if streamed else at_once
    with torch.no_grad(), torch.autocast(asked.queries.device.type, enabled=False):
        found = _csls(asked, y, csls_neighbors, layout) if metric == "csls" else layout(asked, y)
        return _refined(asked, y, found) if refine else found


class _Asked(NamedTuple):
    """The arguments that say what is searched; where the points lie is another matter."""

    queries: Tensor
    k: int
    metric: str
    bias: Tensor | None
    exclude_self: bool
    query_ids: Tensor | None
    labels: tuple[Tensor, Tensor] | tuple[None, None]
    center: object
    precision: str = "highest"

    def query(self, queries: Tensor, first: int = 0) -> Query:
        own = torch.arange(first, first + len(queries), device=queries.device) if self.exclude_self else self.query_ids
        return Query(queries, self.k, self.metric, own, self.labels[0], self.precision)


def _refined(asked: _Asked, points: Tensor, found: Neighbors) -> Neighbors:
    values = knn_values(asked.queries, points, found.indices, metric=asked.metric)
    none = found.indices < 0  # behind all others, also behind those that are infinitely far
    score, indices = best_of(-values.nan_to_num(nan=torch.inf, posinf=torch.inf), found.indices.masked_fill(none, search.MAX_POINTS + 1), asked.k)
    return Neighbors(-score, indices.masked_fill(indices > search.MAX_POINTS, -1))


def _check_workspace(op: str, workspace_bytes: object) -> int:
    if workspace_bytes is None:
        return search.CHUNK_BYTES
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        raise TypeError(f"{op}: workspace_bytes must be None or a whole number, got {arguments.describe(workspace_bytes)}")
    if workspace_bytes < 0:
        raise ValueError(f"{op}: workspace_bytes must be 0 or more, got {workspace_bytes}")
    return workspace_bytes


# ------------------------------------------------------------------------------------------------------------------------------- where points lie


def at_once(asked: _Asked, points: Tensor) -> Neighbors:
    x, change = check.standardised(
        asked.queries, asked.metric, asked.bias, asked.center, lambda always: search.mean_of(points.split(search.CENTER_BLOCK), points, always)
    )
    query = asked.query(x)
    score, indices, squares = search.whole(query, change(points), asked.bias, asked.labels[1])
    return Neighbors(search.finished(query, score, indices, squares), indices)


def _in_chunks(op: str, asked: _Asked, points: search.Chunks) -> Neighbors:
    x, change = check.standardised(
        asked.queries, asked.metric, asked.bias, asked.center, lambda always: search.mean_of((rows for _, rows in points), asked.queries, always)
    )
    query = asked.query(x)
    score, indices, count = search.in_chunks(query, ((first, change(rows)) for first, rows in points), points.rows, asked.bias, asked.labels[1])
    check.check_k(op, asked.k, count, asked.exclude_self)
    return Neighbors(search.finished(query, score, indices, search.squares_of(query)), indices)


def _in_shards(op: str, asked: _Asked, points: Tensor, group: Any, exchange: str, workspace: int) -> Neighbors:
    sizes = search.gather_sizes(len(points), points, group)
    check.check_k(op, asked.k, sum(sizes), asked.exclude_self)
    x, change = check.standardised(asked.queries, asked.metric, asked.bias, asked.center, lambda always: search.mean_of_shards(points, sizes, always, group))
    query = asked.query(x, sum(sizes[: dist.get_rank(group)]))
    rows = search.chunk_rows(workspace, x)
    score, indices = search.in_shards(query, change(points), asked.bias, asked.labels[1], sizes, group, exchange, rows)
    return Neighbors(search.finished(query, score, indices, search.squares_of(query)), indices)


def _csls(asked: _Asked, points: Any, neighbors: int, layout: Callable[..., Neighbors]) -> Neighbors:
    """The cosines with half the points' means taken off, made CSLS after the search."""
    own, theirs = csls_means(asked.queries, points, neighbors, asked.exclude_self, layout, asked.precision)
    found = layout(asked._replace(metric="cosine", bias=theirs / -2), points)
    return Neighbors(2 * found.values - own[:, None], found.indices)


def csls_means(
    queries: Tensor, points: Any, neighbors: int, exclude_self: bool, layout: Callable[[_Asked, Any], Neighbors], precision: str = "highest"
) -> tuple[Tensor, Tensor]:
    """The mean cosine of each query and its nearest points, and of each point and its nearest queries."""
    asked = _Asked(queries, neighbors, "cosine", None, exclude_self, None, (None, None), False, precision)
    own = _mean_value(layout(asked, points))
    if exclude_self:
        return own, own
    if isinstance(points, search.Chunks):
        return own, torch.cat([_mean_value(at_once(asked._replace(queries=rows), queries)) for _, rows in points])
    return own, _mean_value(layout(asked._replace(queries=points), queries))


def _mean_value(found: Neighbors) -> Tensor:
    """Over those that there are; 0 without any."""
    there = found.indices >= 0
    return torch.where(there, found.values, 0).sum(1) / there.sum(1).clamp(min=1)


# ------------------------------------------------------------------------------------------------------------------------- what torch needs to know


@torch.library.register_fake("modalign::knn")
def _fake(queries: Tensor, points: Tensor, k: int, metric: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    N, real = queries.shape[0], accumulation_dtype(queries.dtype)
    squares = queries.new_empty((0 if METRICS[metric] == "dot" else N,), dtype=real)
    return queries.new_empty((N, k), dtype=real), queries.new_empty((N, k), dtype=torch.int64), squares


@torch.library.register_fake("modalign::knn_scores")
def _fake_scores(queries: Tensor, points: Tensor, indices: Tensor, metric: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return queries.new_empty(indices.shape), queries.new_empty((0 if METRICS[metric] == "dot" else len(queries),))


register_looping_vmap("modalign::knn")


# ----------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_knn(
    queries: Tensor,
    points: Tensor | None = None,
    k: int = 10,
    *,
    metric: str = "cosine",
    bias: Tensor | None = None,
    exclude_self: bool = False,
    query_ids: Tensor | None = None,
    exclude_labels: tuple[Tensor, Tensor] | None = None,
) -> Neighbors:
    """`knn` in plain torch: all scores and a stable sort; [N, M] of memory, [N, M, D] for distances."""
    op = "reference_knn"
    queries = check.check_queries(op, queries, metric, exclude_self, points, query_ids)
    points = check.check_points(op, points, queries)
    labels = check.check_excluded(op, exclude_labels, queries, len(points))
    check.check_k(op, k, len(points), exclude_self)
    with torch.no_grad():
        score = reference_scores(queries, points, metric, bias, torch.arange(len(queries), device=queries.device) if exclude_self else query_ids, labels)
        values, indices = selection.smallest(-score, k)
        indices = torch.where(values == torch.inf, -1, indices)
        values = values.sqrt() if metric == "euclidean" else values if metric == "sqeuclidean" else -values
        return Neighbors(values, indices)


def reference_scores(
    queries: Tensor, points: Tensor, metric: str, bias: Tensor | None, skip: Tensor | None, labels: tuple[Tensor, Tensor] | tuple[None, None]
) -> Tensor:
    """All scores [N, M], larger is nearer: similarities or negated squared distances, -inf for what is no neighbour."""
    real = accumulation_dtype(queries.dtype)
    x, y = queries.to(real), points.to(real)
    if metric in ("euclidean", "sqeuclidean"):
        score = -(x[:, None] - y).square().sum(-1)
    else:
        if metric == "cosine":
            x, y = (torch.nn.functional.normalize(v, dim=1, eps=torch.finfo(real).tiny) for v in (x, y))
        score = x @ y.mT + (0 if bias is None else bias)
    if skip is not None:
        score = score.masked_fill(skip[:, None] == torch.arange(len(y), device=y.device), -torch.inf)
    if labels[0] is not None:
        score = score.masked_fill(labels[0][:, None] == labels[1], -torch.inf)
    return torch.where(score.isnan(), -torch.inf, score)
