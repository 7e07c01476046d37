"""A decoder layer into which visual features come as keys and values, and no other way. [SAISA, 2025]"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._tokens import check_tokens
from .composite_decoder_layer import CompositeDecoderLayer
from .masked_attention import KeyValues

__all__ = ["NoVisualAttentionLayer"]


class NoVisualAttentionLayer(CompositeDecoderLayer):
    """NAAViT with a projector in every layer: visual tokens are made anew for each layer of the features of the vision encoder, and are keys and values there. They have no queries,
    no attention output and no feed-forward. [SAISA, 2025; as released, NAEViT in the later version]

    ::

        v = W_2 GELU(W_1 z)                                     this layer's own projector
        h = x + W_o attention(LN(x), [LN(v); LN(x)]),  out = h + mlp(LN(h))          x: text alone

    >>> import torch
    >>> from modalign import masks
    >>> from modalign.nn import token_streams
    >>> streams = token_streams(masks.layout([("prefix", 1), ("visual", (2, 2)), ("question", 3)]))
    >>> layer = NoVisualAttentionLayer(16, heads=4, feature_width=12)
    >>> positions = {"text_positions": streams.text.index, "visual_positions": streams.visual.index}            # of the whole sequence
    >>> layer(torch.randn(2, 4, 16), torch.randn(2, 4, 12), streams.text_mask(), **positions).shape
    torch.Size([2, 4, 16])

    The call is that of `CompositeDecoderLayer` with features [B, Nv, feature_width] where that has visual tokens; it gives text [B, Nt, width], with return_keys (text, `KeyValues`).
    The pilot study's variant, in which visual tokens still look at text, is a `DecoderLayer` under ``masks.no_visual_attention(tokens, visual_to_text="causal")``.

    Parameters: width, heads; feature_width, 1024 published; options of `DecoderLayer`. Raises as `MaskedAttention` does."""

    def __init__(self, width: int, heads: int, *, feature_width: int, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.projector = nn.Sequential(nn.Linear(feature_width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, text: Tensor, features: Tensor | None = None, mask: Any = None, **options: Any) -> Any:
        if features is not None:
            check_tokens("NoVisualAttentionLayer", "features", features, ("B", "N", self.projector[0].in_features))
        text, _, *keys = super().forward(text, None if features is None else self.projector(features), mask, **options)
        return (text, *keys) if keys else text

    def _carried(self, visual: Tensor, seen: KeyValues) -> None:
        return None
