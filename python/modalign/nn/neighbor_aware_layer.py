"""A decoder layer with less work on visual tokens: a window, fewer heads, fewer hidden units. [Treat Visual Tokens as Text?, 2024]"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import masks
from ..ops import masked_attention
from ..ops._arguments import check_flag, describe
from ._tokens import check_sizes, check_tokens
from .decoder_layer import DecoderLayer
from .token_streams import TokenStreams

__all__ = ["NeighborAwareLayer"]


class NeighborAwareLayer(DecoderLayer):
    """Visual tokens see their neighbours in the picture; some heads do not see pictures at all; visual tokens go through a part of the feed-forward. [YOPO, 2024]

    ::

        o_hi = r_hi sum_j p_hij g_hj v_j          g_hj = gate_h for a visual j, else 1;  r_hi = gate_h for a visual i, else 1
        p: softmax over the keys of `masks.neighbor_window`, those of closed heads included
        mlp of a visual token: the first hidden / feed_forward_cut units

    A closed gate takes visual values out *behind* the softmax, as released: what is left does not sum to 1. ``renormalize=True`` takes the pairs out of the mask instead: then closed
    heads compute nothing of them, and the probabilities of the others sum to 1. The two differ.

    >>> import torch
    >>> from modalign import masks
    >>> from modalign.nn import token_streams
    >>> tokens = masks.layout([("prefix", 1), ("visual", (3, 3)), ("question", 2)])
    >>> layer = NeighborAwareLayer(16, heads=4, active_heads=[True, True, True, False], feed_forward_cut=4)
    >>> layer(torch.randn(2, 12, 16), layer.mask(tokens), token_streams(tokens)).shape
    torch.Size([2, 12, 16])

    The call takes x [B, N, width], a mask that `mask` made of the tokens (None: causal; not with renormalize), their `TokenStreams`, and positions. With window as wide as the picture, all heads active and
    feed_forward_cut 1 it is `DecoderLayer` under `masks.image_prefix`, bit for bit.

    Keys of closed heads are still in the softmax, unless renormalize takes them out: a visual token that is not finite makes the rows of text that keep it NaN, with layer_drop, too.

    From the layer on where visual keys are dropped for good, nothing reads visual tokens any more: with renormalize, a `DecoderLayer` on the text stream alone gives the same text.

    Parameters: width, heads; window, odd, 3 published (attncut_w); active_heads, a bool for each head, default all; layer_drop: no head is active (released: in all layers from
    layercut_num on); feed_forward_cut (mlpcut_ratio); renormalize; options of `DecoderLayer`, whose weights it has and no more. Raises as `MaskedAttention` does."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        window: int = 3,
        active_heads: Sequence[bool] | None = None,
        layer_drop: bool = False,
        feed_forward_cut: int = 1,
        renormalize: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(width, heads, **options)
        for name, flag in (("layer_drop", layer_drop), ("renormalize", renormalize)):
            check_flag("NeighborAwareLayer", name, flag)
        if active_heads is not None and (not isinstance(active_heads, Sequence) or not all(isinstance(each, bool) for each in active_heads)):
            raise TypeError(f"NeighborAwareLayer: active_heads must be None or True or False for each head, got {active_heads!r}")
        if active_heads is not None and len(active_heads) != heads:
            raise ValueError(f"NeighborAwareLayer: active_heads must name {heads} heads, got {len(active_heads)}")
        if active_heads is not None and layer_drop:
            raise ValueError("NeighborAwareLayer: active_heads must not be given with layer_drop, under which no head is active, got both")
        check_sizes("NeighborAwareLayer", window=window, feed_forward_cut=feed_forward_cut)
        hidden = self.mlp.down_proj.in_features
        if window % 2 == 0 or feed_forward_cut > hidden:
            raise ValueError(f"NeighborAwareLayer: window must be odd and feed_forward_cut at most {hidden}, got {window} and {feed_forward_cut}")
        self.window, self.feed_forward_cut, self.renormalize = window, feed_forward_cut, renormalize
        self.active_heads = (not layer_drop,) * heads if active_heads is None else tuple(active_heads)  # no tensor: weights that are loaded do not change it

    def mask(self, tokens: masks.Tokens) -> masks.Mask:
        return masks.neighbor_window(tokens, self.window, active_heads=self.active_heads if self.renormalize else None)

    def forward(self, x: Tensor, mask: masks.Mask | None, streams: TokenStreams, *, positions: Tensor | None = None) -> Tensor:
        attention = self.self_attn
        check_tokens("NeighborAwareLayer", "x", x, ("B", "N", attention.width))
        if not isinstance(streams, TokenStreams):
            raise TypeError(f"NeighborAwareLayer: streams must be TokenStreams, got {describe(streams)}")
        if mask is None and self.renormalize:
            raise ValueError("NeighborAwareLayer: mask must be given with renormalize, which takes pairs out of it, got None")
        attention.refuse_unread(positions=positions)
        streams.check("x", x, streams.length)
        normed = self.input_layernorm(x)
        query, (key, value) = attention.queries(normed, positions), attention.keys(normed, positions)
        gate = None
        if not self.renormalize:
            text = ~streams.is_visual()
            gate = torch.stack([torch.ones_like(text) if active else text for active in self.active_heads], 1)[..., None]  # [B or 1, heads, N, 1]
            key, value = (each.repeat_interleave(attention.heads // attention.key_heads, 1) for each in (key, value))  # heads of a group have gates of their own
            value = value * gate
        out = masked_attention(query, key, value, mask, causal=mask is None)
        x = x + attention.join(out if gate is None else out * gate)
        if self.feed_forward_cut == 1:
            return self.feed_forward(x)
        text, visual = streams.take(self.post_attention_layernorm(x))
        return x + streams.put(self.mlp(text), self.mlp(visual, self.mlp.down_proj.in_features // self.feed_forward_cut))
