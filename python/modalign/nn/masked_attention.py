"""Multi-head attention under a mask, with its projections."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import masked_attention
from ..ops._arguments import check_flag, describe
from ..ops._registration import accumulation_dtype
from ..ops._rotary import rotary_tables, turned
from ._tokens import check_number, check_sizes, check_tokens

__all__ = ["KeyValues", "MaskedAttention", "rotate"]


class KeyValues(NamedTuple):
    """key, value : [B, key_heads, N, head_width], as `MaskedAttention.keys` makes them: the cache of a layer. A pytree."""

    key: Tensor
    value: Tensor

    def append(self, later: KeyValues) -> KeyValues:
        """These tokens and `later` ones behind them."""
        return KeyValues(torch.cat([self.key, later.key], 2), torch.cat([self.value, later.value], 2))

    def to(self, device: Any) -> KeyValues:
        return KeyValues(*(each.to(device) for each in self))


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary embedding of x [B, H, N, D] at positions [N] or [B, N]: entries f and f + D / 2 turn by the angle ``position base^(-2 f / D)``, in float64. [RoFormer, 2021]

    >>> rotate(torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), torch.tensor([2]), 10000.0).flatten()          # cos 2, sin 2
    tensor([-0.4161,  0.9093])
    """
    real = accumulation_dtype(x.dtype)
    cos, sin = (each.unsqueeze(-3) for each in rotary_tables(positions, x.shape[-1], base, real))
    return turned(x.to(real), cos, sin).to(x.dtype)


class MaskedAttention(nn.Module):
    """`ops.masked_attention` between projections: of tokens among themselves, or of tokens to a context.

    ::

        q = rotate(W_q x),  k = rotate(W_k c),  v = W_v c          c = context, or x
        out = W_o [heads of masked_attention(q, k, v, mask)]

    >>> import torch
    >>> from modalign import masks
    >>> attention = MaskedAttention(16, heads=4, key_heads=2, rotary=10000.0)
    >>> tokens = masks.layout([("prefix", 2), ("visual", (2, 2)), ("question", 3)])
    >>> x = torch.randn(2, 9, 16)
    >>> attention(x, mask=masks.image_prefix(tokens)).shape
    torch.Size([2, 9, 16])
    >>> first, cache = attention(x[:, :8], causal=True, return_keys=True)                               # decoding: earlier keys are kept
    >>> torch.allclose(attention(x[:, 8:], causal=True, past=cache), attention(x, causal=True)[:, 8:], atol=1e-6)
    True

    The call takes

    - x [B, N, width];
    - context, where the keys are of other tokens: [B, M, context_width], or `KeyValues` that `keys` made of them, such as those of a picture that many steps look at;
    - mask, causal and key_lengths of `ops.masked_attention`;
    - positions, whole numbers [N] or [B, N], and key_positions of a context, for `rotary` and with it alone; from 0 on unless given, or from the end of `past` on;
    - past, `KeyValues` of earlier tokens, in front of the keys of this call; return_keys: also the `KeyValues` of all, which are the next call's `past`.

    Gives [B, N, out_width]. A query that keeps nothing gives 0 (the bias of W_o, if it has one) and has no gradient.

    Raises TypeError and ValueError, ``MaskedAttention: <argument> must ..., got ...``.

    Parameters
    ----------
    width, heads : int
    key_heads : int
        Of keys and values, default `heads`, which it divides.
    head_width : int
        Default width / heads.
    context_width, out_width : int
        Default width.
    bias : bool
        Of the four projections.
    rotary : float, optional
        The base of the rotary embedding (10000 in most models); None: no positions.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        key_heads: int | None = None,
        head_width: int | None = None,
        context_width: int | None = None,
        out_width: int | None = None,
        bias: bool = False,
        rotary: float | None = None,
    ) -> None:
        super().__init__()
        check_sizes("MaskedAttention", width=width, heads=heads)
        check_flag("MaskedAttention", "bias", bias)
        key_heads = heads if key_heads is None else key_heads
        context_width, out_width = width if context_width is None else context_width, width if out_width is None else out_width
        if head_width is None and width % heads:
            raise ValueError(f"MaskedAttention: heads must divide width = {width} where head_width is not given, got {heads}")
        head_width = width // heads if head_width is None else head_width
        check_sizes("MaskedAttention", key_heads=key_heads, head_width=head_width, context_width=context_width, out_width=out_width)
        if heads % key_heads:
            raise ValueError(f"MaskedAttention: key_heads must divide heads = {heads}, got {key_heads}")
        if rotary is not None:
            check_number("MaskedAttention", "rotary", rotary, above=True)
            if head_width % 2:
                raise ValueError(f"MaskedAttention: head_width must be even for rotary, got {head_width}")
        self.width, self.heads, self.key_heads, self.head_width, self.context_width, self.rotary = width, heads, key_heads, head_width, context_width, rotary
        self.q_proj = nn.Linear(width, heads * head_width, bias=bias)
        self.k_proj = nn.Linear(context_width, key_heads * head_width, bias=bias)
        self.v_proj = nn.Linear(context_width, key_heads * head_width, bias=bias)
        self.o_proj = nn.Linear(heads * head_width, out_width, bias=bias)

    def queries(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """[B, heads, N, head_width]"""
        return self._rotated(self._heads(self.q_proj(x)), positions)

    def keys(self, context: Tensor, positions: Tensor | None = None) -> KeyValues:
        """Keys and values of tokens [B, M, context_width]."""
        check_tokens("MaskedAttention", "context", context, ("B", "M", self.context_width))
        return KeyValues(self._rotated(self._heads(self.k_proj(context)), positions), self._heads(self.v_proj(context)))

    def check_keys(self, name: str, keys: Any, x: Tensor) -> KeyValues:
        """`KeyValues` of this layer for the batch of x."""
        if not isinstance(keys, KeyValues):
            raise TypeError(f"MaskedAttention: {name} must be KeyValues, got {describe(keys)}")
        for each in keys:
            check_tokens("MaskedAttention", name, each, ("B", self.key_heads, "N", self.head_width), x)
        if keys.key.shape != keys.value.shape:
            raise ValueError(f"MaskedAttention: {name} must have as many keys as values, got {describe(keys.key)} and {describe(keys.value)}")
        return keys

    def refuse_unread(self, **positions: Any) -> None:
        """Nothing but the rotary embedding reads positions."""
        for name, given in positions.items():
            if given is not None and self.rotary is None:
                raise ValueError(f"MaskedAttention: {name} must be given with rotary alone, got {describe(given)}")

    def positions_behind(self, count: int, x: Tensor, positions: Tensor | None) -> Tensor | None:
        """Those that are given, else those of x behind so many tokens, if anything asks for them."""
        return positions if positions is not None or self.rotary is None else torch.arange(count, count + x.shape[1], device=x.device)

    def join(self, out: Tensor) -> Tensor:
        """[B, heads, N, head_width] to [B, N, out_width]"""
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def forward(
        self,
        x: Tensor,
        context: Tensor | KeyValues | None = None,
        mask: Any = None,
        *,
        causal: bool | str = False,
        key_lengths: Tensor | None = None,
        positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        past: KeyValues | None = None,
        return_keys: bool = False,
    ) -> Any:
        check_tokens("MaskedAttention", "x", x, ("B", "N", self.width))
        check_flag("MaskedAttention", "return_keys", return_keys)
        self.refuse_unread(positions=positions, key_positions=key_positions)
        earlier = 0 if past is None else self.check_keys("past", past, x).key.shape[2]
        positions = self.positions_behind(earlier, x, positions)
        if key_positions is not None and not isinstance(context, Tensor):
            raise ValueError(f"MaskedAttention: key_positions must be given for a context of tokens alone, got {describe(key_positions)}")
        if isinstance(context, KeyValues):
            keys = self.check_keys("context", context, x)
        elif context is None:
            keys = self.keys(x, positions)
        else:
            check_tokens("MaskedAttention", "context", context, ("B", "M", self.context_width), x)
            keys = self.keys(context, self.positions_behind(earlier, context, key_positions))
        keys = keys if past is None else past.append(keys)
        out = self.join(masked_attention(self.queries(x, positions), keys.key, keys.value, mask, causal=causal, key_lengths=key_lengths))
        return (out, keys) if return_keys else out

    def extra_repr(self) -> str:
        return f"heads={self.heads}, key_heads={self.key_heads}, head_width={self.head_width}, rotary={self.rotary}"

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_width)).transpose(1, 2)

    def _rotated(self, x: Tensor, positions: Tensor | None) -> Tensor:
        if positions is not None:
            self._check_positions(positions, x)
        if self.rotary is None:
            return x
        return rotate(x, torch.arange(x.shape[2], device=x.device) if positions is None else positions, self.rotary)

    def _check_positions(self, positions: Any, x: Tensor) -> None:
        if not isinstance(positions, Tensor) or positions.is_floating_point() or positions.is_complex() or positions.dtype is torch.bool:
            raise TypeError(f"MaskedAttention: positions must be a tensor of whole numbers [N] or [B, N], got {describe(positions)}")
        fits = positions.dim() == 1 or (positions.dim() == 2 and (positions.shape[0] == 1 or positions.shape[0] == x.shape[0]))
        if not fits or positions.shape[-1] != x.shape[2] or positions.device != x.device:
            raise ValueError(f"MaskedAttention: positions must be whole numbers [N] or [B, N] with B = {x.shape[0]} and N = {x.shape[2]} on {x.device}, got {describe(positions)}")
