"""Two modalities agree on prototypes: each predicts the assignment of the other. [MGCA, NeurIPS 2022; SwAV, NeurIPS 2020]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops import _arguments as arguments
from ...ops import _contrastive as contrastive
from ...ops._gram_schmidt import unit
from . import _features as inputs
from .log_sinkhorn import log_sinkhorn

__all__ = ["prototype_alignment_loss"]


def prototype_alignment_loss(
    x: Tensor,
    y: Tensor,
    prototypes: Tensor,
    *,
    temperature: float | Tensor = 0.2,
    epsilon: float = 0.05,
    iterations: int = 3,
    normalize: bool = True,
    reduction: str = "mean",
    process_group: Any = None,
) -> Tensor:
    r"""Cross entropy of the softmax over prototypes of one modality with the balanced assignment of the other, both ways, halved.

    ::

        loss_i = -1/2 sum_k (q^x_ik log softmax_k(y_i . c_k / temperature) + q^y_ik log softmax_k(x_i . c_k / temperature))
        q^x = exp(log_sinkhorn(x . c, epsilon, iterations)), and so q^y; both without gradient

    >>> import torch
    >>> prototype_alignment_loss(torch.eye(3), torch.eye(3), torch.eye(3))
    tensor(0.0134)

    Parameters
    ----------
    x, y : Tensor [B, D]
        Row i of both is sample i.
    prototypes : Tensor [K, D]
    temperature : float or Tensor of one element
        Positive, of the prediction; a tensor gets a gradient.
    epsilon, iterations, process_group
        Of the assignment: see `log_sinkhorn`. With a process group the assignment is balanced over all processes, the loss is that of this one's rows.
    normalize : bool
        Scale samples and prototypes to unit length first.
    reduction : str
        "mean", "sum" or "none": [B].

    Returns
    -------
    Tensor, float32 (float64 for float64)

    Gradient
    --------
    In x, y, prototypes and temperature through the predictions, by autograd; it can be differentiated again.

    Edges
    -----
    K = 1: 0. B = 0: 0. A zero row has equal scores. A NaN makes the loss NaN.

    Raises
    ------
    TypeError, ValueError
        ``prototype_alignment_loss: <argument> must ..., got ...``

    Complexity
    ----------
    4 B K D FLOP; a few matrices B x K, for the published K = 500.

    Paper: Wang et al., "Multi-granularity cross-modal alignment for generalized medical visual representation learning", NeurIPS 2022, section 3.4.
    """
    op = "prototype_alignment_loss"
    x, y, prototypes = inputs.check_features(op, x=(x, "[B, D]"), y=(y, "[B, D]"), prototypes=(prototypes, "[K, D]"))
    temperature = inputs.check_scale(op, "temperature", temperature, x)
    normalize = arguments.check_flag(op, "normalize", normalize)
    reduction = contrastive.check_reduction(op, reduction)
    with torch.autocast(x.device.type, enabled=False):
        if normalize:
            x, y, prototypes = unit(x), unit(y), unit(prototypes)
        scores = x @ prototypes.mT, y @ prototypes.mT
        codes = [log_sinkhorn(score, epsilon=epsilon, iterations=iterations, process_group=process_group).exp() for score in scores]
        loss = [-(code * (score / temperature).log_softmax(1)).sum(1) for code, score in zip(codes, reversed(scores), strict=True)]
        return inputs.mean_of((loss[0] + loss[1]) / 2, reduction)
