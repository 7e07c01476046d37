"""The entry of knn_values in `cases.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from modalign import ops
from modalign.ops.knn_values import reference_knn_values
from modalign.testing import NOT_FINITE, BadInput, Maker, OpCase, Sample, degenerate_zoo

METRICS = ("cosine", "dot", "sqeuclidean", "euclidean")


def formula(queries: Tensor, points: Tensor, indices: Tensor, *, metric: str = "cosine") -> Tensor:
    """The usual code, in the input dtype: gather, then one line."""
    q, x = queries[:, None], points[indices]
    if metric in ("dot", "cosine"):
        return (torch.nn.functional.cosine_similarity(q, x, dim=-1) if metric == "cosine" else (q * x).sum(-1)).to(ops.knn_values(queries[:0], points, indices[:0]).dtype)
    square = (q - x).square().sum(-1)
    return (square if metric == "sqeuclidean" else square.sqrt()).to(ops.knn_values(queries[:0], points, indices[:0]).dtype)


def named(make: Maker, N: int, M: int, k: int) -> Tensor:
    """Points in any order, some for several queries, some twice for one."""
    return make.place(torch.arange(N)[:, None] * 7 % M + torch.arange(k) ** 2) % M


def samples(make: Maker) -> list[Sample]:
    return [
        Sample(f"{metric}, {N} x {k} of {M}", (make.randn(N, D), make.randn(M, D), named(make, N, M, k)), {"metric": metric})
        for metric in METRICS
        for N, M, D, k in ((5, 9, 16, 3), (37, 20, 33, 25), (1, 1, 2, 2))
    ]


def tiny(make: Maker) -> list[Sample]:
    return [Sample(metric, (make.randn(3, 4), make.randn(5, 4), named(make, 3, 5, 4)), {"metric": metric}) for metric in METRICS]


def sized(make: Maker, n: int) -> Sample:
    return Sample(f"n={n}", (make.randn(n, n + 9), make.randn(n + 2, n + 9), named(make, n, n + 2, 3)), {"metric": "euclidean"})


def degenerate(make: Maker) -> list[Sample]:
    zoo = [(name, vectors[0], vectors[1]) for name, vectors in degenerate_zoo(make, 2).items() if name not in NOT_FINITE and name != "huge"]
    same = make.unit(6, 8)
    zoo += [("distance 0", same, same), ("zero queries", torch.zeros_like(same), same), ("zero points", same, torch.zeros_like(same))]
    return [Sample(f"{name}, {metric}", (x, y, make.place(torch.arange(len(x))[:, None] % len(y))), {"metric": metric}) for name, x, y in zoo for metric in METRICS]


def empty(make: Maker) -> list[tuple[Sample, tuple[int, ...]]]:
    none = make.place(torch.zeros(4, 0, dtype=torch.int64))
    return [
        (Sample("no queries", (make.randn(0, 8), make.randn(5, 8), none[:0])), (0, 0)),
        (Sample("no neighbours", (make.randn(4, 8), make.randn(5, 8), none)), (4, 0)),
        (Sample("no points", (make.randn(0, 8), make.randn(0, 8), make.place(torch.zeros(0, 3, dtype=torch.int64)))), (0, 3)),
    ]


def raw(make: Maker) -> list[tuple[object, tuple[object, ...]]]:
    forward, backward = (getattr(torch.ops.modalign, name).default for name in ("knn_values", "knn_values_bwd"))
    queries, points, indices = make.randn(6, 12), make.randn(5, 12), named(make, 6, 5, 3)
    found: list[tuple[object, tuple[object, ...]]] = []
    for metric in range(4):
        values = forward(queries, points, indices, metric)
        found.append((forward, (queries.clone().requires_grad_(), points.clone().requires_grad_(), indices, metric)))
        for need in ((True, True), (True, False), (False, True), (False, False)):
            found.append((backward, (torch.ones_like(values), values, queries, points, indices, metric, *need)))
    return found


def bad_inputs(make: Maker) -> list[BadInput]:
    x, y, indices = make.randn(4, 8), make.randn(3, 8), make.place(torch.zeros(4, 2, dtype=torch.int64))

    def bad(name: str, error: type[Exception], message: str, *args: object, **options: object) -> BadInput:
        return BadInput(Sample(name, args, options), error, "knn_values: " + message)

    return [
        bad("no points", TypeError, r"points must be a tensor \[M, D\], got NoneType", x, None, indices),
        bad("mixed widths", ValueError, "points must have queries's width D = 8", x, y[:, :7], indices),
        bad("mixed dtypes", TypeError, "points must have queries's dtype torch.float32, got torch.float64", x, y.double(), indices),
        bad("indices of another dtype", TypeError, r"indices must be an int64 tensor \[4, k\], got a int32 tensor", x, y, indices.int()),
        bad("one index for each", ValueError, r"indices must have shape \[4, k\]", x, y, indices[:, 0]),
        bad("too few rows", ValueError, r"indices must have shape \[4, k\]", x, y, indices[:3]),
        bad("too large", RuntimeError, "indices must be from 0 to M - 1 = 2, or -1, got 3 at row 0", x, y, indices + 3),
        bad("too small", RuntimeError, "indices must be from 0 to M - 1 = 2, or -1, got -2 at row 0", x, y, indices - 2),
        bad("metric", ValueError, "metric must be one of dot, cosine, sqeuclidean, euclidean, got str 'csls'", x, y, indices, metric="csls"),
    ]


KNN_VALUES = OpCase(
    name="knn_values",
    call=ops.knn_values,
    reference=reference_knn_values,
    formula=formula,
    samples=samples,
    tiny=tiny,
    sized=sized,
    degenerate=degenerate,
    empty=empty,
    raw=raw,
    bad_inputs=bad_inputs,
    accumulates=True,
    double_backward=False,
    func_grad=True,
    vmap=True,
    jvp=False,
    autocast=torch.float32,
    compile=True,
    export=True,
    checkpoint=True,
    strided=True,
    deterministic=True,
)
