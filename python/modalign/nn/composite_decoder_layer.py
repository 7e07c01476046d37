"""A decoder layer whose visual tokens are seen and do not look. [EE-MLLM, 2024]"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops import masked_attention
from ..ops._arguments import describe
from ._tokens import check_tokens
from .decoder_layer import DecoderLayer
from .masked_attention import KeyValues

__all__ = ["CompositeDecoderLayer"]


class CompositeDecoderLayer(DecoderLayer):
    """Composite attention: the queries are the text tokens alone, the keys are visual and text tokens, and the layer's own weights carry the visual tokens on. [EE-MLLM, 2024]

    ::

        text:    h = x + W_o attention(text, [visual; text]),  out = h + mlp(LN(h))
        visual:  h = v + W_o W_v LN(v)  ("self": a token that sees itself alone),  or v  ("ffn");  out = h + mlp(LN(h))

    No visual row is launched: no visual query is projected, and the attention has as many rows as there is text. The result is that of `DecoderLayer` under `masks.composite`.

    >>> import torch
    >>> from modalign import masks
    >>> from modalign.nn import token_streams
    >>> streams = token_streams(masks.layout([("prefix", 1), ("visual", (2, 2)), ("question", 3)]))
    >>> layer, x = CompositeDecoderLayer(16, heads=4), torch.randn(2, 8, 16)
    >>> text, visual = layer(*streams.take(x), streams.text_mask(), text_positions=streams.text.index, visual_positions=streams.visual.index)
    >>> streams.put(text, visual).shape
    torch.Size([2, 8, 16])

    The call takes text [B, Nt, width]; visual [B, Nv, width], or None in decoding; mask, that of `TokenStreams.text_mask` over the keys [past; visual; text] (without one: causal,
    the visual tokens before all text); their positions; past and return_keys of `MaskedAttention`. Gives (text, visual), with return_keys also the `KeyValues`.

    Parameters: those of `DecoderLayer`, whose weights it has, and visual_update, "self" or "ffn": the two ways in which the paper can be read. Raises as `MaskedAttention` does."""

    def __init__(self, width: int, heads: int, *, visual_update: str = "self", **options: Any) -> None:
        super().__init__(width, heads, **options)
        if visual_update not in ("self", "ffn"):
            raise ValueError(f'CompositeDecoderLayer: visual_update must be "self" or "ffn", got {visual_update!r}')
        self.visual_update = visual_update

    def forward(
        self,
        text: Tensor,
        visual: Tensor | None = None,
        mask: Any = None,
        *,
        text_positions: Tensor | None = None,
        visual_positions: Tensor | None = None,
        past: KeyValues | None = None,
        return_keys: bool = False,
    ) -> Any:
        attention = self.self_attn
        check_tokens("CompositeDecoderLayer", "text", text, ("B", "N", attention.width))
        attention.refuse_unread(text_positions=text_positions, visual_positions=visual_positions)
        before = 0 if past is None else attention.check_keys("past", past, text).key.shape[2]
        if visual is not None:
            check_tokens("CompositeDecoderLayer", "visual", visual, ("B", "N", attention.width), text)
            seen = attention.keys(self.input_layernorm(visual), attention.positions_behind(before, visual, visual_positions))
            past, before = (seen if past is None else past.append(seen)), before + visual.shape[1]
            visual = self._carried(visual, seen)
        elif visual_positions is not None:
            raise ValueError(f"CompositeDecoderLayer: visual_positions must be given with visual alone, got {describe(visual_positions)}")
        text_positions = attention.positions_behind(before, text, text_positions)
        normed = self.input_layernorm(text)
        own = attention.keys(normed, text_positions)
        keys = own if past is None else past.append(own)
        text = self.feed_forward(text + attention.join(masked_attention(attention.queries(normed, text_positions), *keys, mask, causal=mask is None)))
        return (text, visual, keys) if return_keys else (text, visual)

    def _carried(self, visual: Tensor, seen: KeyValues) -> Tensor | None:
        """The visual tokens that the next layer sees."""
        if self.visual_update == "self":  # a softmax over one key is 1
            visual = visual + self.self_attn.join(seen.value.repeat_interleave(self.self_attn.heads // self.self_attn.key_heads, 1))
        return self.feed_forward(visual)
