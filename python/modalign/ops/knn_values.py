"""Similarities or distances of given pairs, with a gradient: what a search found, made again. [Johnson et al., IEEE Big Data 2021]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _knn_arguments as check
from ._knn_search import METRICS
from ._registration import accumulation_dtype, call, refuse_forward_mode, register_pair

__all__ = ["knn_values", "reference_knn_values"]

GATHERED_BYTES = 16 << 20  # of points laid beside each other at a time


def knn_values(queries: Tensor, points: Tensor, indices: Tensor, *, metric: str = "cosine") -> Tensor:
    r"""The similarity or distance of every query and the points that ``indices`` names for it.

    ::

        dot  q . x        cosine  q . x / (|q| |x|)        sqeuclidean  sum (q - x)^2        euclidean  its root

    >>> import torch
    >>> points = torch.tensor([[0.0], [1.0], [3.0]])
    >>> knn_values(points[:2], points, torch.tensor([[1, 2], [0, -1]]), metric="euclidean")
    tensor([[1., 3.],
            [1., inf]])

    Parameters
    ----------
    queries : Tensor [N, D]
    points : Tensor [M, D]
    indices : Tensor int64 [N, k]
        0 to M - 1, in any order, also more than once; -1 for none. Those of `knn` or others.
    metric : "cosine", "dot", "euclidean" or "sqeuclidean"

    Returns
    -------
    Tensor [N, k] in the accumulation dtype. For -1: -inf (distances: inf), without a gradient.

    Gradient
    --------
    To queries and points, at fixed indices; double backward and forward mode raise. Points that several queries name get the sum over these in the order
    of the queries: the same bits every time.

    Edges
    -----
    The cosine of a zero vector is 0, its gradient 0; so is the gradient of a distance 0. N = 0 or k = 0: empty.

    Raises
    ------
    TypeError, ValueError
        ``knn_values: <argument> must ..., got ...``; RuntimeError for an index out of range, whose values are looked at on the CPU only
        (on CUDA such an index is as good as -1).

    Complexity
    ----------
    2 N k D FLOP and reads of N k D numbers, three times that with the backward. Memory beyond the result: 16 MiB of gathered points; in the backward
    N k numbers and a copy of the operands in the accumulation dtype.

    Paper: distances are differences, not the expanded square: Johnson, Douze, Jegou, "Billion-scale similarity search with GPUs", IEEE Big Data 2021, has the
    latter.
    """
    op = "knn_values"
    queries, points = _checked(op, queries, points, indices, metric)
    refuse_forward_mode(op, (queries, points))
    with torch.autocast(queries.device.type, enabled=False):
        return call("knn_values", queries, points, indices, METRICS.index(metric))


def _checked(op: str, queries: Tensor, points: Tensor, indices: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    queries = check.check_queries(op, queries, metric, False, None, None)
    points = check.check_points(op, check.check_matrix(op, "points", points, "[M, D]"), queries)
    if not isinstance(indices, Tensor) or indices.dtype is not torch.int64:
        raise TypeError(f"{op}: indices must be an int64 tensor [{len(queries)}, k], got {arguments.describe(indices)}")
    if indices.dim() != 2 or len(indices) != len(queries) or indices.device != queries.device:
        raise ValueError(f"{op}: indices must have shape [{len(queries)}, k] on {queries.device}, got {arguments.describe(indices)}")
    return queries, points


def _forward(queries: Tensor, points: Tensor, indices: Tensor, metric: int) -> Tensor:
    (N, k), D, name = indices.shape, queries.shape[1], METRICS[metric]
    wrong = (indices < -1) | (indices >= len(points))
    if indices.device.type != "cpu":  # values are not looked at, that would wait for the device: what is no index of a point is none
        indices = torch.where(wrong, -1, indices)
    elif bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        raise RuntimeError(f"knn_values: indices must be from 0 to M - 1 = {len(points) - 1}, or -1, got {int(indices[row, place])} at row {row}")
    real, none = accumulation_dtype(queries.dtype), torch.inf if name in check.DISTANCES else -torch.inf
    values = queries.new_full((N, k), none, dtype=real)
    step = max(1, GATHERED_BYTES // max(1, k * D * real.itemsize))
    for part in (slice(start, start + step) for start in range(0, N if len(points) else 0, step)):
        there, x = indices[part] >= 0, points[indices[part].clamp(min=0)].to(real)
        q = queries[part].to(real)
        if name in check.DISTANCES:
            found = (q[:, None] - x).square().sum(-1)
            found = found.sqrt() if name == "euclidean" else found
        else:
            if name == "cosine":
                q, x = (torch.nn.functional.normalize(each, dim=-1, eps=torch.finfo(real).tiny) for each in (q, x))
            found = (x @ q[:, :, None])[:, :, 0]
        values[part] = torch.where(there, found, none)
    return values


def _backward(
    grad: Tensor, values: Tensor, queries: Tensor, points: Tensor, indices: Tensor, metric: int, need_queries: bool, need_points: bool
) -> tuple[Tensor, Tensor]:
    """With weights w of the edges (i, j): grad q_i = sum_j w x_j + c_i q_i, and the same the other way round. Sums over edges go in the order of a stable sort."""
    name, real, there = METRICS[metric], accumulation_dtype(queries.dtype), (indices >= 0) & (indices < len(points))
    q, x, rows = queries.to(real), points.to(real), there.nonzero()[:, 0]
    columns, weight, value = indices[there], grad[there], values[there]
    along = None  # the share of the edge's gradient along each end itself
    if name == "cosine":
        scale_q, scale_x = (torch.where(norm > 0, 1 / norm, 0) for norm in (q.norm(dim=1), x.norm(dim=1)))
        along = -weight * value
        weight = weight * scale_q[rows] * scale_x[columns]
    elif name != "dot":
        shift = x.mean(0) if len(x) else 0  # moves nothing, and keeps the digits of q - x
        q, x = q - shift, x - shift
        along = torch.where(value > 0, weight / value, 0) if name == "euclidean" else 2 * weight
        weight = -along
        scale_q, scale_x = q.new_ones(len(q)), x.new_ones(len(x))

    def towards(mine: Tensor, edges: Tensor, ends: Tensor, others: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        order = edges.argsort(stable=True)
        starts = torch.searchsorted(edges[order], torch.arange(len(mine), device=edges.device))

        def add(table: Tensor, at: Tensor, weights: Tensor | None) -> Tensor:
            return torch.nn.functional.embedding_bag(at, table, starts, mode="sum", per_sample_weights=weights)

        total = add(others, ends[order], weight[order])
        if along is not None:
            total = total + add(along[:, None], order, None) * scale.square()[:, None] * mine
        return total.to(dtype)

    grad_q = towards(q, rows, columns, x, None if along is None else scale_q, queries.dtype) if need_queries else queries.new_empty(0)
    grad_x = towards(x, columns, rows, q, None if along is None else scale_x, points.dtype) if need_points else points.new_empty(0)
    return grad_q, grad_x


# ------------------------------------------------------------------------------------------------------------------------- what torch needs to know


def _fake(queries: Tensor, points: Tensor, indices: Tensor, metric: int) -> Tensor:
    return queries.new_empty(indices.shape, dtype=accumulation_dtype(queries.dtype))


def _fake_backward(
    grad: Tensor, values: Tensor, queries: Tensor, points: Tensor, indices: Tensor, metric: int, need_queries: bool, need_points: bool
) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape if need_queries else (0,)), points.new_empty(points.shape if need_points else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.metric = inputs
    ctx.save_for_backward(output, *tensors)


def _backward_of(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    need_queries, need_points = ctx.needs_input_grad[:2]
    grad_queries, grad_points = call("knn_values_bwd", grad, *ctx.saved_tensors, ctx.metric, need_queries, need_points)
    return grad_queries if need_queries else None, grad_points if need_points else None, None, None


_library = torch.library.Library("modalign", "FRAGMENT")
_library.define("knn_values(Tensor queries, Tensor points, Tensor indices, int metric) -> Tensor")
_library.define(
    "knn_values_bwd(Tensor grad, Tensor values, Tensor queries, Tensor points, Tensor indices, int metric, bool need_queries, bool need_points)"
    " -> (Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    _library.impl("knn_values", _forward, _device)
    _library.impl("knn_values_bwd", _backward, _device)
register_pair("knn_values", op="knn_values", fake=_fake, fake_backward=_fake_backward, setup_context=_setup_context, backward=_backward_of, vmap="loop")


# ----------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_knn_values(queries: Tensor, points: Tensor, indices: Tensor, *, metric: str = "cosine") -> Tensor:
    """`knn_values` in plain torch: all N k points gathered at once; the gradient comes from autograd."""
    queries, points = _checked("reference_knn_values", queries, points, indices, metric)
    real = accumulation_dtype(queries.dtype)
    q, x = queries.to(real)[:, None], points.to(real)[indices.clamp(min=0)]
    if metric in check.DISTANCES:
        square = (q - x).square().sum(-1)
        values = square if metric == "sqeuclidean" else torch.where(square > 0, square, 1).sqrt() * (square > 0)
    else:
        if metric == "cosine":
            q, x = (torch.where(each.any(-1, keepdim=True), each, 1) * each.any(-1, keepdim=True) for each in (q, x))
            q, x = (each / each.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(real).tiny) for each in (q, x))
        values = (q * x).sum(-1)
    return values.where(indices >= 0, torch.inf if metric in check.DISTANCES else -torch.inf)
