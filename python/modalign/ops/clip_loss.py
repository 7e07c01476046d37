"""CLIP's contrastive loss, both directions, without the matrix of similarities. [CLIP, ICML 2021]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _contrastive as contrastive
from . import _positives as positives
from ._gram_schmidt import unit
from ._registration import autocast_is_on, refuse_forward_mode, to_autocast
from .pairwise_logsumexp import check_like, check_pair

__all__ = ["clip_loss", "reference_clip_loss", "formula_clip_loss"]

Negatives = tuple[Tensor | None, Tensor | None]  # more rows of x, more rows of y


def clip_loss(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    target: Tensor | None = None,
    positive_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    negatives: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    label_smoothing: float = 0,  # an int: torch.compile(dynamic=True) would trace a float default twice
    direction: str = "both",
    normalize: bool = False,
    reduction: str = "mean",
    return_accuracy: bool = False,
    process_group: Any = None,
    gather_grad: str = "full",
    exchange: str = "gather",
    implementation: str = "auto",
    workspace_bytes: int | None = None,
) -> Any:
    r"""InfoNCE over all pairs of rows of x and y with logits ``logit_scale x_i . y_j + logit_bias``; rows and columns at once.

    ::

        loss_i = 1/2 CE(z[i, :], t_i) + 1/2 CE(z[:, t_i], i)

    and the mean of that over the labelled rows. A tile of logits is made, folded into log-sum-exps of its rows and columns, and forgotten; the backward
    makes it again. Training memory is linear in B and C.

    >>> import torch
    >>> clip_loss(torch.eye(3), torch.eye(3), logit_scale=1.0)
    tensor(0.5514)

    Parameters
    ----------
    x : Tensor [B, D]
    y : Tensor [C, D]
        Unit rows in the published model; see ``normalize``.
    logit_scale : float or Tensor of one element
        Multiplies, already exponentiated; positive. A tensor gets a gradient.
    logit_bias : float or Tensor of one element, optional
        Added to all logits: without effect on this loss, taken for the sake of training loops that pass it.
    target : Tensor int64 [B], optional
        The candidate of each row; -1: none; -100: the row takes no part. Default: row i belongs to candidate i, and B must equal C.
    positive_ids : Tensor int64 [B], or two of them, [B] and [C], optional
        In place of ``target``: every candidate with the id of a row is a positive of it. The label of a row, and of a candidate, is shared equally among its
        positives, and the loss is half the mean over the rows that have any plus half that over the candidates that have any. -1: equal to no other id;
        -100: takes no part. One tensor is the ids of both sides. Not with ``return_accuracy``, ``process_group``, kept products, nor ``reduction="none"`` of
        both directions at once; of one it gives [B] or [C].
    negatives : Tensor [K, D], or a pair of Tensor [K, D] or None, optional
        More rows that are nobody's positives, such as queues. A pair: more rows of x, which columns are compared with, and more rows of y, which rows are
        compared with. A single tensor: more rows of y, behind those that are there; ``target`` may point to them.
    label_smoothing, direction, reduction, return_accuracy
        See `gram_contrastive_loss`.
    normalize : bool
        Scale all rows to unit length first.
    process_group, gather_grad, exchange, implementation, workspace_bytes
        See `gram_contrastive_loss`.

    Returns
    -------
    Tensor, float32 (float64 for float64), or (Tensor, Tensor [2])

    Gradient
    --------
    Closed form in x, y, negatives, logit_scale and logit_bias (the last is 0 but for rounding). Double backward and forward mode raise.

    Edges
    -----
    B = C = 1: 0. No labelled row: 0 with gradient 0. A NaN that takes part makes the loss NaN.

    Raises
    ------
    TypeError, ValueError
        ``clip_loss: <argument> must ..., got ...``; RuntimeError for values of tensors (a scale that is not positive, a target out of range), which are
        looked at on the CPU only.

    Complexity
    ----------
    2 B C D FLOP, the backward 6 B C D; memory beyond inputs and gradients about 4 (B + C) D, and the workspace; with ``positive_ids`` about 8 (B + C) D.

    Paper: Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021, figure 3. Several positives: Yang et al.,
    "Unified contrastive learning in image-text-label space", CVPR 2022.
    """
    op = "clip_loss"
    x, y, negatives = _checked(op, x, y, negatives)
    ids = positives.check_positive_ids(op, positive_ids, target, x, y)
    target = None if ids is not None else contrastive.check_target(op, target, x.shape[0], y.shape[0], x)
    smoothing = contrastive.check_label_smoothing(op, label_smoothing)
    normalize = arguments.check_flag(op, "normalize", normalize)
    direction = contrastive.check_direction(op, direction)
    reduction = contrastive.check_reduction(op, reduction)
    return_accuracy = arguments.check_flag(op, "return_accuracy", return_accuracy)
    workspace = contrastive.check_workspace(op, implementation, workspace_bytes, process_group)
    contrastive.check_group(op, process_group, gather_grad, exchange)
    check_alone(op, negatives, process_group)
    if ids is not None:
        kept = None if implementation == "streaming" else implementation
        positives.check_without(op, process_group=process_group, return_accuracy=return_accuracy, implementation=kept, workspace_bytes=workspace_bytes)
        if reduction == "none" and direction == "both":
            raise ValueError(f'{op}: reduction must be "mean" or "sum" for both directions of positive_ids, as rows and candidates differ in number, got "none"')
    x, y, (more_x, more_y), scale, bias = prepared(op, x, y, negatives, logit_scale, logit_bias, target, ids, normalize)
    B, C = x.shape[0], y.shape[0]
    with torch.autocast(x.device.type, enabled=False):
        if ids is not None:
            both = labels_of(ids[0], more_x), labels_of(ids[1], more_y)
            loss = positives.softmax_loss(joined(x, more_x), joined(y, more_y), both, scale, bias, smoothing, direction, reduction)
            return loss[: B if direction == "rows" else C] if reduction == "none" else loss
        if more_x is not None or more_y is not None:
            target = labels_of(torch.arange(B, device=x.device) if target is None else target, more_x)
        found = contrastive.evaluate(
            op, joined(x, more_x), [joined(y, more_y)], scale, bias, target, None, smoothing, direction, 0.0, reduction, return_accuracy, workspace, process_group, gather_grad, exchange
        )
        if reduction != "none" or more_x is None:
            return found
        return (found[0][:B], found[1]) if return_accuracy else found[:B]


def check_alone(op: str, negatives: Negatives, process_group: Any) -> None:
    if process_group is not None and any(more is not None for more in negatives):
        raise ValueError(f"{op}: negatives must be None together with process_group, got a tensor")


def prepared(
    op: str,
    x: Tensor,
    y: Tensor,
    negatives: Negatives,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    target: Tensor | None,
    ids: positives.Ids | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Negatives, Tensor, Tensor | None]:
    """Both sides and their negatives in the dtype to compute in, without what takes no part, of unit length if asked for; scale and bias as tensors."""
    refuse_forward_mode(op, [value for value in (x, y, *negatives, logit_scale, logit_bias) if isinstance(value, Tensor)])
    if autocast_is_on(x.device.type):
        x, y, *negatives = (None if value is None else to_autocast(value) for value in (x, y, *negatives))
    scale = contrastive.check_scalar(op, "logit_scale", logit_scale, x, positive=True)
    bias = None if logit_bias is None else contrastive.check_scalar(op, "logit_bias", logit_bias, x, positive=False)
    with torch.autocast(x.device.type, enabled=False):
        if ids is not None:
            x, y = contrastive.without_ignored(x, ids[0]), contrastive.without_ignored(y, ids[1])
        elif normalize:
            x = contrastive.without_ignored(x, target)
        if normalize:
            x, y, *negatives = (None if value is None else unit(value) for value in (x, y, *negatives))
    return x, y, tuple(negatives), scale, bias


def joined(rows: Tensor, more: Tensor | None) -> Tensor:
    return rows if more is None else torch.cat([rows, more])


def labels_of(labels: Tensor, more: Tensor | None) -> Tensor:
    """Nobody belongs to `more` rows or candidates: -1 among targets as among ids."""
    return labels if more is None else torch.cat([labels, labels.new_full((more.shape[0],), -1)])


def _checked(op: str, x: object, y: object, negatives: object) -> tuple[Tensor, Tensor, Negatives]:
    x, y = check_pair(op, x, y)
    if negatives is None or isinstance(negatives, Tensor):
        return x, y, (None, None if negatives is None else check_like(op, "negatives", negatives, "[K, D]", x))
    if not (isinstance(negatives, (tuple, list)) and len(negatives) == 2):
        raise TypeError(f"{op}: negatives must be None, a tensor [K, D], or two of these for x and y, got {arguments.describe(negatives)}")
    return x, y, tuple(None if more is None else check_like(op, f"negatives[{side}]", more, "[K, D]", x) for side, more in enumerate(negatives))


# ---------------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_logits(
    x: Tensor, y: Tensor, negatives: Negatives, logit_scale: float | Tensor, logit_bias: float | Tensor | None, target: Tensor | None, ids: positives.Ids | None, normalize: bool
) -> tuple[Tensor, Tensor | None, positives.Ids | None]:
    """All logits, those of negatives behind the others, and the target or the ids of all rows and candidates."""
    more_x, more_y = negatives
    real = torch.float64 if x.dtype is torch.float64 else torch.float32
    if ids is not None:
        ids = labels_of(ids[0], more_x), labels_of(ids[1], more_y)
    elif target is not None or more_x is not None or more_y is not None:
        target = labels_of(torch.arange(x.shape[0], device=x.device) if target is None else target, more_x)
    x, y = joined(x, more_x).to(real), joined(y, more_y).to(real)
    x = contrastive.without_ignored(x, target if ids is None else ids[0])
    y = y if ids is None else contrastive.without_ignored(y, ids[1])
    if normalize:
        x, y = unit(x), unit(y)
    return logit_scale * (x @ y.mT) + (0 if logit_bias is None else logit_bias), target, ids


def reference_clip_loss(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    target: Tensor | None = None,
    positive_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    negatives: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    label_smoothing: float = 0.0,
    direction: str = "both",
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """`clip_loss` in a few lines of differentiable torch; stores B x C numbers."""
    op = "reference_clip_loss"
    x, y, negatives = _checked(op, x, y, negatives)
    ids = positives.check_positive_ids(op, positive_ids, target, x, y)
    logits, target, ids = reference_logits(x, y, negatives, logit_scale, logit_bias, target, ids, normalize)
    if ids is not None:
        loss = positives.positives_of_logits(logits, ids, label_smoothing=label_smoothing, direction=direction, reduction=reduction)
        return loss[: (x if direction == "rows" else y).shape[0]] if reduction == "none" else loss
    loss, count = contrastive.loss_of_logits(logits, target, label_smoothing=label_smoothing, direction=direction)
    return contrastive.reduce(loss[: x.shape[0]], count, reduction)


def formula_clip_loss(x: Tensor, y: Tensor, *, logit_scale: float | Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The usual code: the matrix of logits and two cross entropies. For comparisons; B = C."""
    return contrastive.two_entropies(logit_scale * (x @ y.mT), label_smoothing)
