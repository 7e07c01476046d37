"""CLIP's contrastive loss, both directions, without the matrix of similarities. [CLIP, ICML 2021]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _contrastive as contrastive
from ._gram_schmidt import unit
from ._registration import autocast_is_on, refuse_forward_mode, to_autocast

__all__ = ["clip_loss", "reference_clip_loss", "formula_clip_loss"]


def clip_loss(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    target: Tensor | None = None,
    negatives: Tensor | None = None,
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
    negatives : Tensor [K, D], optional
        More candidates, such as a queue, behind those of y; they belong to no row unless ``target`` says so.
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
    2 B C D FLOP, the backward 6 B C D; memory beyond inputs and gradients about 4 (B + C) D, and the workspace.

    Paper: Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021, figure 3.
    """
    op = "clip_loss"
    x, y, negatives = _checked(op, x, y, negatives)
    target = contrastive.check_target(op, target, x.shape[0], y.shape[0], x)
    smoothing = contrastive.check_label_smoothing(op, label_smoothing)
    normalize = arguments.check_flag(op, "normalize", normalize)
    direction = contrastive.check_direction(op, direction)
    reduction = contrastive.check_reduction(op, reduction)
    return_accuracy = arguments.check_flag(op, "return_accuracy", return_accuracy)
    workspace = contrastive.check_workspace(op, implementation, workspace_bytes, process_group)
    contrastive.check_group(op, process_group, gather_grad, exchange)
    return pair_loss(op, x, y, negatives, logit_scale, logit_bias, target, smoothing, direction, normalize, reduction, return_accuracy, workspace, process_group, gather_grad, exchange)


def pair_loss(
    op: str,
    x: Tensor,
    y: Tensor,
    negatives: Tensor | None,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    target: Tensor | None,
    label_smoothing: float,
    direction: str,
    normalize: bool,
    reduction: str,
    return_accuracy: bool,
    workspace: int,
    process_group: Any,
    gather_grad: str,
    exchange: str,
) -> Any:
    """What `clip_loss` and `siglip_loss` do with checked arguments."""
    refuse_forward_mode(op, [value for value in (x, y, negatives, logit_scale, logit_bias) if isinstance(value, Tensor)])
    if autocast_is_on(x.device.type):
        x, y = to_autocast(x), to_autocast(y)
        negatives = None if negatives is None else to_autocast(negatives)
    scale = contrastive.check_scalar(op, "logit_scale", logit_scale, x, positive=True)
    bias = None if logit_bias is None else contrastive.check_scalar(op, "logit_bias", logit_bias, x, positive=False)
    with torch.autocast(x.device.type, enabled=False):
        if negatives is not None:
            if process_group is not None:
                raise ValueError(f"{op}: negatives must be None together with process_group, got a tensor")
            if target is None:
                target = torch.arange(x.shape[0], device=x.device)
            y = torch.cat([y, negatives])
        if normalize:
            x, y = unit(contrastive.without_ignored(x, target)), unit(y)
        return contrastive.evaluate(op, x, [y], scale, bias, target, None, label_smoothing, direction, 0.0, reduction, return_accuracy, workspace, process_group, gather_grad, exchange)


def _checked(op: str, x: object, y: object, negatives: object) -> tuple[Tensor, Tensor, Tensor | None]:
    x = contrastive.check_matrix(op, "x", x, "[B, D]")
    mixed = autocast_is_on(x.device.type)

    def like_x(name: str, value: object, shape: str) -> Tensor:
        value = contrastive.check_matrix(op, name, value, shape)
        arguments.check_alike(op, name, to_autocast(value) if mixed else value, "x", to_autocast(x) if mixed else x)
        return value

    return x, like_x("y", y, "[C, D]"), None if negatives is None else like_x("negatives", negatives, "[K, D]")


# ---------------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_logits(x: Tensor, y: Tensor, negatives: Tensor | None, logit_scale: float | Tensor, logit_bias: float | Tensor | None, target: Tensor | None, normalize: bool) -> Tensor:
    real = torch.float64 if x.dtype is torch.float64 else torch.float32
    x, y = x.to(real), (y if negatives is None else torch.cat([y, negatives])).to(real)
    if target is not None:
        x = torch.where((target != contrastive.IGNORED)[:, None], x, 0)
    if normalize:
        x, y = unit(x), unit(y)
    return logit_scale * (x @ y.mT) + (0 if logit_bias is None else logit_bias)


def reference_clip_loss(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    target: Tensor | None = None,
    negatives: Tensor | None = None,
    label_smoothing: float = 0.0,
    direction: str = "both",
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """`clip_loss` in a few lines of differentiable torch; stores B x C numbers."""
    x, y, negatives = _checked("reference_clip_loss", x, y, negatives)
    logits = reference_logits(x, y, negatives, logit_scale, logit_bias, target, normalize)
    loss, count = contrastive.loss_of_logits(logits, target, label_smoothing=label_smoothing, direction=direction)
    return contrastive.reduce(loss, count, reduction)


def formula_clip_loss(x: Tensor, y: Tensor, *, logit_scale: float | Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The usual code: the matrix of logits and two cross entropies. For comparisons; B = C."""
    return contrastive.two_entropies(logit_scale * (x @ y.mT), label_smoothing)
