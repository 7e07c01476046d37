"""Points, text and several views of an object, the views weighted by the text. [JM3D, ACM MM 2023]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops import _arguments as arguments
from ...ops import _contrastive as contrastive
from ...ops import clip_loss
from ...ops._gram_schmidt import unit
from . import _features as inputs

__all__ = ["jma_loss"]


def jma_loss(
    points: Tensor,
    text: Tensor,
    views: Tensor,
    *,
    enhanced: Tensor | None = None,
    logit_scale: float | Tensor = 1 / 0.07,
    normalize: bool = True,
    reduction: str = "mean",
    process_group: Any = None,
    gather_grad: str = "full",
) -> Tensor:
    r"""CLIP's loss of the three pairs among points, text and a picture, which is the mean of the views by how well each of them fits the text.

    ::

        picture_b = sum_v softmax_v(views_bv . text_b) enhanced_bv
        loss      = clip_loss(points, text) + clip_loss(points, picture) + clip_loss(text, picture)

    >>> import torch
    >>> jma_loss(torch.eye(2), torch.eye(2), torch.eye(2)[:, None], logit_scale=1.0)          # one view
    tensor(0.9398)

    Parameters
    ----------
    points, text : Tensor [B, D]
        Row i of both is object i.
    views : Tensor [B, V, D]
        V of 1 or more views of each object, from the frozen image encoder: these are compared with the text.
    enhanced : Tensor [B, V, D], optional
        The views that are averaged, such as `nn.ViewEmbedding` gives them. Default: `views`.
    logit_scale : float or Tensor of one element
        Multiplies, already exponentiated; positive. A tensor gets a gradient.
    normalize : bool
        Scale all vectors to unit length first. The mean of the views is not scaled again.
    reduction : str
        "mean", "sum" or "none": [B].
    process_group, gather_grad
        See `ops.clip_loss`.

    Returns
    -------
    Tensor, float32 (float64 for float64)

    Gradient
    --------
    In all tensors and logit_scale. Double backward and forward mode raise.

    Edges
    -----
    V = 1: three plain losses. B = 1: 0. A NaN makes the loss NaN.

    Raises
    ------
    TypeError, ValueError
        ``jma_loss: <argument> must ..., got ...``

    Complexity
    ----------
    Three times `ops.clip_loss`; memory linear in B V D.

    Paper: Wang et al., "Beyond first impressions: integrating joint multi-modal cues for comprehensive 3D representation", ACM MM 2023, section 3.3.
    """
    op = "jma_loss"
    enhanced = views if enhanced is None else enhanced
    points, text, views, enhanced = inputs.check_features(
        op, points=(points, "[B, D]"), text=(text, "[B, D]"), views=(views, "[B, V, D]"), enhanced=(enhanced, "[B, V, D]")
    )
    if views.shape[1] == 0:
        raise ValueError(f"{op}: views must hold at least one view of each object, got {arguments.describe(views)}")
    logit_scale = inputs.check_scale(op, "logit_scale", logit_scale, points)
    normalize = arguments.check_flag(op, "normalize", normalize)
    reduction = contrastive.check_reduction(op, reduction)
    contrastive.check_group(op, process_group, gather_grad, "gather")
    with torch.autocast(points.device.type, enabled=False):
        if normalize:
            points, text, views, enhanced = unit(points), unit(text), unit(views), unit(enhanced)
        weights = (views @ text[..., None]).softmax(1)
        picture = (weights * enhanced).sum(1)
        options = {"logit_scale": logit_scale, "reduction": reduction, "process_group": process_group, "gather_grad": gather_grad}
        return clip_loss(points, text, **options) + clip_loss(points, picture, **options) + clip_loss(text, picture, **options)
