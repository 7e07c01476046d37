"""Exact nearest neighbours, without the matrix of scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _selection as selection
from ._contrastive import check_matrix
from ._registration import accumulation_dtype, autocast_is_on, refuse_forward_mode, register_looping_vmap, to_autocast
from ._results import Neighbors

__all__ = ["METRICS", "knn", "reference_knn"]

METRICS = ("dot", "cosine", "sqeuclidean", "euclidean")  # in the order of csrc/ops/knn.h
MAX_POINTS = 2**31 - 1  # kernels count points in 32 bits
CENTER_BLOCK = 4096  # rows whose sum is one term of the mean


def knn(
    queries: Tensor,
    points: Tensor | None = None,
    k: int = 10,
    *,
    metric: str = "cosine",
    bias: Tensor | None = None,
    exclude_self: bool = False,
    query_ids: Tensor | None = None,
    exclude_labels: tuple[Tensor, Tensor] | None = None,
    center: bool | str = "auto",
) -> Neighbors:
    r"""The k nearest points of every query, nearest first, equally near ones by index.

    A tile of products is made, compared with the k-th best of each of its rows so far, and forgotten: nothing of N x M is stored. The order is total
    (score, then lower index), so the result does not depend on threads or on k: the first 10 of k = 100 are those of k = 10.

    >>> import torch
    >>> knn(torch.tensor([[0.0], [1.0], [3.0]]), k=1, metric="euclidean", exclude_self=True)
    Neighbors(values=tensor([[1.],
            [1.],
            [2.]]), indices=tensor([[1],
            [0],
            [1]]))

    Parameters
    ----------
    queries : Tensor [N, D]
    points : Tensor [M, D], optional
        M < 2^31. Default: the queries are searched among themselves.
    k : int
        1 to M; with `exclude_self` to M - 1.
    metric : "cosine", "dot", "euclidean" or "sqeuclidean"
        The first two are similarities, larger is nearer; a zero vector has cosine 0 with everything.
    bias : Tensor [M] in the accumulation dtype, optional
        Added to the similarity of every query with that point.
    exclude_self : bool
        Without `points`: no query is its own neighbour. An equal row with another index still is one.
    query_ids : Tensor int64 [N], optional
        The point that is left out for a query, by its index; -1 for none.
    exclude_labels : (Tensor int64 [N], Tensor int64 [M]), optional
        Points with the query's label are left out, such as the captions of one image. Without `points` the two may be one tensor.
    center : "auto", True or False
        For distances, which do not change when all vectors move: the mean of the points is subtracted first, where the points are far from the origin
        (|mean|^2 > 4 times their mean squared distance from it), always, or never. Digits that a product loses there are kept by it.

    Returns
    -------
    Neighbors(values, indices)
        values [N, k] in the accumulation dtype, float32 (float64 for float64): similarities or distances. indices int64 [N, k]. Where fewer than k points
        are left, index -1 and value -inf (distances: inf). A named tuple with ``.to(device)``.

    Gradient
    --------
    None: the result does not require grad. Forward mode raises.

    Edges
    -----
    Equal scores come in the order of their indices, also where k cuts through them. NaN is never a neighbour. The distance of a row to an equal one is
    exactly 0. N = 0: empty. No points: an error, as k > M is.

    Raises
    ------
    TypeError, ValueError
        ``knn: <argument> must ..., got ...``.

    Complexity
    ----------
    2 N M D FLOP. Memory beyond the result: (N + M) D numbers and 2 k keys for each row in progress. On CUDA panels of products and torch.topk, until the
    kernel is there.

    Paper: exact search by products and a running selection: Johnson, Douze, Jegou, "Billion-scale similarity search with GPUs", IEEE Big Data 2021.
    """
    op = "knn"
    queries, points, labels = checked(op, queries, points, metric, exclude_self, query_ids, exclude_labels)
    _check_k(op, k, len(points), exclude_self)
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        queries, points, *rest = prepared(op, queries, points, metric, bias, exclude_self, query_ids, center)
        return Neighbors(*torch.ops.modalign.knn(queries, points, k, *rest, *labels))


def prepared(
    op: str, queries: Tensor, points: Tensor, metric: str, bias: object, exclude_self: bool, query_ids: Tensor | None, center: object
) -> tuple[Tensor, Tensor, int, Tensor | None, Tensor | None]:
    """What the raw ops take: queries, points, the metric's number, bias, who is left out by index."""
    real = accumulation_dtype(queries.dtype)
    if center not in (True, False, "auto"):
        raise ValueError(f'{op}: center must be "auto", True or False, got {arguments.describe(center)}')
    distance = metric in ("euclidean", "sqeuclidean")
    if center is True and not distance:
        raise ValueError(f'{op}: center must be "auto" or False with metric "{metric}", which changes when vectors move, got True')
    bias = None if bias is None else _check_bias(op, bias, points, real, distance)
    refuse_forward_mode(op, (queries, points))
    if bias is not None and metric == "cosine":  # a row's scale does not commute with what is added
        queries = torch.nn.functional.normalize(queries.to(real), dim=1, eps=torch.finfo(real).tiny)
        points = points.to(real)
    if distance and center is not False:
        shift = _center(points, real, center is True)
        same = queries is points
        points = points.to(real) - shift
        queries = points if same else queries.to(real) - shift
    skip = torch.arange(len(queries), device=queries.device) if exclude_self else query_ids
    return queries, points, METRICS.index(metric), bias, skip


def checked(
    op: str, queries: object, points: object, metric: object, exclude_self: object, query_ids: object, exclude_labels: object
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | tuple[None, None]]:
    queries = check_matrix(op, "queries", queries, "[N, D]")
    if metric not in METRICS:
        raise ValueError(f"{op}: metric must be one of {', '.join(METRICS)}, got {arguments.describe(metric)}")
    arguments.check_flag(op, "exclude_self", exclude_self)
    if points is not None:
        points = check_matrix(op, "points", points, "[M, D]")
        if exclude_self:
            raise ValueError(f"{op}: exclude_self must go without points, got both; query_ids says which point is a query's own")
        if autocast_is_on(queries.device.type):
            queries, points = to_autocast(queries), to_autocast(points)
        arguments.check_alike(op, "points", points, "queries", queries)
    elif autocast_is_on(queries.device.type):
        queries = to_autocast(queries)
    points = queries if points is None else points
    N, M = len(queries), len(points)
    if M > MAX_POINTS:
        raise ValueError(f"{op}: points must be fewer than 2^31, got {M}")
    if query_ids is not None:
        if exclude_self:
            raise ValueError(f"{op}: query_ids must not be given together with exclude_self, got both")
        _check_labels(op, "query_ids", query_ids, N, queries)
    if exclude_labels is None:
        return queries, points, (None, None)
    if not isinstance(exclude_labels, (tuple, list)) or len(exclude_labels) != 2:
        raise TypeError(f"{op}: exclude_labels must be a pair of int64 tensors, got {arguments.describe(exclude_labels)}")
    _check_labels(op, "exclude_labels[0]", exclude_labels[0], N, queries)
    _check_labels(op, "exclude_labels[1]", exclude_labels[1], M, queries)
    return queries, points, tuple(exclude_labels)


def _check_k(op: str, k: object, M: int, exclude_self: bool) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{op}: k must be a whole number, got {arguments.describe(k)}")
    most = M - 1 if exclude_self else M
    if not 1 <= k <= most:
        wanted = f"M - 1 = {most}, the other points" if exclude_self else f"M = {most}, the number of points"
        raise ValueError(f"{op}: k must be from 1 to {wanted}, got {k}")


def _check_labels(op: str, name: str, value: object, size: int, like: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype is not torch.int64:
        raise TypeError(f"{op}: {name} must be an int64 tensor [{size}], got {arguments.describe(value)}")
    if value.device != like.device or tuple(value.shape) != (size,):
        raise ValueError(f"{op}: {name} must have shape [{size}] on {like.device}, got {arguments.describe(value)}")


def _check_bias(op: str, bias: object, points: Tensor, real: torch.dtype, distance: bool) -> Tensor:
    if distance:
        raise ValueError(f"{op}: bias must go with a similarity, got a distance as metric")
    if not isinstance(bias, Tensor) or bias.dtype is not real:
        raise TypeError(f"{op}: bias must be a {str(real).removeprefix('torch.')} tensor [M], got {arguments.describe(bias)}")
    if bias.device != points.device or tuple(bias.shape) != (len(points),):
        raise ValueError(f"{op}: bias must have shape [{len(points)}] on {points.device}, got {arguments.describe(bias)}")
    return bias


def _center(points: Tensor, real: torch.dtype, always: bool) -> Tensor:
    """The mean of the points, or 0 where it is not far from them in their own measure. Blocks of rows in order: the same bits for any thread count."""
    sums = torch.stack([block.double().sum(0) for block in points.split(CENTER_BLOCK)])
    squares = torch.stack([block.double().square().sum() for block in points.split(CENTER_BLOCK)])
    mean = sums.cumsum(0)[-1] / len(points)
    spread = squares.cumsum(0)[-1] / len(points) - mean.square().sum()
    far = mean.square().sum() > 4 * spread
    return torch.where(far | always, mean, 0).to(real)


# ------------------------------------------------------------------------------------------------------------------------- what torch needs to know


@torch.library.register_fake("modalign::knn")
def _fake(queries: Tensor, points: Tensor, k: int, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=accumulation_dtype(queries.dtype)), queries.new_empty(shape, dtype=torch.int64)


register_looping_vmap("modalign::knn")

PANEL_BYTES, PANEL_ROWS = 64 << 20, 1024


def score_panels(
    queries: Tensor,
    points: Tensor,
    least: int,
    metric: int,
    bias: Tensor | None,
    skip: Tensor | None,
    query_labels: Tensor | None,
    point_labels: Tensor | None,
) -> Iterator[tuple[int, Tensor]]:
    """(first point, scores) of panels of at least so many points, all panels of some queries one after the other; -inf for what is no neighbour."""
    real, name = accumulation_dtype(queries.dtype), METRICS[metric]
    x, y = queries.to(real), points.to(real)
    scale = y.square().sum(1).rsqrt() if name == "cosine" else None
    offset = -y.square().sum(1) / 2 if name in ("euclidean", "sqeuclidean") else bias
    index = torch.arange(len(y), device=y.device)
    columns = max(least, PANEL_BYTES // (4 * real.itemsize * PANEL_ROWS))
    for first in range(0, max(1, len(x)), PANEL_ROWS):
        here = slice(first, first + PANEL_ROWS)
        for start in range(0, len(y), columns):
            there = slice(start, start + columns)
            score = x[here] @ y[there].mT
            if scale is not None:
                score = torch.where(y[there].any(1), score * scale[there], 0)
            if offset is not None:
                score = score + offset[there]
            if skip is not None:
                score = score.masked_fill(skip[here, None] == index[there], -torch.inf)
            if query_labels is not None and point_labels is not None:
                score = score.masked_fill(query_labels[here, None] == point_labels[there], -torch.inf)
            yield start, torch.where(score.isnan(), -torch.inf, score)


def _by_panels(
    queries: Tensor, points: Tensor, k: int, metric: int, bias: Tensor | None, skip: Tensor | None, query_labels: Tensor | None, point_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What stands in for the kernel on a GPU: panels of products, the k best of each merged into those before."""
    found: list[Any] = []
    for start, score in score_panels(queries, points, k, metric, bias, skip, query_labels, point_labels):
        values, indices = selection.smallest(-score, k)
        if start == 0:
            found.append(None)
        found[-1] = selection.merged(found[-1], (values, indices + start), k)
    values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    name, square = METRICS[metric], queries.to(accumulation_dtype(queries.dtype)).square().sum(1, keepdim=True)
    indices, score = torch.where(values == torch.inf, -1, indices), -values
    if name == "cosine":
        score = torch.where((square > 0) & (indices >= 0), score * square.rsqrt(), torch.where(indices >= 0, 0, score))
    elif name != "dot":
        score = (square - 2 * score).clamp(min=0)
        score = score.sqrt() if name == "euclidean" else score
    return score, indices


torch.library.impl("modalign::knn", "CUDA", _by_panels)


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
    queries, points, labels = checked(op, queries, points, metric, exclude_self, query_ids, exclude_labels)
    _check_k(op, k, len(points), exclude_self)
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
