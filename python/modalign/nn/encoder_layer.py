"""A layer of a vision encoder, in which masks take effect. [ViT, ICLR 2021]"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._tokens import check_sizes
from .masked_attention import MaskedAttention

__all__ = ["EncoderLayer"]


class EncoderLayer(nn.Module):
    """``h = x + attention(LN(x), mask); out = h + Linear(GELU(Linear(LN(h))))``.

    >>> import torch
    >>> EncoderLayer(16, heads=4)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])

    The call takes x [B, N, width] and a mask of `MaskedAttention`; without one every token sees all. Parameters: width, heads; hidden units, default 4 width."""

    def __init__(self, width: int, heads: int, *, hidden: int | None = None) -> None:
        super().__init__()
        check_sizes("EncoderLayer", width=width, heads=heads)
        hidden = 4 * width if hidden is None else hidden
        check_sizes("EncoderLayer", hidden=hidden)
        self.attention_norm, self.attention = nn.LayerNorm(width), MaskedAttention(width, heads, bias=True)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.feed_forward(self.feed_forward_norm(x))
