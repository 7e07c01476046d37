"""What `knn` and `target_rank` ask of their arguments, before anything is searched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from ._contrastive import check_matrix
from ._knn_search import MAX_POINTS, METRICS
from ._registration import accumulation_dtype, autocast_is_on, to_autocast

DISTANCES = ("sqeuclidean", "euclidean")


def check_queries(op: str, queries: object, metric: object, exclude_self: object, points: object, query_ids: object, metrics: tuple[str, ...] = METRICS, name: str = "queries") -> Tensor:
    tensor = check_matrix(op, name, queries, "[N, D]")
    if metric not in metrics:
        raise ValueError(f"{op}: metric must be one of {', '.join(metrics)}, got {arguments.describe(metric)}")
    if arguments.check_flag(op, "exclude_self", exclude_self) and points is not None:
        raise ValueError(f"{op}: exclude_self must go without points, got both; query_ids says which point is a query's own")
    if exclude_self and query_ids is not None:
        raise ValueError(f"{op}: query_ids must not be given together with exclude_self, got both")
    if query_ids is not None:
        check_labels(op, "query_ids", query_ids, len(tensor), tensor)
    return to_autocast(tensor) if autocast_is_on(tensor.device.type) else tensor


def check_points(op: str, points: object, queries: Tensor, name: str = "points", name_of_queries: str = "queries") -> Tensor:
    if points is None:
        return queries
    tensor = check_matrix(op, name, points, "[M, D]")
    tensor = to_autocast(tensor) if autocast_is_on(queries.device.type) else tensor
    arguments.check_alike(op, name, tensor, name_of_queries, queries)
    if len(tensor) > MAX_POINTS:
        raise ValueError(f"{op}: points must be fewer than 2^31, got {len(tensor)}")
    return tensor


def check_excluded(op: str, exclude_labels: Any, queries: Tensor, points: int | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """`points`: how many there are, if that is known."""
    if exclude_labels is None:
        return None, None
    if not isinstance(exclude_labels, (tuple, list)) or len(exclude_labels) != 2:
        raise TypeError(f"{op}: exclude_labels must be a pair of int64 tensors, got {arguments.describe(exclude_labels)}")
    check_labels(op, "exclude_labels[0]", exclude_labels[0], len(queries), queries)
    check_labels(op, "exclude_labels[1]", exclude_labels[1], points, queries)
    return exclude_labels[0], exclude_labels[1]


def check_k(op: str, k: object, points: int | None, exclude_self: bool) -> int:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{op}: k must be a whole number, got {arguments.describe(k)}")
    most = None if points is None else points - 1 if exclude_self else points
    if k < 1 or (most is not None and k > most):
        wanted = "M, the number of points" if most is None else f"M - 1 = {most}, the other points" if exclude_self else f"M = {most}, the number of points"
        raise ValueError(f"{op}: k must be from 1 to {wanted}, got {k}")
    return k


def check_labels(op: str, name: str, value: object, size: int | None, like: Tensor) -> None:
    wanted = "M" if size is None else size
    if not isinstance(value, Tensor) or value.dtype is not torch.int64:
        raise TypeError(f"{op}: {name} must be an int64 tensor [{wanted}], got {arguments.describe(value)}")
    if value.device != like.device or value.dim() != 1 or size not in (None, len(value)):
        raise ValueError(f"{op}: {name} must have shape [{wanted}] on {like.device}, got {arguments.describe(value)}")


def check_bias(op: str, bias: object, queries: Tensor, points: int | None, metric: str) -> Tensor | None:
    if bias is None:
        return None
    real, wanted = accumulation_dtype(queries.dtype), "M" if points is None else points
    if metric not in ("dot", "cosine"):
        raise ValueError(f"{op}: bias must go with a similarity, got {'a distance' if metric in DISTANCES else metric} as metric")
    if not isinstance(bias, Tensor) or bias.dtype is not real:
        raise TypeError(f"{op}: bias must be a {str(real).removeprefix('torch.')} tensor [{wanted}], got {arguments.describe(bias)}")
    if bias.device != queries.device or bias.dim() != 1 or points not in (None, len(bias)):
        raise ValueError(f"{op}: bias must have shape [{wanted}] on {queries.device}, got {arguments.describe(bias)}")
    return bias


def check_center(op: str, center: object, metric: str) -> None:
    if center is not True and center is not False and center != "auto":
        raise ValueError(f'{op}: center must be "auto", True or False, got {arguments.describe(center)}')
    if center is True and metric not in DISTANCES:
        raise ValueError(f'{op}: center must be "auto" or False with metric "{metric}", which changes when vectors move, got True')


def check_csls_neighbors(op: str, neighbors: object, fewest: int | None) -> int:
    """`fewest`: of queries and points, less one where each is left out for itself."""
    if isinstance(neighbors, bool) or not isinstance(neighbors, int):
        raise TypeError(f"{op}: csls_neighbors must be a whole number, got {arguments.describe(neighbors)}")
    if neighbors < 1 or (fewest is not None and neighbors > fewest):
        raise ValueError(f"{op}: csls_neighbors must be from 1 to {fewest}, the fewer of queries and points, got {neighbors}")
    return neighbors


def standardised(queries: Tensor, metric: str, bias: Tensor | None, center: object, mean: Callable[[bool], Tensor]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The queries and a function of the points, as the raw ops need them. `mean` is asked for only where the metric may use one."""
    real = accumulation_dtype(queries.dtype)
    if bias is not None and metric == "cosine":  # a row's scale does not commute with what is added
        return torch.nn.functional.normalize(queries.to(real), dim=1, eps=torch.finfo(real).tiny), lambda rows: rows.to(real)
    if metric in DISTANCES and center is not False:
        shift = mean(center is True)
        return queries.to(real) - shift, lambda rows: rows.to(real) - shift
    return queries, lambda rows: rows
