"""Matching by two softmaxes at once, without their matrix. [LoFTR, CVPR 2021; MINIMA, 2024]"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _contrastive as contrastive
from . import _knn_arguments as check
from ._results import Matches
from .knn import knn
from .mutual_nearest import both_ways
from .pairwise_logsumexp import pairwise_logsumexp

__all__ = ["dual_softmax_matching"]


def dual_softmax_matching(x: Tensor, y: Tensor, *, temperature: float = 0.1, threshold: float = 0.2) -> Matches:
    r"""Pairs that are the largest of their row and of their column of ``C = softmax over j (S) * softmax over i (S)``, ``S = x_i . y_j / temperature``, with C above a threshold.

    >>> import torch
    >>> dual_softmax_matching(torch.eye(3), torch.eye(3)[[2, 0]])
    Matches(pairs=tensor([[0, 1],
            [2, 0]]), confidence=tensor([0.9999, 0.9999]))

    Parameters
    ----------
    x : Tensor [N, D]
    y : Tensor [M, D]
        As they are: normalise them for cosines.
    temperature : float or Tensor of one element
        Divides; published 0.1.
    threshold : float
        0 to less than 1; published 0.2.

    Returns
    -------
    Matches(pairs, confidence)
        int64 [P, 2], rows of x rising, and of y; [P] the C of each. Each index at most once.

    Gradient
    --------
    None.

    Edges
    -----
    Equal ones go to the lowest index. N = 0 or M = 0: no pairs.

    Raises
    ------
    TypeError, ValueError
        ``dual_softmax_matching: <argument> must ..., got ...``.

    Complexity
    ----------
    ``log C = 2 S - log sum_j exp S - log sum_i exp S``: two vectors of log-sum-exps and two searches for one neighbour, 6 N M D FLOP; no matrix N x M.

    Paper: Sun et al., "LoFTR: Detector-Free Local Feature Matching with Transformers", CVPR 2021, section 3.3; used by MINIMA, 2024.
    """
    op = "dual_softmax_matching"
    x = check.check_queries(op, x, "dot", False, None, None, name="x")
    y = check.check_points(op, check.check_matrix(op, "y", y, "[M, D]"), x, "y", "x")
    scale = 1 / contrastive.check_scalar(op, "temperature", temperature, x, positive=True).detach()
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
        raise ValueError(f"{op}: threshold must be at least 0 and less than 1, got {arguments.describe(threshold)}")
    with torch.no_grad():
        if len(x) == 0 or len(y) == 0:
            return Matches(torch.empty(0, 2, dtype=torch.int64, device=x.device), scale.new_empty(0))
        x, y = x.to(scale.dtype), y.to(scale.dtype)
        rows, columns = pairwise_logsumexp(x, y, logit_scale=scale)
        forth, back = knn(2 * scale * x, y, 1, metric="dot", bias=-columns), knn(2 * scale * y, x, 1, metric="dot", bias=-rows)
        pairs = both_ways(forth.indices[:, 0], back.indices[:, 0])
        confidence = (forth.values[pairs[:, 0], 0] - rows[pairs[:, 0]]).exp()
        return Matches(pairs[confidence > threshold], confidence[confidence > threshold])
