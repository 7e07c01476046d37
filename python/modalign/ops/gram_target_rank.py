"""How many candidates lie before each anchor's own by Gramian volume, without the matrix of volumes. [GRAM, ICLR 2025]"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _contrastive as contrastive
from . import _volume_panels as volume_panels
from ._registration import accumulation_dtype, refuse_forward_mode
from .gram_topk import reference_gram_topk

__all__ = ["gram_target_rank", "reference_gram_target_rank"]


def gram_target_rank(
    anchor: Tensor,
    others: Sequence[Tensor],
    target: Tensor,
    *,
    present: Tensor | None = None,
    normalize: bool | str = False,
    workspace_bytes: int | None = None,
) -> Tensor:
    r"""The place of candidate ``t_i`` in the list that `gram_topk` would give for anchor i: the number of candidates before it, 0 for the best.

    ::

        rank_i = #{ j : V[i, j] < V[i, t_i], or V[i, j] = V[i, t_i] and j < t_i }

    >>> import torch
    >>> gram_target_rank(torch.eye(4)[:2], [torch.eye(4), torch.eye(4).roll(2, 0)], torch.tensor([2, -100]))
    tensor([ 1, -1])

    Parameters
    ----------
    anchor : Tensor [B, D]
    others : sequence of m >= 1 Tensor [C, D]
        Row j of all of them belongs to candidate j.
    target : Tensor int64 [B]
        The candidate to find, 0 to C - 1; -100 (or -1) for a row without one.
    present, normalize, workspace_bytes
        See `gram_topk`.

    Returns
    -------
    Tensor int64 [B]: 0 to C - 1, and -1 for a row without a target.

    Gradient
    --------
    None: a count has none. Forward mode raises.

    Edges
    -----
    Equal volumes go by index, so candidates that all look alike give ``t_i`` and not 0. A NaN lies behind every number. B = 0: empty. C = 0: -1. On a GPU,
    where values are not looked at, a target out of range gives -1. From 8 others on, see `gram_topk`.

    Raises
    ------
    TypeError, ValueError
        ``gram_target_rank: <argument> must ..., got ...``; RuntimeError for a target out of range, on the CPU only.

    Complexity
    ----------
    2 B C m D FLOP. Memory beyond the result as in `gram_topk`.

    Paper: Cicchetti et al., "Gramian Multimodal Representation Learning and Alignment", ICLR 2025, section 4: retrieval by volume.
    """
    op = "gram_target_rank"
    anchor, vectors, present = volume_panels.check_tuples(op, anchor, others, present)
    B, C = anchor.shape[0], vectors[0].shape[0]
    if target is None:
        raise TypeError(f"{op}: target must be an int64 tensor [B], got None")
    target = contrastive.check_target(op, target, B, C, anchor)
    normalize = arguments.check_normalize(op, normalize, squared=False)
    workspace = volume_panels.check_workspace(op, workspace_bytes)
    refuse_forward_mode(op, (anchor, *vectors))
    there = (target >= 0) & (target < C)
    wrong = ~there & (target != -1) & (target != contrastive.IGNORED)
    if target.device.type == "cpu" and bool(wrong.any()):
        raise RuntimeError(f"{op}: target must be -100, -1 or from 0 to C - 1 = {C - 1}, got {int(target[wrong][0])}")
    if C == 0:
        return torch.full_like(target, -1)
    at = target.clamp(0, C - 1)
    rows, columns = volume_panels.panel_sizes(B, C, 1, accumulation_dtype(anchor.dtype), workspace)
    with torch.no_grad(), torch.autocast(anchor.device.type, enabled=False):

        def own_volume(few: slice) -> Tensor:
            return volume_panels.volumes(anchor, vectors, present, normalize, few, at[few]).diagonal()

        own = torch.cat([own_volume(few) for few in volume_panels.panels(B, volume_panels.LEAST)])[:, None]
        ranks = []
        for panel in volume_panels.panels(B, rows):
            rank = torch.zeros_like(at[panel])
            for candidates in volume_panels.panels(C, columns):
                volume = volume_panels.volumes(anchor, vectors, present, normalize, panel, candidates)
                index = torch.arange(candidates.start, candidates.stop, device=at.device)
                rank += _before(volume, index, own[panel], at[panel, None]).sum(1)
            ranks.append(rank)
        return torch.where(there, torch.cat(ranks), -1)


def _before(volume: Tensor, index: Tensor, own: Tensor, at: Tensor) -> Tensor:
    """Which candidates lie before the target; it is never before itself."""
    smaller = (volume < own) | (own.isnan() & ~volume.isnan())
    equal = (volume == own) | (own.isnan() & volume.isnan())
    return (smaller & (index != at)) | (equal & (index < at))


# ---------------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_gram_target_rank(
    anchor: Tensor, others: Sequence[Tensor], target: Tensor, *, present: Tensor | None = None, normalize: bool | str = False
) -> Tensor:
    """`gram_target_rank` in plain torch: the target's place in a stable sort of all volumes; every row has one."""
    _, order = reference_gram_topk(anchor, others, others[0].shape[0], present=present, normalize=normalize)
    return (order == target[:, None]).int().argmax(1)
