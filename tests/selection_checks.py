"""What selects and has no gradient, on one device, against float64 on whole numbers: scores are exact there and tie by the thousand, so indices are compared one by one.

`benchmarks/device.py battery` runs these checks beside the battery, test_knn.py runs them on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from modalign.ops import knn, target_rank
from modalign.ops.knn import PRECISIONS, reference_knn
from modalign.ops.target_rank import reference_target_rank

METRICS = ("dot", "sqeuclidean", "euclidean")
SIZES = ((1, 1, 1, 1), (7, 40, 5, 40), (130, 300, 33, 10), (65, 1300, 64, 129))  # N, M, D, k
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _whole_numbers(seed: int, rows: int, D: int) -> Tensor:
    return torch.randint(-2, 3, (rows, D), generator=torch.Generator().manual_seed(seed)).double()


def _check(device: str, dtype: torch.dtype, metric: str, N: int, M: int, D: int, k: int) -> None:
    queries, points = _whole_numbers(N, N, D), _whole_numbers(M + 1, M, D)
    generator = torch.Generator().manual_seed(D)
    skip, target = (torch.randint(-1, M, (N,), generator=generator) for _ in range(2))
    labels = torch.randint(0, 9, (N,), generator=generator), torch.randint(0, 9, (M,), generator=generator)
    there = [each.to(device, dtype) for each in (queries, points)]
    for exact, given in (({}, {}), ({"query_ids": skip}, {"query_ids": skip.to(device)}), ({"exclude_labels": labels}, {"exclude_labels": tuple(one.to(device) for one in labels)})):
        want = reference_knn(queries, points, k, metric=metric, **exact)
        for precision in PRECISIONS:   # small whole numbers are exact in all
            found = knn(*there, k, metric=metric, precision=precision, **given)
            assert torch.equal(found.indices.cpu(), want.indices), f"knn: other indices with {list(given)} in precision {precision}"
            torch.testing.assert_close(found.values.cpu().double(), want.values, rtol=1e-6, atol=1e-6)
        ranks = target_rank(*there, target.to(device), metric=metric, **given).cpu()
        assert torch.equal(ranks, reference_target_rank(queries, points, target, metric=metric, **exact)), f"target_rank: other ranks with {list(given)}"


def _check_certified(device: str, metric: str, N: int, M: int, D: int, k: int) -> None:
    """The bits of the highest precision on any numbers, also where half of the points are nearly the others."""
    generator = torch.Generator().manual_seed(M)
    queries, points = (torch.randn(rows, D, generator=generator) for rows in (N, M))
    points[1::2] = points[: 2 * (M // 2) : 2] * (1 + 3e-7 * torch.randn(M // 2, D, generator=generator))
    highest, certified = (knn(queries.to(device), points.to(device), k, metric=metric, precision=precision) for precision in ("highest", "certified"))
    assert torch.equal(highest.indices, certified.indices) and torch.equal(highest.values, certified.values), "knn: certified is not the highest precision"


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype in DTYPES:
        for metric in METRICS:
            for sizes in SIZES:
                yield f"selection-{str(dtype).removeprefix('torch.')}-{metric}-{'x'.join(map(str, sizes))}-{device}", partial(_check, device, dtype, metric, *sizes)
    for metric in (*METRICS, "cosine"):
        for sizes in SIZES:
            yield f"selection-certified-{metric}-{'x'.join(map(str, sizes))}-{device}", partial(_check_certified, device, metric, *sizes)
