"""Linked entities of two graphs against all others of both. [MCLEA, COLING 2022; UMAEA, ISWC 2023]"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...ops._arguments import describe
from ...ops._contrastive import check_scalar

__all__ = ["entity_alignment_loss"]

PANEL_ROWS = 512


def entity_alignment_loss(left: Tensor, right: Tensor, *, temperature: float | Tensor = 0.1, confidence: tuple[Tensor, Tensor] | None = None, normalize: bool = True) -> Tensor:
    r"""InfoNCE both ways whose negatives come from the entity's own graph too.

    ::

        loss_i = - (log p(r_i | l_i) + log p(l_i | r_i)) / 2      p(r_i | l_i) = e^(l_i r_i / t) / (sum_j e^(l_i r_j / t) + sum_{j != i} e^(l_i l_j / t))

    >>> import torch
    >>> entity_alignment_loss(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.9048)

    Parameters
    ----------
    left, right : Tensor [N, D]
        Entities of the two graphs; row i of both is a link.
    temperature : float or Tensor of one element
        Published 0.1. A tensor gets a gradient.
    confidence : (Tensor [N], Tensor [N]), optional
        Of the two entities, in what their features say; a link counts with the lesser, so a doubtful side does not pull the other. No gradient.
    normalize : bool
        Rows to unit length first.

    Returns
    -------
    Tensor scalar, float32 (float64 for float64): the mean over links; with `confidence` the weighted sum over N. Gradient to both sides; panels of 512 links are made anew in the backward, so that no matrix N x 2N is stored.

    Raises
    ------
    TypeError, ValueError
        ``entity_alignment_loss: <argument> must ..., got ...``.
    """
    op = "entity_alignment_loss"
    for name, each in (("left", left), ("right", right)):
        if not isinstance(each, Tensor) or each.dim() != 2 or not each.is_floating_point() or each.shape != left.shape or each.dtype != left.dtype or len(each) == 0:
            raise ValueError(f"{op}: {name} must be a floating-point matrix [N, D] like the other, N 1 or more, got {describe(each)}")
    if confidence is not None and (not isinstance(confidence, (tuple, list)) or len(confidence) != 2):
        raise ValueError(f"{op}: confidence must be a pair of tensors, got {describe(confidence)}")
    scale = 1 / check_scalar(op, "temperature", temperature, left, positive=True)
    left, right = (each.to(scale.dtype) for each in (left, right))
    if normalize:
        left, right = (torch.nn.functional.normalize(each, dim=1) for each in (left, right))
    losses = [
        torch.cat([checkpoint(_panel, x[here], y, x, here.start, scale, use_reentrant=False) for here in _panels(len(x))]) for x, y in ((left, right), (right, left))
    ]
    each = (losses[0] + losses[1]) / 2
    if confidence is None:
        return each.mean()
    for side, value in zip(("left", "right"), confidence, strict=True):
        if not isinstance(value, Tensor) or value.shape != (len(left),) or not value.is_floating_point():
            raise ValueError(f"{op}: confidence of the {side} side must be a floating-point tensor [{len(left)}], got {describe(value)}")
    return (each * torch.minimum(*confidence).detach()).mean()


def _panels(size: int) -> list[slice]:
    return [slice(start, min(start + PANEL_ROWS, size)) for start in range(0, size, PANEL_ROWS)]


def _panel(rows: Tensor, others: Tensor, own: Tensor, first: int, scale: Tensor) -> Tensor:
    """Cross entropies of some rows, those from `first` on: their links among the others, against all of their own graph but themselves."""
    link = torch.arange(first, first + len(rows), device=rows.device)
    logits = torch.cat([rows @ others.T, rows @ own.T], 1) * scale
    itself = link[:, None] + len(others) == torch.arange(logits.shape[1], device=rows.device)
    return torch.nn.functional.cross_entropy(logits.masked_fill(itself, -torch.inf), link, reduction="none")
