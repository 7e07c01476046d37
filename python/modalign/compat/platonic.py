"""`AlignmentMetrics` of the released Platonic Representation Hypothesis code: names, arguments and numbers, from neighbour lists instead of matrices.

>>> import torch
>>> from modalign.compat.platonic import AlignmentMetrics
>>> x = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.2], [0.0, 1.0], [0.2, 0.9], [1.0, 1.0]]), dim=1)
>>> AlignmentMetrics.measure("mutual_knn", x, x.flip(1), topk=2)
1.0

Features are taken as they are (normalise them first, as there) and compared by inner product. What differs: `svcca` is deterministic where the original draws a random
sketch; `distance_agnostic` gives a number, where it returns a matrix and fails; `cknna` without `topk` takes all others, where it raises.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import metrics

__all__ = ["AlignmentMetrics"]


class AlignmentMetrics:
    SUPPORTED_METRICS = ("cycle_knn", "mutual_knn", "lcs_knn", "cka", "unbiased_cka", "cknna", "svcca", "edit_distance_knn")

    @staticmethod
    def measure(metric: str, *args: Any, **kwargs: Any) -> float:
        if metric not in AlignmentMetrics.SUPPORTED_METRICS:
            raise ValueError(f"AlignmentMetrics.measure: metric must be one of {', '.join(AlignmentMetrics.SUPPORTED_METRICS)}, got {metric!r}")
        return getattr(AlignmentMetrics, metric)(*args, **kwargs)

    @staticmethod
    def cycle_knn(feats_A: Tensor, feats_B: Tensor, topk: int) -> float:
        return float(metrics.cycle_knn(feats_A, feats_B, topk, normalize=False))

    @staticmethod
    def mutual_knn(feats_A: Tensor, feats_B: Tensor, topk: int) -> float:
        return float(metrics.mutual_knn(feats_A, feats_B, topk, normalize=False))

    @staticmethod
    def lcs_knn(feats_A: Tensor, feats_B: Tensor, topk: int) -> float:
        return float(metrics.lcs_knn(feats_A, feats_B, topk, normalize=False))

    @staticmethod
    def edit_distance_knn(feats_A: Tensor, feats_B: Tensor, topk: int) -> float:
        return float(metrics.edit_distance_knn(feats_A, feats_B, topk, normalize=False))

    @staticmethod
    def cka(feats_A: Tensor, feats_B: Tensor, kernel_metric: str = "ip", rbf_sigma: float = 1.0, unbiased: bool = False) -> float:
        if kernel_metric not in ("ip", "rbf"):
            raise ValueError(f'AlignmentMetrics.cka: kernel_metric must be "ip" or "rbf", got {kernel_metric!r}')
        if kernel_metric == "rbf":
            return float(metrics.cka_rbf(feats_A, feats_B, rbf_sigma, unbiased=unbiased))
        return float((metrics.unbiased_cka if unbiased else metrics.cka)(feats_A, feats_B))

    @staticmethod
    def unbiased_cka(*args: Any, **kwargs: Any) -> float:
        return AlignmentMetrics.cka(*args, **{**kwargs, "unbiased": True})

    @staticmethod
    def svcca(feats_A: Tensor, feats_B: Tensor, cca_dim: int = 10) -> float:
        return float(metrics.svcca(feats_A, feats_B, cca_dim))

    @staticmethod
    def cknna(feats_A: Tensor, feats_B: Tensor, topk: int | None = None, distance_agnostic: bool = False, unbiased: bool = True) -> float:
        count = len(feats_A) - 1 if topk is None else topk
        return float(metrics.cknna(feats_A, feats_B, count, unbiased=unbiased, distance_agnostic=distance_agnostic, normalize=False))
