"""A vision encoder that reads the question. [FUSION, 2025]"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import masks
from ..ops._arguments import describe
from ._tokens import check_sizes, check_tokens
from .encoder_layer import EncoderLayer

__all__ = ["TextGuidedEncoder", "TextGuidedFeatures"]


class TextGuidedFeatures(NamedTuple):
    """patches : [B, N, 3 width]; question : [B, L, 3 width]"""

    patches: Tensor
    question: Tensor

    def to(self, device: Any) -> TextGuidedFeatures:
        return TextGuidedFeatures(*(each.to(device) for each in self))


class TextGuidedEncoder(nn.Module):
    """Patches and the tokens of a question go through one encoder. In its first half the patches do not see the question, so that they are pictures first. [FUSION, 2025]

    ::

        x_0 = [patches; aux_projector(question)],  x_l = layer_l(x_{l-1}, mask_l)          mask: `masks.text_guided`, late=True from layer `early` on
        features = [x_n; mean of x_1 ... x_m; mean of x_{m+1} ... x_{n-1}],  m = (n - 1) // 2

    >>> import torch
    >>> encoder = TextGuidedEncoder(16, 24, heads=4, layers=5)
    >>> there = torch.arange(6) < torch.tensor([[6], [4]])
    >>> features = encoder(torch.randn(2, 9, 16), torch.randn(2, 6, 24), there)
    >>> features.patches.shape, features.question.shape
    (torch.Size([2, 9, 48]), torch.Size([2, 6, 48]))

    The call takes patches [B, N, width], with their positions; question [B, L, question_width], embeddings of the language model; and question_mask bool [B, L], False for padding,
    which no token sees. What a padded row of the features holds means nothing. The projector into the language model and its loss are `nn.DualSemanticMapping`'s.

    The released mask falls on the axes of heads and queries: there patches see the question in all layers, and the question's own rows are uniform in the early ones. Here it is as
    the paper says.

    Parameters: width, question_width, heads; layers, 27 published, 3 or more; early, layers in which patches do not see the question, default m: 13 of 27 as published; hidden units
    of a layer. Raises ValueError for sizes and shapes."""

    def __init__(self, width: int, question_width: int, *, heads: int, layers: int, early: int | None = None, hidden: int | None = None) -> None:
        super().__init__()
        check_sizes("TextGuidedEncoder", width=width, question_width=question_width, layers=layers)
        early = (layers - 1) // 2 if early is None else early
        if isinstance(early, bool) or not isinstance(early, int):
            raise TypeError(f"TextGuidedEncoder: early must be a whole number, got {early!r}")
        if layers < 3 or not 0 <= early <= layers:
            raise ValueError(f"TextGuidedEncoder: layers must be 3 or more and early from 0 to layers, got {layers} and {early}")
        self.width, self.question_width, self.early = width, question_width, early
        self.aux_projector = nn.Sequential(nn.Linear(question_width, width), nn.GELU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(EncoderLayer(width, heads, hidden=hidden) for _ in range(layers))

    def forward(self, patches: Tensor, question: Tensor, question_mask: Tensor | None = None) -> TextGuidedFeatures:
        check_tokens("TextGuidedEncoder", "patches", patches, ("B", "N", self.width))
        check_tokens("TextGuidedEncoder", "question", question, ("B", "L", self.question_width), patches)
        if question_mask is not None and not isinstance(question_mask, Tensor):
            raise TypeError(f"TextGuidedEncoder: question_mask must be a bool tensor [B, L], got {describe(question_mask)}")
        if question_mask is not None and (question_mask.dtype is not torch.bool or question_mask.shape != question.shape[:2] or question_mask.device != question.device):
            raise ValueError(f"TextGuidedEncoder: question_mask must be bool [B, L] = {list(question.shape[:2])}, got {describe(question_mask)}")
        N, L = patches.shape[1], question.shape[1]
        first = torch.cat([torch.zeros(N, dtype=torch.int32), torch.full((L,), N, dtype=torch.int32)]).to(patches.device)  # the first row that sees a key
        early = masks.intervals(torch.stack([first, torch.full_like(first, N + L)], 1), N + L)
        late = None
        if question_mask is not None:
            question = torch.where(question_mask[..., None], question, 0)
            late = masks.from_dense(nn.functional.pad(question_mask, (N, 0), value=True)[:, None, None], N + L)
            early = early & late
        x, seen = torch.cat([patches, self.aux_projector(question)], 1), []
        for number, layer in enumerate(self.layers):
            x = layer(x, early if number < self.early else late)
            seen.append(x)
        half = (len(seen) - 1) // 2
        features = torch.cat([x, sum(seen[1:half], seen[0]) / half, sum(seen[half + 1 : -1], seen[half]) / (len(seen) - 1 - half)], -1)
        return TextGuidedFeatures(*features.split([N, L], 1))
