"""InfoNCE with a weight for each pair, for training on the pairs that agree best."""

from __future__ import annotations

from torch import Tensor

from ...ops import _arguments as arguments
from ...ops import clip_loss
from . import _features as inputs
from ._values import check_not_negative

__all__ = ["superaligned_loss"]


def superaligned_loss(x: Tensor, y: Tensor, weight: Tensor, *, logit_scale: float | Tensor, normalize: bool = True) -> Tensor:
    """``sum_i weight_i loss_i / sum_i weight_i`` with loss_i of `ops.clip_loss` among the pairs whose weight is not 0.

    To keep the pairs above a threshold: ``weight=(score >= threshold).float()``.

    >>> import torch
    >>> superaligned_loss(torch.eye(4), torch.eye(4), torch.tensor([0.9, 0.8, 0.7, 0.1]).ge(0.5).float(), logit_scale=1.0)        # three pairs
    tensor(0.5514)

    Parameters
    ----------
    x, y : Tensor [B, D]
    weight : Tensor float [B]
        0 or more. A pair of weight 0 is neither row nor candidate and never read.
    logit_scale : float or Tensor of one element
        Positive, already exponentiated; a tensor gets a gradient.
    normalize : bool
        Make all vectors unit length first.

    Returns
    -------
    Tensor, float32 (float64 for float64); 0 where every weight is 0.

    Gradient
    --------
    In x, y, weight and logit_scale, once. No matrix of similarities is stored. A GPU is waited for, since rows are picked out.

    Raises
    ------
    TypeError, ValueError
        ``superaligned_loss: <argument> must ..., got ...``; for a negative weight on the CPU only.

    Paper: "Can sound replace vision in LLaVA with token substitution?", 2025. Put together from its abstract; no code was released.
    """
    op = "superaligned_loss"
    inputs.check_features(op, x=(x, "[B, D]"), y=(y, "[B, D]"))
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"{op}: weight must be a floating-point tensor [B], got {arguments.describe(weight)}")
    if weight.shape != x.shape[:1] or weight.device != x.device:
        raise ValueError(f"{op}: weight must be [B] = [{x.shape[0]}] on x's device {x.device}, got {arguments.describe(weight)}")
    kept = check_not_negative(op, "weight", weight) != 0
    loss = clip_loss(x[kept], y[kept], logit_scale=logit_scale, normalize=normalize, reduction="none")
    weight = weight[kept].to(loss.dtype)
    return (weight * loss).sum() / (weight.sum() if len(weight) else 1)
