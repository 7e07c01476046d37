"""Which tokens of an image, a text or a clip become one: bipartite soft matching. [ToMe, ICLR 2023]"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..masks._values import are_there
from . import _arguments as arguments
from ._registration import accumulation_dtype, register_looping_vmap
from ._token_match import TokenMatch, match_of_groups

__all__ = ["match_tokens", "reference_match_tokens"]

MOST = 2**31 - 1  # kernels count tokens in 32 bits


def match_tokens(
    features: Tensor,
    r: int | None = None,
    *,
    protected: int = 0,
    sources: int | None = None,
    order: Tensor | None = None,
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
    sources : int, optional
        The first so many tokens look for a partner among the others, in place of those at even places; each may join then.
    order : Tensor int64 [B, N], optional
        A permutation of the tokens of every item of a batch: places, the protected, sources and ties are those of tokens in this order. With `sources` it makes any two sets.
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
    if order is not None:
        features = _in_order("match_tokens", features, order, cu_seqlens)
    features, cu, longest, cap = _checked("match_tokens", features, r, protected, sources, threshold, keep_order, cu_seqlens, longest)
    with torch.no_grad():
        score, group, members, offsets, cu_after = torch.ops.modalign.match_tokens(features.detach(), cu, longest, protected, -1 if sources is None else sources, cap, None if threshold is None else float(threshold), keep_order)
    B, N = features.shape[:2]
    if cu is None and threshold is None:
        M = N - _joining(N, cap, protected, sources)
        offsets = offsets[: B * M + 1]
        match = TokenMatch(group.view(B, N), members, offsets, offsets.diff().view(B, M), score.view(B, N))
    else:
        offsets = offsets[: int(cu_after[-1]) + 1]
        shape = (B, N) if cu is None else (N,)
        match = TokenMatch(group.view(shape), members, offsets, offsets.diff(), score.view(shape), cu, cu_after)
    return match if order is None else match.of_permuted(order)


def _in_order(op: str, features: Any, order: Any, cu_seqlens: Any) -> Tensor:
    arguments.check_vectors(op, "features", features, "[B, N, D]")
    if not isinstance(order, Tensor) or order.dtype is not torch.int64:
        raise TypeError(f"{op}: order must be an int64 tensor [B, N], got {arguments.describe(order)}")
    if cu_seqlens is not None or order.shape != features.shape[:2] or order.device != features.device:
        raise ValueError(f"{op}: order must have shape {list(features.shape[:2])} of a batch that is not packed, on {features.device}, got {arguments.describe(order)}")
    if are_there(order) and not torch.equal(order.sort(1)[0], torch.arange(order.shape[1]).expand_as(order)):
        raise ValueError(f"{op}: order must hold every place of an item once, got a row that does not")
    return features.gather(1, order[..., None].expand_as(features))


def _joining(N: int, r: int, protected: int, sources: int | None) -> int:
    """How many of N tokens join others."""
    if sources is None:
        return min(r, max(0, N - protected) // 2)
    return min(r, sources) if sources < N else 0


def _checked(op: str, features: Any, r: Any, protected: Any, sources: Any, threshold: Any, keep_order: Any, cu_seqlens: Any, longest: Any) -> tuple[Tensor, Tensor | None, int, int]:
    shape = "[B, N, D]" if cu_seqlens is None else "[T, D]"
    arguments.check_vectors(op, "features", features, shape)
    if features.dim() != shape.count(",") + 1:
        raise ValueError(f"{op}: features must have shape {shape}, got {arguments.describe(features)}")
    if r is None and threshold is None:
        raise TypeError(f"{op}: r must be a whole number unless there is a threshold, got None")
    for name, value in (("r", MOST if r is None else r), ("protected", protected), ("sources", sources or 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{op}: {name} must be a whole number, got {arguments.describe(value)}")
        if value < 0:
            raise ValueError(f"{op}: {name} must be 0 or more, got {value}")
    if sources is not None and protected:
        raise ValueError(f"{op}: protected must be 0 where sources are told, got {protected}")
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


register_looping_vmap("modalign::match_tokens", contiguous=(1,))


# ----------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_match_tokens(features: Tensor, r: int, *, protected: int = 0, sources: int | None = None, keep_order: bool = False) -> TokenMatch:
    """`match_tokens` of a batch from the matrix of similarities."""
    features, _, _, r = _checked("reference_match_tokens", features, r, protected, sources, None, keep_order, None, None)
    B, N, _ = features.shape
    device = features.device
    length = features.norm(dim=-1)
    inverse = torch.where(length > 0, 1 / length, 0)  # after the product, which of whole numbers is exact then, so that equal ones tie
    tokens = torch.arange(N, device=device)
    looks = (tokens % 2 == 0 if sources is None else tokens < sources)[protected:]
    looking, others = tokens[protected:][looks], tokens[protected:][~looks]
    r = _joining(N, r, protected, sources)
    place = tokens.repeat(B, 1)
    if r:
        similarity = (features[:, looking] @ features[:, others].mT) * inverse[:, None, others]
        best, partner = similarity.nan_to_num(-torch.inf, posinf=-torch.inf, neginf=-torch.inf).max(2)
        best = (best * inverse[:, looking]).nan_to_num(-torch.inf)
        order = best.argsort(dim=1, descending=True, stable=True)
        target = tokens.repeat(B, 1)
        target.scatter_(1, looking[order[:, :r]], others[partner.gather(1, order[:, :r])])  # the token whose row each joins
        stays = looking[order[:, r:]] if protected == 0 else looking[order[:, r:].sort(1)[0]]
        kept = torch.cat([tokens[:protected].expand(B, -1), stays, others.expand(B, -1)], 1)
        if keep_order:
            first = torch.full((B, N), N, device=device).scatter_reduce(1, target, tokens.expand(B, -1), "amin")
            kept = kept.gather(1, first.gather(1, kept).argsort(1))
        row = torch.empty_like(target).scatter_(1, kept, tokens[: N - r].expand(B, -1))
        place = row.gather(1, target)
    return match_of_groups(place, N - r)
