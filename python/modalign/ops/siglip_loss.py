"""SigLIP's pairwise sigmoid loss without the matrix of similarities. [SigLIP, ICCV 2023]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _contrastive as contrastive
from .clip_loss import _checked, pair_loss, reference_logits

__all__ = ["siglip_loss", "reference_siglip_loss", "formula_siglip_loss"]


def siglip_loss(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    target: Tensor | None = None,
    negatives: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    return_accuracy: bool = False,
    process_group: Any = None,
    gather_grad: str = "full",
    exchange: str = "gather",
    implementation: str = "auto",
    workspace_bytes: int | None = None,
) -> Any:
    r"""Sigmoid loss over all pairs: each pair is a binary question of its own.

    ::

        loss_i = sum_j softplus(-s_ij z_ij),   z = logit_scale x_i . y_j + logit_bias,   s_ij = +1 for j = t_i, else -1

    and the mean over the rows that take part. Memory is linear in B and C, in training too.

    >>> import torch
    >>> siglip_loss(torch.eye(3), torch.eye(3), logit_scale=10.0, logit_bias=-10.0)
    tensor(0.6932)

    Parameters
    ----------
    x : Tensor [B, D]
    y : Tensor [C, D]
    logit_scale, logit_bias : float or Tensor of one element
        Published start: 10 (multiplies, already exponentiated) and -10. Tensors get gradients.
    target : Tensor int64 [B], optional
        The candidate of each row; -1: none; -100: the row takes no part. Default: row i belongs to candidate i, and B must equal C.
    negatives : Tensor [K, D], optional
        More candidates, behind those of y; they belong to no row unless ``target`` says so.
    normalize, reduction, return_accuracy
        See `clip_loss`; "none" gives the sum over the candidates of each row.
    process_group, gather_grad, exchange, implementation, workspace_bytes
        See `gram_contrastive_loss`.

    Returns
    -------
    Tensor, float32 (float64 for float64), or (Tensor, Tensor [2])

    Gradient
    --------
    Closed form in x, y, negatives, logit_scale and logit_bias. Double backward and forward mode raise.

    Edges
    -----
    No row: 0. Logits of any size: neither the loss nor its gradient overflows. A NaN that takes part makes the loss NaN.

    Raises
    ------
    TypeError, ValueError
        ``siglip_loss: <argument> must ..., got ...``; RuntimeError for values of tensors, which are looked at on the CPU only.

    Complexity
    ----------
    2 B C D FLOP, the backward 6 B C D; memory beyond inputs and gradients about 4 (B + C) D, and the workspace.

    Paper: Zhai et al., "Sigmoid loss for language image pre-training", ICCV 2023, algorithm 1.
    """
    op = "siglip_loss"
    x, y, negatives = _checked(op, x, y, negatives)
    target = contrastive.check_target(op, target, x.shape[0], y.shape[0], x)
    normalize = arguments.check_flag(op, "normalize", normalize)
    reduction = contrastive.check_reduction(op, reduction)
    return_accuracy = arguments.check_flag(op, "return_accuracy", return_accuracy)
    workspace = contrastive.check_workspace(op, implementation, workspace_bytes, process_group)
    contrastive.check_group(op, process_group, gather_grad, exchange)
    if gather_grad != "full":
        raise ValueError(f'{op}: gather_grad must be "full" (a pair has no direction here), got {gather_grad!r}')
    return pair_loss(op, x, y, negatives, logit_scale, logit_bias, target, 0.0, "both", normalize, reduction, return_accuracy, workspace, process_group, gather_grad, exchange)


# ---------------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_siglip_loss(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    target: Tensor | None = None,
    negatives: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """`siglip_loss` in a few lines of differentiable torch; stores B x C numbers."""
    x, y, negatives = _checked("reference_siglip_loss", x, y, negatives)
    logits = reference_logits(x, y, negatives, logit_scale, logit_bias, target, normalize)
    loss, count = contrastive.loss_of_logits(logits, target, sigmoid=True)
    return contrastive.reduce(loss, count, reduction)


def formula_siglip_loss(x: Tensor, y: Tensor, *, logit_scale: float | Tensor, logit_bias: float | Tensor) -> Tensor:
    """The usual code: the matrix of logits, a matrix of signs, logsigmoid. For comparisons; B = C."""
    logits = logit_scale * (x @ y.mT) + logit_bias
    signs = 2 * torch.eye(logits.shape[0], dtype=logits.dtype, device=logits.device) - 1
    return -torch.nn.functional.logsigmoid(signs * logits).sum() / logits.shape[0]
