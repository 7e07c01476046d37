"""Tokens that are as different as can be: max-min diversity. [DivPrune, CVPR 2025]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from ._registration import accumulation_dtype, register_looping_vmap
from ._results import Selection

__all__ = ["reference_select_diverse", "select_diverse"]

WORKSPACE_BYTES = 1 << 26


def select_diverse(features: Tensor, n: int, *, lengths: Tensor | None = None, start: Tensor | None = None, workspace_bytes: int | None = None) -> Selection:
    r"""n tokens of every item, one after the other the farthest from those taken::

        d_ij = 1 - cos(m_i, m_j)
        s_0 = argmax over i of min over j != i of d_ij        s_t = argmax over i not taken of min over taken u of d_iu

    >>> import torch
    >>> select_diverse(torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.1]]]), 3)
    Selection(indices=tensor([[3, 0, 2]]), radii=tensor([[   inf, 1.9950, 0.9005]]))

    Parameters
    ----------
    features : Tensor [B, N, D]
        Tokens, such as a picture's for a language model.
    n : int
        From 0 to N. The first tokens of a larger n are those of a smaller one.
    lengths : Tensor int64 [B], optional
        Only the first so many tokens of an item are there; at least n.
    start : Tensor int64 [B] or [B, k], optional
        Tokens that are taken first.
    workspace_bytes : int, optional
        For the cosines of all pairs of an item, default 64 MiB. Where they do not fit they are made again.

    Returns
    -------
    Selection(indices, radii): int64 [B, n] in the order in which tokens were taken (sort them for their places in a sequence), and float32 (float64) [B, n], how far each was from those before it,
    infinity for the first, never rising.

    Gradient
    --------
    None: which tokens are taken is decided, not differentiated. Gather what goes with them.

    Edges
    -----
    Equal distances: the lower index. Tokens are taken once, also where others are equal to them. A zero vector is at distance 1 from everything; tokens with NaN or infinity are taken last, with
    radius NaN. N = 1: token 0.

    Raises
    ------
    TypeError, ValueError
        ``select_diverse: <argument> must ..., got ...``; RuntimeError for values of lengths and start, which are looked at on the CPU only.

    Complexity
    ----------
    N^2 D FLOP an item for the first, N a step, or 2 N D where cosines do not fit.

    Paper: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025.
    """
    features, start, workspace = _checked("select_diverse", features, n, lengths, start, workspace_bytes)
    with torch.no_grad():
        return Selection(*torch.ops.modalign.select_diverse(features.detach(), None if lengths is None else lengths.contiguous(), start, n, workspace))


def _checked(op: str, features: Any, n: Any, lengths: Any, start: Any, workspace_bytes: Any) -> tuple[Tensor, Tensor | None, int]:
    arguments.check_vectors(op, "features", features, "[B, N, D]")
    if features.dim() != 3:
        raise ValueError(f"{op}: features must have shape [B, N, D], got {arguments.describe(features)}")
    B, N, _ = features.shape
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"{op}: n must be a whole number, got {arguments.describe(n)}")
    if not 0 <= n <= N:
        raise ValueError(f"{op}: n must be from 0 to N = {N}, got {n}")
    for name, value in (("lengths", lengths), ("start", start)):
        if value is not None and (not isinstance(value, Tensor) or value.dtype is not torch.int64):
            raise TypeError(f"{op}: {name} must be an int64 tensor, got {arguments.describe(value)}")
        if value is not None and (value.shape[:1] != (B,) or value.dim() > (2 if name == "start" else 1) or value.device != features.device):
            raise ValueError(f"{op}: {name} must have shape [{B}{'] or [' + str(B) + ', k' if name == 'start' else ''}] on {features.device}, got {arguments.describe(value)}")
    if start is not None:
        start = (start[:, None] if start.dim() == 1 else start).contiguous()
        if start.shape[1] > n:
            raise ValueError(f"{op}: start must have at most n = {n} tokens, got {start.shape[1]}")
    if workspace_bytes is not None and (isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int) or workspace_bytes < 0):
        raise ValueError(f"{op}: workspace_bytes must be None or a whole number of 0 or more, got {arguments.describe(workspace_bytes)}")
    return features, start, WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes


@torch.library.register_fake("modalign::select_diverse")
def _fake(features: Tensor, lengths: Tensor | None, start: Tensor | None, n: int, workspace_bytes: int) -> tuple[Tensor, Tensor]:
    shape = (features.shape[0], n)
    return features.new_empty(shape, dtype=torch.int64), features.new_empty(shape, dtype=accumulation_dtype(features.dtype))


register_looping_vmap("modalign::select_diverse", contiguous=(1, 2))


def reference_select_diverse(features: Tensor, n: int, *, lengths: Tensor | None = None, start: Tensor | None = None) -> Selection:
    """`select_diverse` from the matrix of distances, with the running minimum of distances to those taken."""
    features, start, _ = _checked("reference_select_diverse", features, n, lengths, start, None)
    B, N, _ = features.shape
    length = features.norm(dim=-1)
    inverse = torch.where(length > 0, 1 / length, 0)
    distance = 1 - (features @ features.mT) * (inverse[:, None, :] * inverse[:, :, None])  # symmetric, also in rounding
    token = torch.arange(N, device=features.device)
    there = token < (torch.full((B,), N, device=features.device) if lengths is None else lengths)[:, None]
    distance = torch.where(distance.isnan() | ~there[:, None, :], torch.inf, distance)
    broken = ~features.isfinite().all(-1)
    nearest = distance.masked_fill(torch.eye(N, dtype=torch.bool, device=features.device), torch.inf).amin(2)
    apart = torch.full_like(nearest, torch.inf)
    indices, radii = [], []
    for t in range(n):
        rank = (nearest if t == 0 else apart).masked_fill(broken, -1).masked_fill(~there, -3)
        if indices:
            rank = rank.scatter(1, torch.stack(indices, 1), -4)
        pick = start[:, t] if start is not None and t < start.shape[1] else rank.argmax(1)
        radii.append(torch.where(broken.gather(1, pick[:, None])[:, 0], torch.nan, apart.gather(1, pick[:, None])[:, 0].clamp(min=0)))
        indices.append(pick)
        apart = apart.minimum(distance[torch.arange(B, device=features.device), pick])
    real = accumulation_dtype(features.dtype)
    if n == 0:
        return Selection(token.new_empty(B, 0), features.new_empty((B, 0), dtype=real))
    return Selection(torch.stack(indices, 1), torch.stack(radii, 1).to(real))
