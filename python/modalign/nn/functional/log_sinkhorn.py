"""Balanced soft assignment by Sinkhorn's iterations on logarithms. [SwAV, NeurIPS 2020]"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...ops import _arguments as arguments
from ...ops import _contrastive as contrastive
from . import _features as inputs

__all__ = ["log_sinkhorn"]


@torch.no_grad()
def log_sinkhorn(scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3, process_group: Any = None) -> Tensor:
    r"""Logarithms of the codes: samples spread over prototypes by their scores, every prototype with about the same share of the batch.

    ::

        q = exp(scores / epsilon);   `iterations` times: every column to the sum 1 / K, then every row to 1 / B;   q = B q

    done on log q, so that no epsilon overflows. Each row of the codes has the sum 1; the sums of the columns come nearer to B / K with every iteration.

    >>> import torch
    >>> log_sinkhorn(torch.tensor([[1.0, 0.9], [0.5, 0.1]])).exp()          # the second sample cares more: the first one makes room
    tensor([[0.1694, 0.8306],
            [0.9880, 0.0120]])

    Parameters: scores float [B, K], products of B samples with K prototypes; epsilon > 0, the smaller the harder the assignment; iterations of 1 or more;
    process_group: the batch is that of all processes, of which each has its rows; K numbers per process and iteration travel.

    Returns float32 (float64 for float64) [B, K], without gradient. Equal scores, or K = 1: equal shares. A NaN makes everything NaN.

    Raises TypeError and ValueError, ``log_sinkhorn: <argument> must ..., got ...``.

    Paper: Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments", NeurIPS 2020, section 3.1."""
    op = "log_sinkhorn"
    (scores,) = inputs.check_features(op, scores=(scores, "[B, K]"))
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not 0 < epsilon < float("inf"):
        raise ValueError(f"{op}: epsilon must be a positive number, got {arguments.describe(epsilon)}")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"{op}: iterations must be a whole number of at least 1, got {arguments.describe(iterations)}")
    contrastive.check_group(op, process_group, "full", "gather")
    log_codes = scores / epsilon
    for _ in range(iterations):
        log_codes = log_codes - _over_samples(log_codes, process_group)
        log_codes = log_codes.log_softmax(1)
    return log_codes


def _over_samples(log_codes: Tensor, process_group: Any) -> Tensor:
    """The log-sum-exp of every column over the samples of all processes, [1, K]."""
    sums = log_codes.logsumexp(0, keepdim=True)
    if process_group is None:
        return sums
    everyone = [torch.empty_like(sums) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(everyone, sums, group=process_group)
    return torch.cat(everyone).logsumexp(0, keepdim=True)
