"""Text that looks at pictures through a gate which is closed at first. [Flamingo, NeurIPS 2022; NVLM, 2024]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops._arguments import check_vectors, describe
from ._tokens import check_sizes, check_tokens
from .decoder_layer import DecoderLayer
from .masked_attention import KeyValues, MaskedAttention

__all__ = ["GatedCrossAttention", "HybridDecoderLayer"]


class GatedCrossAttention(nn.Module):
    """A block between the layers of a language model, through which its tokens see media.

    ::

        y = x + tanh(a) attention(LN(x), media, mask)
        out = y + tanh(f) Linear(GELU(Linear(LN(y))))              a = f = 0 at first: out = x

    >>> import torch
    >>> from modalign import masks
    >>> block = GatedCrossAttention(16, 12, heads=2, head_width=8)
    >>> text = masks.tokens([0] * 5, last=torch.tensor([-1, 0, 0, 1, 1]))                     # a token before the first picture, two after each
    >>> media = masks.tokens([0] * 6, segment=torch.tensor([0, 0, 0, 1, 1, 1]))
    >>> x, features = torch.randn(2, 5, 16), torch.randn(2, 6, 12)
    >>> torch.equal(block(x, features, masks.media(text, media)), x)
    True

    The call takes x [B, N, width]; media [B, M, context_width] (of more dimensions: [B, ..., context_width], in the order of their tokens) or the `KeyValues` that `keys` made of
    them once for many steps of decoding; and a mask, `masks.media` (the latest picture, or all before: `immediate=False`) or `masks.tile_tags`. A token that sees no medium gets 0
    from the attention, in both modes; open implementations of "all before" let it see everything alike.

    Media that are not finite reach x through a closed gate, too: 0 NaN = NaN. While the gates are closed, the weights behind them have the gradient 0 and the gates one that is not.

    Parameters: width, context_width, heads and head_width of the attention, without biases, 8 of 64 published; expansion of the feed-forward, 4 published.
    Raises as `MaskedAttention` does."""

    def __init__(self, width: int, context_width: int | None = None, *, heads: int = 8, head_width: int = 64, expansion: int = 4) -> None:
        super().__init__()
        check_sizes("GatedCrossAttention", width=width, expansion=expansion)
        self.norm = nn.LayerNorm(width)
        self.attention = MaskedAttention(width, heads, head_width=head_width, context_width=context_width)
        self.attention_gate = nn.Parameter(torch.zeros(()))
        hidden = expansion * width
        self.feed_forward = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False))
        self.feed_forward_gate = nn.Parameter(torch.zeros(()))

    def keys(self, media: Tensor) -> KeyValues:
        check_vectors("GatedCrossAttention", "media", media, f"[B, ..., {self.attention.context_width}]")
        if media.dim() < 3:
            raise ValueError(f"GatedCrossAttention: media must be [B, ..., {self.attention.context_width}] with 3 or more dimensions, got {describe(media)}")
        return self.attention.keys(media.flatten(1, -2))

    def forward(self, x: Tensor, media: Tensor | KeyValues, mask: Any = None) -> Tensor:
        check_tokens("GatedCrossAttention", "x", x, ("B", "N", self.attention.width))
        media = media if isinstance(media, KeyValues) else self.keys(media)
        y = x + self.attention_gate.tanh() * self.attention(self.norm(x), media, mask)
        return y + self.feed_forward_gate.tanh() * self.feed_forward(y)


class HybridDecoderLayer(nn.Module):
    """Thumbnails are tokens of the sequence, tiles of high resolution are seen through a gate. [NVLM-H, 2024]

    ::

        out = decoder(cross(x, tiles, tile_mask), mask)

    >>> import torch
    >>> from modalign import masks
    >>> queries, keys = masks.tile_layout([("text", 2), ("picture", 2), ("text", 3)], tile_tokens=4, thumbnail=True)
    >>> layer = HybridDecoderLayer(16, heads=2)
    >>> layer(torch.randn(1, len(queries), 16), torch.randn(1, len(keys), 16), masks.tile_tags(queries, keys)).shape
    torch.Size([1, 12, 16])

    The call takes x [B, N, width], thumbnails among its tokens; tiles and tile_mask, the media and mask of `GatedCrossAttention`; and mask and the options of `DecoderLayer`.

    Parameters: width; context_width of the tiles; heads; cross, options of `GatedCrossAttention`; further options of `DecoderLayer`."""

    def __init__(self, width: int, context_width: int | None = None, *, heads: int, cross: dict[str, Any] | None = None, **decoder: Any) -> None:
        super().__init__()
        self.cross = GatedCrossAttention(width, context_width, **(cross or {}))
        self.decoder = DecoderLayer(width, heads, **decoder)

    def forward(self, x: Tensor, tiles: Tensor | KeyValues, tile_mask: Any = None, mask: Any = None, **options: Any) -> Any:
        return self.decoder(self.cross(x, tiles, tile_mask), mask, **options)
