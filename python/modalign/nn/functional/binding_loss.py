"""Every modality against one anchor modality. [ImageBind, CVPR 2023]"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops import _arguments as arguments
from ...ops import clip_loss
from . import _features as inputs

__all__ = ["binding_loss"]


def binding_loss(
    anchor: Tensor,
    others: Sequence[Tensor],
    *,
    logit_scale: float | Tensor | Sequence[float | Tensor],
    present: Tensor | None = None,
    normalize: bool = True,
    process_group: Any = None,
    gather_grad: str = "full",
) -> Tensor:
    """Sum of `ops.clip_loss` of the anchor with each other modality, over the samples that have it.

    >>> import torch
    >>> binding_loss(torch.eye(3), [torch.eye(3), torch.eye(3)], logit_scale=[14.3, 1.0])
    tensor(0.5514)

    Parameters
    ----------
    anchor : Tensor [B, D]
    others : sequence of m Tensors [B, D]
        Row i of all belongs to sample i.
    logit_scale : float or Tensor of one element, or a sequence of m of them
        Published: text learnt from 1 / 0.07 and at most 100, audio 20, depth 5, thermal 10, inertial 5.
    present : Tensor bool [B, m], optional
        False: sample i lacks modality p. Then it is neither row nor candidate of that pair, and what stands there is never read.
    normalize : bool
        Make all vectors unit length, as published.
    process_group, gather_grad
        See `ops.gram_contrastive_loss`.

    Returns
    -------
    Tensor, float32 (float64 for float64)

    Gradient
    --------
    In anchor, others and logit_scale, once. No matrix of similarities is stored. With `present` a GPU is waited for, since rows are picked out.

    Edges
    -----
    A modality that no sample has adds 0.

    Raises
    ------
    TypeError, ValueError
        ``binding_loss: <argument> must ..., got ...``

    Paper: Girdhar et al., "ImageBind: one embedding space to bind them all", CVPR 2023, section 3.2.
    """
    op = "binding_loss"
    others = arguments.check_sequence(op, "others", others, "others[{}]", "[B, D]")
    inputs.check_features(op, anchor=(anchor, "[B, D]"), **{f"others[{p}]": (other, "[B, D]") for p, other in enumerate(others)})
    scales = list(logit_scale) if isinstance(logit_scale, Sequence) and not isinstance(logit_scale, str) else [logit_scale] * len(others)
    if len(scales) != len(others):
        raise ValueError(f"{op}: logit_scale must be one number or {len(others)}, one for each modality, got {len(scales)}")
    if present is not None:
        present = inputs.check_whole(op, "present", present, torch.bool, "[B, m]", (anchor.shape[0], len(others)), anchor)
    total: Any = 0
    for p, (other, scale) in enumerate(zip(others, scales, strict=True)):
        rows = slice(None) if present is None else present[:, p]
        total = total + clip_loss(anchor[rows], other[rows], logit_scale=scale, normalize=normalize, process_group=process_group, gather_grad=gather_grad)
    return total
