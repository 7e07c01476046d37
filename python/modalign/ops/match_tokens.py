"""Which tokens of an image, a text or a clip become one: bipartite soft matching. [ToMe, ICLR 2023]"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from ._registration import accumulation_dtype
from ._token_match import TokenMatch, match_of_groups

__all__ = ["match_tokens", "reference_match_tokens"]

MOST = 2**31 - 1  # kernels count tokens in 32 bits


def match_tokens(
    features: Tensor,
    r: int | None = None,
    *,
    protected: int = 0,
    threshold: float | None = None,
    keep_order: bool = False,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
) -> TokenMatch:
    r"""Pairs up similar tokens: `r` of every item join another one.

    Tokens at even places look for the most similar one at an odd place, and the best pairs are joined::

        v_a = max over odd t of cos(m_a, m_t)        the r tokens a with the largest v_a join the t that attains it

    >>> import torch
    >>> match = match_tokens(torch.tensor([[[1.0], [1.0], [-1.0], [-1.0]]]), 1)
    >>> match.merge(torch.arange(4.0).view(1, 4, 1)).flatten(), match.source()
    (tensor([2.0000, 0.5000, 3.0000]), tensor([[1, 1, 0, 2]]))

    Parameters
    ----------
    features : Tensor [B, N, D] or packed [T, D]
        What is compared, such as an attention's keys, mean over heads.
    r : int, optional
        How many tokens of an item join others, at most half of those not protected. None: as many as pass the threshold.
    protected : int
        The first tokens (class, distillation, registers) that join nothing and that nothing joins.
    threshold : float, optional
        Only pairs that are more similar are joined. Items then differ in length, and the result is packed.
    keep_order : bool
        Merged tokens stand where the first of their tokens stood. False: in the order of the paper's code, see Returns.
    cu_seqlens : Tensor int32 [B + 1], optional
        Where packed items begin; `longest` is then the longest item, or more.

    Returns
    -------
    TokenMatch: `merge`, `merge_size`, `unmerge`, `source`. The order of the output: tokens that stay, by falling similarity (with `protected` by place, the protected first), then
    the tokens at odd places.

    Gradient
    --------
    None: which tokens are joined is decided, not differentiated. What `merge` and `unmerge` move has gradients.

    Edges
    -----
    Equal similarities: the earlier token wins. A zero vector has cosine 0 with everything; a NaN is the least similar. Where nothing is joined (r = 0, N < 2, nothing passes the threshold) an item
    keeps its order.

    Raises
    ------
    TypeError, ValueError
        ``match_tokens: <argument> must ..., got ...``; RuntimeError for cu_seqlens that do not rise from 0 to T, whose values are looked at on the CPU only.

    Complexity
    ----------
    D N^2 / 2 FLOP an item, memory linear in tokens, no matrix of similarities. A packed result waits once for a GPU, to know its length.

    Paper: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023; thresholds: Wang et al., "DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs", 2025.
    """
    features, cu, longest, cap = _checked("match_tokens", features, r, protected, threshold, keep_order, cu_seqlens, longest)
    with torch.no_grad():
        score, group, members, offsets, cu_after = torch.ops.modalign.match_tokens(features.detach(), cu, longest, protected, cap, None if threshold is None else float(threshold), keep_order)
    B, N = features.shape[:2]
    if cu is None and threshold is None:
        M = N - min(cap, max(0, N - protected) // 2)
        return TokenMatch(group.view(B, N), members, offsets[: B * M + 1], score.view(B, N))
    before = cu if cu is not None else torch.arange(B + 1, dtype=torch.int32, device=features.device) * N
    return TokenMatch(group, members, offsets[: int(cu_after[-1]) + 1], score, before, cu_after)


def _checked(op: str, features: Any, r: Any, protected: Any, threshold: Any, keep_order: Any, cu_seqlens: Any, longest: Any) -> tuple[Tensor, Tensor | None, int, int]:
    shape = "[B, N, D]" if cu_seqlens is None else "[T, D]"
    arguments.check_vectors(op, "features", features, shape)
    if features.dim() != shape.count(",") + 1:
        raise ValueError(f"{op}: features must have shape {shape}, got {arguments.describe(features)}")
    if r is None and threshold is None:
        raise TypeError(f"{op}: r must be a whole number unless there is a threshold, got None")
    for name, value in (("r", MOST if r is None else r), ("protected", protected)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{op}: {name} must be a whole number, got {arguments.describe(value)}")
        if value < 0:
            raise ValueError(f"{op}: {name} must be 0 or more, got {value}")
    if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or math.isnan(threshold)):
        raise TypeError(f"{op}: threshold must be None or a number, got {arguments.describe(threshold)}")
    arguments.check_flag(op, "keep_order", keep_order)
    if features.shape[:-1].numel() > MOST:
        raise ValueError(f"{op}: features must have fewer than 2^31 tokens, got {arguments.describe(features)}")
    if cu_seqlens is None:
        if longest is not None:
            raise ValueError(f"{op}: longest must be None unless there are cu_seqlens, got {longest!r}")
        return features, None, 0, MOST if r is None else r
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype is not torch.int32:
        raise TypeError(f"{op}: cu_seqlens must be an int32 tensor [items + 1], got {arguments.describe(cu_seqlens)}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.device != features.device:
        raise ValueError(f"{op}: cu_seqlens must have shape [items + 1] on {features.device}, got {arguments.describe(cu_seqlens)}")
    if isinstance(longest, bool) or not isinstance(longest, int) or longest < 0:
        raise TypeError(f"{op}: longest must be the length of the longest item, or more, with cu_seqlens, got {arguments.describe(longest)}")
    return features[None], cu_seqlens.contiguous(), longest, MOST if r is None else r


# ------------------------------------------------------------------------------------------------------------------------- what torch needs to know


@torch.library.register_fake("modalign::match_tokens")
def _fake(features: Tensor, cu_seqlens: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    T = features.shape[0] * features.shape[1]
    score, ints = features.new_empty(T, dtype=accumulation_dtype(features.dtype)), [features.new_empty(n, dtype=torch.int32) for n in (T, T, T + 1)]
    return score, *ints, features.new_empty((features.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1) + 1, dtype=torch.int32)


# ----------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_match_tokens(features: Tensor, r: int, *, protected: int = 0, keep_order: bool = False) -> TokenMatch:
    """`match_tokens` of a batch from the matrix of similarities."""
    features, _, _, r = _checked("reference_match_tokens", features, r, protected, None, keep_order, None, None)
    B, N, _ = features.shape
    device = features.device
    length = features.norm(dim=-1, keepdim=True)
    unit = torch.where(length > 0, features / length, 0)
    even, odd = (torch.arange(N, device=device)[protected:] for _ in range(2))
    even, odd = even[even % 2 == 0], odd[odd % 2 == 1]
    r = min(r, max(0, N - protected) // 2)
    place = torch.arange(N, device=device).repeat(B, 1)
    if r:
        similarity = (unit[:, even] @ unit[:, odd].mT).nan_to_num(-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
        best, partner = similarity.max(2)
        order = best.argsort(dim=1, descending=True, stable=True)
        target = torch.arange(N, device=device).repeat(B, 1)
        target.scatter_(1, even[order[:, :r]], odd[partner.gather(1, order[:, :r])])  # the token whose row each joins
        stays = even[order[:, r:]] if protected == 0 else even[order[:, r:].sort(1)[0]]
        kept = torch.cat([torch.arange(protected, device=device).expand(B, -1), stays, odd.expand(B, -1)], 1)
        if keep_order:
            first = torch.full((B, N), N, device=device).scatter_reduce(1, target, torch.arange(N, device=device).expand(B, -1), "amin")
            kept = kept.gather(1, first.gather(1, kept).argsort(1))
        row = torch.empty_like(target).scatter_(1, kept, torch.arange(N - r, device=device).expand(B, -1))
        place = row.gather(1, target)
    return match_of_groups(place, N - r)

