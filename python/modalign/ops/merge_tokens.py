"""Token merging: similar tokens become their mean. [ToMe, ICLR 2023]"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._token_match import TokenMatch
from .match_tokens import match_tokens, reference_match_tokens

__all__ = ["MergedTokens", "formula_merge_tokens", "formula_merge_tokens_by_scatter", "merge_tokens", "reference_merge_tokens"]


class MergedTokens(NamedTuple):
    """Tokens after a merge.

    tokens : Tensor [B, M, ...] or packed [M, ...]
    size : Tensor float32 [B, M] or [M]
        How many of the original tokens each stands for.
    match : TokenMatch
    """

    tokens: Tensor
    size: Tensor
    match: TokenMatch


def merge_tokens(
    x: Tensor,
    features: Tensor,
    r: int | None = None,
    *,
    size: Tensor | None = None,
    protected: int = 0,
    sources: int | None = None,
    order: Tensor | None = None,
    threshold: float | None = None,
    keep_order: bool = False,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
) -> MergedTokens:
    r"""`r` tokens of every item join the most similar one: `match_tokens` of the features, and the weighted means of x.

    With s_i the number of original tokens that token i stands for::

        x'_g = sum over group g of s_i x_i / s'_g        s'_g = sum over group g of s_i

    >>> import torch
    >>> x = torch.tensor([[[2.0], [4.0], [-1.0], [-7.0]]])
    >>> merge_tokens(x, x.sign(), 1)[:2]
    (tensor([[[-1.],
             [ 3.],
             [-7.]]]), tensor([[1., 2., 1.]]))

    Parameters
    ----------
    x : Tensor [B, N, ...] or packed [T, ...]
        The tokens.
    features, r, protected, sources, order, threshold, keep_order, cu_seqlens, longest
        As in `match_tokens`.
    size : Tensor [B, N] or [B, N, 1], optional
        How many original tokens each stands for; None: one. Sums are kept in float32, as half types stop counting at 256 or 2048.

    Returns
    -------
    MergedTokens(tokens, size, match): [B, M, ...] in x's dtype, float32 [B, M], and the `TokenMatch`, for other streams, `unmerge` and `source`.

    Gradient
    --------
    In x: ``dx_i = s_i / s'_g dx'_g``, to any order. Not in features (the choice is no function to differentiate) and not in size. Forward mode raises.

    Edges
    -----
    As in `match_tokens`. A token that is alone passes bit for bit. A group whose sizes sum to 0 becomes 0.

    Raises
    ------
    TypeError, ValueError
        ``match_tokens: <argument> must ..., got ...`` and ``TokenMatch.merge: <argument> must ..., got ...``.

    Complexity
    ----------
    That of `match_tokens`, and every token read and written once.

    Paper: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.
    """
    match = match_tokens(features, r, protected=protected, sources=sources, order=order, threshold=threshold, keep_order=keep_order, cu_seqlens=cu_seqlens, longest=longest)
    return MergedTokens(*match.merge_with_size(x, size), match)


# ----------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_merge_tokens(x: Tensor, features: Tensor, r: int, *, size: Tensor | None = None, protected: int = 0, sources: int | None = None, keep_order: bool = False) -> MergedTokens:
    """`merge_tokens` of a batch from the matrix of similarities and the matrix of who joins whom."""
    match = reference_match_tokens(features.detach().double(), r, protected=protected, sources=sources, keep_order=keep_order)
    s = torch.ones(x.shape[:2], dtype=x.dtype, device=x.device) if size is None else size.detach().reshape(x.shape[:2]).to(x.dtype)
    joined = match.source_matrix().to(x.dtype) * s[:, None, :]
    total = joined.sum(2)
    merged = (joined / total[:, :, None].clamp(min=torch.finfo(x.dtype).tiny)) @ x.flatten(2)
    return MergedTokens(merged.reshape(*total.shape, *x.shape[2:]), total.float(), match)


def formula_merge_tokens(x: Tensor, features: Tensor, r: int, *, size: Tensor | None = None, protected: int = 0) -> MergedTokens:
    """The usual code: one step of matching, weighting, `index_add` and division in the input dtype. For comparisons, with up to two protected tokens."""
    return _formula(x, features, r, size, protected, _index_add)


def formula_merge_tokens_by_scatter(x: Tensor, features: Tensor, r: int, *, size: Tensor | None = None, protected: int = 0) -> MergedTokens:
    """The same with `scatter_reduce`, as the paper's released code has it."""
    return _formula(x, features, r, size, protected, lambda destination, index, source: destination.scatter_reduce(1, index[..., None].expand_as(source), source, "sum"))


def _index_add(destination: Tensor, index: Tensor, source: Tensor) -> Tensor:
    rows = (index + torch.arange(len(index), device=index.device)[:, None] * destination.shape[1]).flatten()
    return destination.flatten(0, 1).index_add(0, rows, source.flatten(0, 1)).view_as(destination)


def _formula(x: Tensor, features: Tensor, r: int, size: Tensor | None, protected: int, add: Any) -> MergedTokens:
    B, N, C = x.shape
    s = x.new_ones(B, N, 1) if size is None else size.detach().reshape(B, N, 1).to(x.dtype)
    with torch.no_grad():
        unit = features / features.norm(dim=-1, keepdim=True)
        scores = unit[:, ::2] @ unit[:, 1::2].mT
        if protected:
            scores[:, : (protected + 1) // 2] = -torch.inf
            scores[:, :, : protected // 2] = -torch.inf
        best, partner = scores.max(-1)
        order = best.argsort(-1, descending=True)
        joining, staying = order[:, :r], order[:, r:]
        if protected:
            staying = staying.sort(1)[0]
        target = partner.gather(1, joining)

    def merge(rows: Tensor) -> Tensor:
        even, odd = rows[:, ::2], rows[:, 1::2]
        return torch.cat([even.gather(1, staying[..., None].expand(-1, -1, rows.shape[2])), add(odd, target, even.gather(1, joining[..., None].expand(-1, -1, rows.shape[2])))], 1)

    total = merge(s)
    return MergedTokens(merge(x * s) / total, total[..., 0], TokenMatch(*(features.new_empty(0),) * 5))
