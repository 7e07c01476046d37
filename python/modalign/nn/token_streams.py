"""A sequence taken apart into text and visual tokens, for layers that treat the two differently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import masks
from ..masks._trees import register_tree
from ..masks.tokens import TYPES
from ..ops._arguments import describe

__all__ = ["TokenStreams", "token_streams"]


@dataclass(frozen=True, eq=False)
class TokenStreams:
    """Where the text and the visual tokens of a batch stand. A pytree.

    text, visual : `masks.Tokens` of the two streams, padded to the longest of the batch
    text_rows, visual_rows : int64 [B or 1, N of the stream], places in the sequence; `length` for padding
    """

    text: masks.Tokens
    visual: masks.Tokens
    text_rows: Tensor
    visual_rows: Tensor
    length: int

    def take(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sequences [B, length, D] as text [B, Nt, D] and visual [B, Nv, D]."""
        self.check("x", x, self.length)
        text, visual = (x.gather(1, _places(rows.clamp(max=self.length - 1), x)) if rows.shape[1] else x[:, :0] for rows in (self.text_rows, self.visual_rows))
        return text, visual

    def put(self, text: Tensor, visual: Tensor | None = None) -> Tensor:
        """The sequences again; padding, and visual tokens that are not given, are 0."""
        self.check("text", text, self.text_rows.shape[1])
        if visual is not None:
            self.check("visual", visual, self.visual_rows.shape[1])
            if visual.shape[0] != text.shape[0] or visual.shape[2] != text.shape[2] or visual.dtype != text.dtype or visual.device != text.device:
                raise ValueError(f"TokenStreams: visual must be like text but for the number of tokens, {describe(text)}, got {describe(visual)}")
        x = text.new_zeros(text.shape[0], self.length + 1, text.shape[2]).scatter(1, _places(self.text_rows, text), text)
        return (x if visual is None else x.scatter(1, _places(self.visual_rows, visual), visual))[:, :-1]

    def is_visual(self) -> Tensor:
        """bool [B or 1, length]"""
        marks = torch.zeros(self.visual_rows.shape[0], self.length + 1, dtype=torch.bool, device=self.visual_rows.device)
        return marks.scatter(1, self.visual_rows, True)[:, :-1]

    def to(self, device: Any) -> TokenStreams:
        return pytree.tree_map_only(Tensor, lambda each: each.to(device), self)

    def text_mask(self) -> masks.Mask:
        """Rows of text alone, causal over the keys [visual; text]: what `masks.composite` and `masks.no_visual_attention` keep for text."""
        both = masks.Tokens(torch.cat([self.visual.fields, self.text.fields], 2), self.text.names)
        return masks.relation({(q, k): "causal" for q in range(TYPES) for k in range(TYPES)}, self.text, both)

    def check(self, name: str, x: Any, count: int) -> None:
        """[B, count, D] of the batch of these streams."""
        batch = self.text_rows.shape[0]
        if not isinstance(x, Tensor):
            raise TypeError(f"TokenStreams: {name} must be a tensor [B, {count}, D], got {describe(x)}")
        if x.dim() != 3 or x.shape[1] != count or not (batch == 1 or x.shape[0] == batch) or x.device != self.text_rows.device:
            wanted = f"[{'B' if batch == 1 else batch}, {count}, D] on {self.text_rows.device}"
            raise ValueError(f"TokenStreams: {name} must be {wanted}, got {describe(x)}")


def token_streams(tokens: masks.Tokens) -> TokenStreams:
    """Takes the tokens whose type is named "visual" apart from all others; padding is in neither stream.

    >>> import torch
    >>> streams = token_streams(masks.layout([("prefix", 1), ("visual", (1, 3)), ("question", 2)]))
    >>> text, visual = streams.take(torch.arange(6.0).view(1, 6, 1))
    >>> text.flatten(), visual.flatten(), streams.put(text, visual).flatten()
    (tensor([0., 4., 5.]), tensor([1., 2., 3.]), tensor([0., 1., 2., 3., 4., 5.]))
    """
    if not isinstance(tokens, masks.Tokens):
        raise TypeError(f"token_streams: tokens must be masks.Tokens, got {describe(tokens)}")
    if "visual" not in tokens.names:
        raise ValueError(f'token_streams: tokens must have a type "visual", got {", ".join(tokens.names) or "no names"}')
    there, visual = tokens.valid == 1, tokens.type == tokens.names.index("visual")
    parts = []
    for chosen in (there & ~visual, there & visual):
        longest = int(chosen.sum(1).max()) if chosen.numel() else 0
        order = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
        kept = chosen.gather(1, order)
        fields = tokens.fields.gather(2, order[:, None].expand(-1, len(masks.FIELDS), -1)).clone()
        fields[:, masks.FIELDS.index("valid")] = kept.int()
        parts.append((masks.Tokens(fields, tokens.names), torch.where(kept, order, len(tokens))))
    (text, text_rows), (visual_tokens, visual_rows) = parts
    return TokenStreams(text, visual_tokens, text_rows, visual_rows, len(tokens))


def _places(rows: Tensor, x: Tensor) -> Tensor:
    return rows[..., None].expand(x.shape[0], -1, x.shape[2])


register_tree(TokenStreams, ("text", "visual", "text_rows", "visual_rows"), ("length",))
