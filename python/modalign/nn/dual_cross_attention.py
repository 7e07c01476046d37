"""Pooled visual tokens and text that both look at all tokens of a video. [CrossLMM, 2025]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import masks
from ..ops._arguments import check_flag
from ..ops._attention_arguments import check_mask
from ._tokens import check_sizes, check_tokens
from .masked_attention import MaskedAttention

__all__ = ["DualCrossAttention", "pool_frames"]


def pool_frames(frames: Tensor, size: int = 3, *, mode: str = "average") -> Tensor:
    """Frames [B, T, Y, X, D] to size x size tokens each: [B, T size^2, D].

    >>> pool_frames(torch.ones(1, 2, 27, 27, 8)).shape
    torch.Size([1, 18, 8])

    mode: "average" of the cells of the picture, or "bilinear", between the pixels around the middle of a cell. The paper writes bilinear pooling, and N / 9 tokens where its tables have 9
    a frame.
    """
    check_sizes("pool_frames", size=size)
    if mode not in ("average", "bilinear"):
        raise ValueError(f'pool_frames: mode must be "average" or "bilinear", got {mode!r}')
    check_tokens("pool_frames", "frames", frames, ("B", "T", "Y", "X", "D"))
    maps = frames.flatten(0, 1).movedim(-1, 1)
    if mode == "average":
        pooled = nn.functional.adaptive_avg_pool2d(maps, size)
    else:
        pooled = nn.functional.interpolate(maps, size=(size, size), mode="bilinear")
    return pooled.flatten(2).mT.unflatten(0, frames.shape[:2]).flatten(1, 2)


class DualCrossAttention(nn.Module):
    """Between self-attention and feed-forward of some layers of a language model that sees a few tokens of each frame: these and the text look at all tokens. [CrossLMM, 2025]

    ::

        visual + tanh(g_v) attention(visual, context)          text + tanh(g_t) attention(text, context)          g_v = g_t = 0 at first

    >>> import torch
    >>> block = DualCrossAttention(16, heads=4)
    >>> frames, text = torch.randn(2, 4, 9, 9, 16), torch.randn(2, 5, 16)
    >>> visual = pool_frames(frames)
    >>> visual, text = block(visual, text, frames.flatten(1, 3))
    >>> visual.shape, text.shape
    (torch.Size([2, 36, 16]), torch.Size([2, 5, 16]))

    The call takes visual [B, Nv, width] and text [B, Nt, width], normalised states behind the self-attention; context [B, M, context_width], all projected visual tokens; and a mask
    of `modalign.masks` for the queries [visual; text], such as `masks.dual_cross`. The queries are one launch where both directions share their weights, else two.

    Parameters: width, context_width, heads, key_heads, head_width of the attention; share: one attention for both directions, which the paper's formulas have; False: each its own.
    Raises as `MaskedAttention` does."""

    def __init__(self, width: int, context_width: int | None = None, *, heads: int, share: bool = True, **options: Any) -> None:
        super().__init__()
        check_flag("DualCrossAttention", "share", share)
        self.attention = MaskedAttention(width, heads, context_width=context_width, **options)
        self.text_attention = None if share else MaskedAttention(width, heads, context_width=context_width, **options)
        self.visual_gate, self.text_gate = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, visual: Tensor, text: Tensor, context: Tensor, mask: Any = None) -> tuple[Tensor, Tensor]:
        width = self.attention.width
        check_tokens("DualCrossAttention", "visual", visual, ("B", "N", width))
        check_tokens("DualCrossAttention", "text", text, ("B", "N", width), visual)
        check_tokens("DualCrossAttention", "context", context, ("B", "M", self.attention.context_width), visual)
        Nv, Nt = visual.shape[1], text.shape[1]
        if self.text_attention is None:
            seen = self.attention(torch.cat([visual, text], 1), context, mask).split([Nv, Nt], 1)
        else:
            M, attention = context.shape[1], self.attention
            check_mask("DualCrossAttention", mask, visual, (visual.shape[0], attention.heads, Nv + Nt, M), attention.key_heads)
            mask = masks.from_dense(mask, Nv + Nt, M) if isinstance(mask, Tensor) else mask
            halves = (None, None) if mask is None else (mask.rows(0, Nv), mask.rows(Nv, Nv + Nt))
            seen = self.attention(visual, context, halves[0]), self.text_attention(text, context, halves[1])
        return visual + self.visual_gate.tanh() * seen[0], text + self.text_gate.tanh() * seen[1]
