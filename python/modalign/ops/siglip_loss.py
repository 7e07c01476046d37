"""SigLIP's pairwise sigmoid loss without the matrix of similarities. [SigLIP, ICCV 2023]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _contrastive as contrastive
from . import _positives as positives
from .clip_loss import _checked, check_alone, joined, labels_of, prepared, reference_logits

__all__ = ["siglip_loss", "reference_siglip_loss", "formula_siglip_loss"]


def siglip_loss(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    target: Tensor | None = None,
    positive_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    negatives: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
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
    positive_ids : Tensor int64 [B], or two of them, [B] and [C], optional
        In place of ``target``: s_ij = +1 where ids are equal. -1: equal to no other id; -100: takes no part. One tensor is the ids of both sides. Not with
        ``return_accuracy`` or ``process_group``.
    negatives : Tensor [K, D], or a pair of Tensor [K, D] or None, optional
        More rows of y that are wrong for every row of x; of a pair the first is more rows of x, wrong for every row of y. They are not compared with each
        other, and the mean is over the rows of x as before. A single tensor: more rows of y, behind those that are there; ``target`` may point to them.
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
    ids = positives.check_positive_ids(op, positive_ids, target, x, y)
    target = None if ids is not None else contrastive.check_target(op, target, x.shape[0], y.shape[0], x)
    normalize = arguments.check_flag(op, "normalize", normalize)
    reduction = contrastive.check_reduction(op, reduction)
    return_accuracy = arguments.check_flag(op, "return_accuracy", return_accuracy)
    workspace = contrastive.check_workspace(op, implementation, workspace_bytes, process_group)
    contrastive.check_group(op, process_group, gather_grad, exchange)
    check_alone(op, negatives, process_group)
    if gather_grad != "full":
        raise ValueError(f'{op}: gather_grad must be "full" (a pair has no direction here), got {gather_grad!r}')
    if ids is not None:
        positives.check_without(op, process_group=process_group, return_accuracy=return_accuracy)
    if negatives[0] is not None and (return_accuracy or reduction == "none"):
        what = "return_accuracy must be False" if return_accuracy else 'reduction must be "mean" or "sum"'
        raise ValueError(f"{op}: {what} together with negatives for x, whose pairs belong to no row of x, got {return_accuracy or reduction!r}")
    x, y, (more_x, more_y), scale, bias = prepared(op, x, y, negatives, logit_scale, logit_bias, target, ids, normalize)
    with torch.autocast(x.device.type, enabled=False):

        def evaluate(rows: Tensor, candidates: Tensor, labels: Tensor | None, reduction: str, present: Tensor | None = None) -> Any:
            return contrastive.evaluate(
                op, rows, [candidates], scale, bias, labels, present, 0.0, "both", 0.0, reduction, return_accuracy, workspace, process_group, gather_grad, exchange
            )

        if target is None and (more_x is not None or more_y is not None):
            target = torch.arange(x.shape[0], device=x.device)
        if ids is None and more_x is None:
            return evaluate(x, joined(y, more_y), target, reduction)
        return _loss_of_parts(evaluate, x, y, more_x, more_y, scale, bias, target, ids, reduction)


def _no_label(ids: Tensor) -> Tensor:
    """Targets that leave out what ids leave out."""
    return torch.where(positives.take_part(ids), -1, contrastive.IGNORED)


def _loss_of_parts(
    evaluate: Any,
    x: Tensor,
    y: Tensor,
    more_x: Tensor | None,
    more_y: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    ids: positives.Ids | None,
    reduction: str,
) -> Tensor:
    """Pairs of x with everything, then those of the rows that are negatives with y alone: of two queues, rows of equal place may well belong together."""
    if ids is None:
        loss = evaluate(x, joined(y, more_y), target, "none")
        rows = (target != contrastive.IGNORED).sum()
    else:
        here = positives.take_part(ids[0])
        loss = evaluate(x, joined(y, more_y), _no_label(ids[0]), "none", positives.take_part(labels_of(ids[1], more_y))[:, None])
        logit, count = positives.mean_positive(x.to(scale.dtype), y.to(scale.dtype), ids, scale, bias)
        loss = torch.where(here, loss - count * logit, 0).to(scale.dtype)
        rows = here.sum()
    result = contrastive.reduce(loss, rows, reduction)
    if more_x is None:
        return result
    candidates = y.new_full(y.shape[:1], -1, dtype=torch.int64) if ids is None else _no_label(ids[1])
    others = evaluate(y, more_x, candidates, "sum")
    return result + (others / rows.clamp(min=1) if reduction == "mean" else others)


# ---------------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_siglip_loss(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    target: Tensor | None = None,
    positive_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    negatives: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """`siglip_loss` in a few lines of differentiable torch; stores B x C numbers."""
    op = "reference_siglip_loss"
    x, y, negatives = _checked(op, x, y, negatives)
    ids = positives.check_positive_ids(op, positive_ids, target, x, y)
    B, C = x.shape[0], y.shape[0]
    logits, target, ids = reference_logits(x, y, negatives, logit_scale, logit_bias, target, ids, normalize)
    if ids is None:
        loss, count = contrastive.loss_of_logits(logits[:B], None if target is None else target[:B], sigmoid=True)
        candidates = logits[B:, :C]
    else:
        loss, count = positives.sigmoid_loss_of_logits(logits[:B], (ids[0][:B], ids[1]))
        candidates = logits[B:, :C][:, positives.take_part(ids[1][:C])]
    extra = torch.nn.functional.softplus(candidates).sum()
    return contrastive.reduce(loss, count, reduction) + (extra / count.clamp(min=1) if reduction == "mean" else extra)


def formula_siglip_loss(x: Tensor, y: Tensor, *, logit_scale: float | Tensor, logit_bias: float | Tensor) -> Tensor:
    """The usual code: the matrix of logits, a matrix of signs, logsigmoid. For comparisons; B = C."""
    logits = logit_scale * (x @ y.mT) + logit_bias
    signs = 2 * torch.eye(logits.shape[0], dtype=logits.dtype, device=logits.device) - 1
    return -torch.nn.functional.logsigmoid(signs * logits).sum() / logits.shape[0]
