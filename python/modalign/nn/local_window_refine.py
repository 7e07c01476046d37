"""Latent tokens in the layers of a language model that look at the picture again, each at its own window. [FUSION, 2025]"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops._arguments import describe
from ._tokens import check_sizes, check_tokens
from .masked_attention import MaskedAttention

__all__ = ["LocalWindowRefine"]


class LocalWindowRefine(nn.Module):
    """Every question has count = s^2 latent tokens, a coarse picture of s x s cells. Each asks together with its question, and sees the window x window cells of a finer picture under it.

    ::

        q = W_in [question; latent]
        out = latent + MLP(LN(q + attention(q, the window of the latent)))          MLP: Linear, GELU, Linear without biases

    >>> import torch
    >>> refine = LocalWindowRefine(32, 24, heads=4)
    >>> picture = torch.randn(2, 27, 27, 24)                                       # features of the vision encoder
    >>> latents = torch.randn(2, 3, 16, 32)                                       # three questions of 16 latent tokens, such as `refine.pooled(projected picture, 4)` to begin with
    >>> refine(latents, torch.randn(2, 3, 32), refine.context(picture, 16)).shape
    torch.Size([2, 3, 16, 32])

    The call takes latents [B, L, count, width] and question [B, L, width], hidden states of the language model; and context [B, window s, window s, context_width]. It is attention
    under `masks.cell_window`, as a batch of windows: window^2 keys a query are computed, and no others. The released code runs it behind some layers, not in single steps of decoding,
    and draws count of 4, 16, 36, 64 and 144 in training.

    Parameters: width, context_width; heads, 16 published; hidden, the width inside, default width; window, 3 published. Raises ValueError for shapes and for a count that is no
    square."""

    def __init__(self, width: int, context_width: int | None = None, *, heads: int = 16, hidden: int | None = None, window: int = 3) -> None:
        super().__init__()
        hidden, context_width = width if hidden is None else hidden, width if context_width is None else context_width
        check_sizes("LocalWindowRefine", width=width, hidden=hidden, window=window)
        self.width, self.window = width, window
        self.proj_in = nn.Linear(2 * width, hidden, bias=False)
        self.attention = MaskedAttention(hidden, heads, context_width=context_width)
        self.norm = nn.LayerNorm(hidden)
        self.proj_out = nn.Sequential(nn.Linear(hidden, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False))

    @staticmethod
    def pooled(picture: Tensor, side: int) -> Tensor:
        """[B, Y, X, D] to the maxima of side x side cells, [B, side, side, D]; with side s the first latents of the cells."""
        return nn.functional.adaptive_max_pool2d(picture.movedim(3, 1), side).movedim(1, 3)

    def context(self, picture: Tensor, count: int) -> Tensor:
        """What latents of this count look at: [B, window s, window s, D]."""
        return self.pooled(picture, self.window * _side(count))

    def forward(self, latents: Tensor, question: Tensor, context: Tensor) -> Tensor:
        op = "LocalWindowRefine"
        check_tokens(op, "latents", latents, ("B", "L", "count", self.width))
        B, L, count, _ = latents.shape
        side = self.window * _side(count)
        check_tokens(op, "context", context, ("B", side, side, self.attention.context_width), latents)
        check_tokens(op, "question", question, ("B", "L", self.width), latents)
        if question.shape[1] != L:
            raise ValueError(f"{op}: question must have latents' L = {L}, got {describe(question)}")
        s, w = _side(count), self.window
        windows = context.unflatten(2, (s, w)).unflatten(1, (s, w)).transpose(2, 3).flatten(3, 4).flatten(0, 2)  # [B count, w^2, D]
        asked = self.proj_in(torch.cat([question[:, :, None].expand_as(latents), latents], -1)).transpose(1, 2).flatten(0, 1)  # [B count, L, hidden]
        refined = self.proj_out(self.norm(asked + self.attention(asked, windows)))
        return latents + refined.unflatten(0, (B, count)).transpose(1, 2)


def _side(count: int) -> int:
    side = math.isqrt(count)
    if side * side != count or count < 1:
        raise ValueError(f"LocalWindowRefine: count must be a square, got {count}")
    return side
