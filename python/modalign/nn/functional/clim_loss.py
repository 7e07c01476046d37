"""CLIP's loss with cells of mosaics in the place of whole pictures. [CLIM, AAAI 2024]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops import _arguments as arguments
from ...ops import _contrastive as contrastive
from ...ops import clip_loss
from ...ops._gram_schmidt import unit
from . import _features as inputs
from ._values import looked_at

__all__ = ["clim_loss"]


def clim_loss(
    cells: Tensor,
    text: Tensor,
    order: Tensor,
    *,
    logit_scale: float | Tensor,
    normalize: bool = True,
    reduction: str = "mean",
    process_group: Any = None,
    gather_grad: str = "full",
) -> Tensor:
    r"""`ops.clip_loss` of regions and the texts of the pictures they show; the texts are constants.

    >>> import torch
    >>> clim_loss(torch.eye(3).flip(0), torch.eye(3), torch.tensor([2, 1, 0]), logit_scale=1.0)
    tensor(0.5514)

    Parameters
    ----------
    cells : Tensor [B, D]
        Features of the cells of all mosaics, then of the pictures that stay single: ``order`` says which picture each of them shows.
    text : Tensor [B, D]
        Row i belongs to picture i. Without gradient: the text encoder is frozen.
    order : Tensor int64 [B]
        A permutation, as `clim_mosaic` gives it.
    logit_scale : float or Tensor of one element
        Multiplies, already exponentiated; positive. That of the model.
    normalize : bool
        Scale all vectors to unit length first.
    reduction : str
        "mean", "sum" or "none": [B], in the order of the pictures.
    process_group, gather_grad
        See `ops.clip_loss`.

    Returns
    -------
    Tensor, float32 (float64 for float64)

    Gradient
    --------
    In cells and logit_scale. Double backward and forward mode raise.

    Edges
    -----
    Those of `ops.clip_loss`.

    Raises
    ------
    TypeError, ValueError
        ``clim_loss: <argument> must ..., got ...``; for an order that is no permutation on the CPU only.

    Complexity
    ----------
    That of `ops.clip_loss`; memory linear in B.

    Paper: Wu et al., "CLIM: contrastive language-image mosaic for region representation", AAAI 2024, section 3.2.
    """
    op = "clim_loss"
    cells, text = inputs.check_features(op, cells=(cells, "[B, D]"), text=(text, "[B, D]"))
    order = inputs.check_whole(op, "order", order, torch.int64, "[B]", (len(cells),), cells)
    place = order.argsort()
    if looked_at(order) and not torch.equal(order[place], torch.arange(len(order))):
        raise ValueError(f"{op}: order must hold each of 0 to B - 1 = {len(order) - 1} once, got {order.tolist()}")
    logit_scale = inputs.check_scale(op, "logit_scale", logit_scale, cells)
    normalize = arguments.check_flag(op, "normalize", normalize)
    reduction = contrastive.check_reduction(op, reduction)
    contrastive.check_group(op, process_group, gather_grad, "gather")
    with torch.autocast(cells.device.type, enabled=False):
        cells, text = cells[place], text.detach()
        if normalize:
            cells, text = unit(cells), unit(text)
        return clip_loss(cells, text, logit_scale=logit_scale, reduction=reduction, process_group=process_group, gather_grad=gather_grad)
