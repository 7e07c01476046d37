"""Multi-head attention in which every query keeps the keys that a score of their values ranks first. [Dynamic Mask Attention, 2025]"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import masks
from ..ops import dynamic_mask_attention, masked_attention
from ..ops._arguments import check_flag, describe
from ..ops._registration import accumulation_dtype
from ._tokens import check_sizes, check_tokens
from .masked_attention import KeyValues, MaskedAttention

__all__ = ["DynamicMaskAttention", "ScoredKeys"]

CHOICES = {"state": ("softplus", "exp"), "mask_type": ("topk", "relu"), "scope": ("causal", "global")}


class ScoredKeys(NamedTuple):
    """The keys that a later query may still choose: the cache of a `DynamicMaskAttention`. A pytree.

    key, value : [B, S, M, head_width], S heads of scores; score : [B, S, M]; index : int64 [B, S, M], which tokens they are, rising; length : int64 [], of all tokens so far."""

    key: Tensor
    value: Tensor
    score: Tensor
    index: Tensor
    length: Tensor


class DynamicMaskAttention(MaskedAttention):
    """`ops.dynamic_mask_attention` between projections: causal attention of tokens to the `keep` earlier ones with the best scores, which are made of their values. [DMA, 2025]

    ::

        z_j = W_dt [values of j, of all key heads]
        delta_j = A softplus(z_j)                          state "softplus": a score for every key head
        delta_j = exp(A softplus(z_j))                     state "exp": a score for every query head, as in the paper
        K_i = the keep keys j <= i with the largest delta_j, of equal ones the most recent
        out_i = W_o [heads of softmax over K_i of (q_i . k_j / sqrt(head_width) + delta_j), times v_j]

    A is 0 at first: all scores are equal, and the keys are the last `keep`, a sliding window. A learns from the first step on, W_dt once A has moved. The choice has no gradient, the scores have.

    >>> import torch
    >>> attention = DynamicMaskAttention(16, heads=4, key_heads=2, keep=3, rotary=10000.0)
    >>> x = torch.randn(2, 9, 16)
    >>> attention(x).shape
    torch.Size([2, 9, 16])
    >>> first, cache = attention(x[:, :8], return_keys=True)                                              # decoding: only keys that can still be chosen are kept
    >>> cache.key.shape, cache.length
    (torch.Size([2, 2, 3, 4]), tensor(8))
    >>> torch.allclose(attention(x[:, 8:], past=cache), attention(x)[:, 8:], atol=1e-6)
    True

    The call takes

    - x [B, N, width], tokens behind those of `past`;
    - padding, in any place: valid, bool [B, N], True for a token; or key_lengths, int64 [B]: tokens behind an item's length, counted from the first of `past` on, are none. Padding is never kept;
      a token that sees nothing else gives 0 (the bias of W_o);
    - positions int64 [N] or [B, N] for `rotary`; from 0 on unless given, or from the end of `past` on;
    - past, `ScoredKeys` of earlier tokens; return_keys: also those of all, which are the next call's `past`. They take memory for `keep` keys of every score head, however many tokens there were.
      Steps of any sizes choose what the whole at once does, up to scores that rounding makes equal.

    Gives [B, N, width]. A cache belongs to one `keep`: a larger one finds too few keys in it. Raises TypeError and ValueError, ``DynamicMaskAttention: <argument> must ..., got ...``, and as `MaskedAttention` and `ops.dynamic_mask_attention` do.

    Parameters
    ----------
    width, heads, key_heads, head_width, bias, rotary
        Of `MaskedAttention`; bias also of `dt_proj`.
    keep : int
        Keys of a query: window_size of published configurations, keep_window_size of older ones, which have 2048 and 4096.
    state : "softplus" or "exp"
        Of the reference model today, or of the paper and the first code. They give `A` key_heads or heads entries.
    mask_type : "topk" or "relu"
        "relu": a query keeps all earlier keys with delta > 0, `keep` means nothing and the cache keeps all tokens. softplus is positive, so that is a choice of heads: those with A > 0 see
        everything, and the others nothing, for good: A = 0 has no gradient here and must be set. With state "exp" it would keep everything, and is refused.
    scope : "causal" or "global"
        Of which keys the best are chosen, see `ops.dynamic_mask_attention`. "global": of all of this call and of `past`, so steps differ from the whole at once, where early queries keep fewer.
    qk_norm : bool
        RMSNorm `q_norm`, `k_norm` of every head's queries and keys, in front of the rotation.
    eps : float
        Of the norms."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        key_heads: int | None = None,
        head_width: int | None = None,
        keep: int = 2048,
        state: str = "softplus",
        mask_type: str = "topk",
        scope: str = "causal",
        qk_norm: bool = False,
        bias: bool = False,
        rotary: float | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(width, heads, key_heads=key_heads, head_width=head_width, bias=bias, rotary=rotary)
        check_sizes("DynamicMaskAttention", keep=keep)
        for name, value in (("state", state), ("mask_type", mask_type), ("scope", scope)):
            if value not in CHOICES[name]:
                first, second = CHOICES[name]
                raise ValueError(f'DynamicMaskAttention: {name} must be "{first}" or "{second}", got {value!r}')
        if mask_type == "relu" and state == "exp":
            raise ValueError('DynamicMaskAttention: state must be "softplus" with mask_type "relu" (exp is positive, and would drop nothing), got "exp"')
        self.keep, self.state, self.mask_type, self.scope = keep, state, mask_type, scope
        score_heads = self.key_heads if state == "softplus" else heads
        self.A = nn.Parameter(torch.zeros(score_heads))
        self.dt_proj = nn.Linear(self.key_heads * self.head_width, score_heads, bias=bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_width, eps=eps) if qk_norm else nn.Identity() for _ in range(2))

    def queries(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return self._rotated(self.q_norm(self._heads(self.q_proj(x))), positions)

    def keys(self, context: Tensor, positions: Tensor | None = None) -> KeyValues:
        return KeyValues(self._rotated(self.k_norm(self._heads(self.k_proj(context))), positions), self._heads(self.v_proj(context)))

    def scores(self, value: Tensor) -> Tensor:
        """delta [B, key_heads or heads, N] of values [B, key_heads, N, head_width], in the accumulation dtype: half types would make too many of them equal."""
        real = accumulation_dtype(value.dtype)
        z = self.dt_proj(value.transpose(1, 2).flatten(2)).to(real)
        delta = (self.A.to(real) * nn.functional.softplus(z)).mT
        return delta if self.state == "softplus" else delta.exp()

    def forward(
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        key_lengths: Tensor | None = None,
        positions: Tensor | None = None,
        past: ScoredKeys | None = None,
        return_keys: bool = False,
    ) -> Any:
        check_tokens("DynamicMaskAttention", "x", x, ("B", "N", self.width))
        if past is not None and not isinstance(past, ScoredKeys):
            raise TypeError(f"DynamicMaskAttention: past must be ScoredKeys, which return_keys gives, got {describe(past)}")
        check_flag("DynamicMaskAttention", "return_keys", return_keys)
        if past is not None:
            score_heads = self.A.shape[0]
            for each, wanted in ((past.key, ("B", score_heads, "M", self.head_width)), (past.value, ("B", score_heads, "M", self.head_width)), (past.score, ("B", score_heads, "M"))):
                check_tokens("DynamicMaskAttention", "past", each, wanted, x)
        index = torch.arange(x.shape[1], device=x.device)
        if past is not None:
            index = index + past.length
            positions = index if positions is None else positions
        key, value = self.keys(x, positions)
        score = self.scores(value)
        padding = _padding(x, index, valid, key_lengths)
        if padding is not None:
            score = score.masked_fill(padding[:, None], -torch.inf)
        length, index = index.new_zeros(()) + (0 if past is None else past.length) + x.shape[1], index.expand(score.shape)
        if past is not None:
            key, value = (torch.cat([before, each.repeat_interleave(score.shape[1] // self.key_heads, 1)], 2) for before, each in ((past.key, key), (past.value, value)))
            score, index = torch.cat([past.score, score], 2), torch.cat([past.index, index], 2)
        out = self.join(self._attend(self.queries(x, positions), key, value, score))
        if not return_keys:
            return out
        if self.mask_type == "relu":
            return out, ScoredKeys(key, value, score, index, length)
        best = _best(score, self.keep)
        return out, ScoredKeys(_taken(key, best), _taken(value, best), score.gather(2, best), index.gather(2, best), length)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keep={self.keep}, state={self.state!r}, mask_type={self.mask_type!r}, scope={self.scope!r}"

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, score: Tensor) -> Tensor:
        bias, N = score[:, :, None], query.shape[2]
        if self.mask_type == "topk":
            return dynamic_mask_attention(query, key, value, bias, self.keep, scope=self.scope)
        ends = torch.where(score > 0, N, 0)  # kept for all queries or for none, so others are not computed
        return masked_attention(query, key, value, masks.intervals(torch.stack([torch.zeros_like(ends), ends], -1), N), bias=bias, causal=True)


def _padding(x: Tensor, index: Tensor, valid: Tensor | None, key_lengths: Tensor | None) -> Tensor | None:
    """bool [B, N]"""
    padding = None
    if key_lengths is not None:
        if not isinstance(key_lengths, Tensor) or key_lengths.dtype is not torch.int64 or key_lengths.shape != x.shape[:1]:
            raise ValueError(f"DynamicMaskAttention: key_lengths must be an int64 tensor [B] with B = {x.shape[0]}, got {describe(key_lengths)}")
        padding = index >= key_lengths[:, None]
    if valid is not None:
        if not isinstance(valid, Tensor) or valid.dtype is not torch.bool or valid.shape != x.shape[:2]:
            raise ValueError(f"DynamicMaskAttention: valid must be a bool tensor [B, N] = {list(x.shape[:2])}, True for a token, got {describe(valid)}")
        padding = ~valid if padding is None else padding | ~valid
    return padding


def _best(score: Tensor, keep: int) -> Tensor:
    """Where the `keep` best are, of equal ones the last, in their order: the only ones that a query behind them all can choose."""
    backwards = score.detach().flip(2).sort(dim=2, descending=True, stable=True).indices[:, :, :keep]
    return (score.shape[2] - 1 - backwards).sort(2).values


def _taken(x: Tensor, best: Tensor) -> Tensor:
    """Of x [B, H, M, D] the rows `best` [B, S, count], where H divides S."""
    grouped, at = x.unsqueeze(2), best.unflatten(1, (x.shape[1], -1))
    return grouped.expand(-1, -1, at.shape[2], -1, -1).gather(3, at[..., None].expand(*at.shape, x.shape[3])).flatten(1, 2)
