"""Text that is mapped into vision space, looks there, and takes back what it saw. [Inverse-LLaVA, 2025]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import masked_attention
from ._tokens import check_sizes, check_tokens
from .masked_attention import KeyValues, MaskedAttention

__all__ = ["TextToVisionAdditive", "VisionAdditiveAttention"]


class TextToVisionAdditive(nn.Module):
    """A branch beside some middle layers of a language model; pictures never enter its sequence. [Inverse-LLaVA, 2025; put together from the abstract]

    ::

        out = h + s * W_vt attention(h W_tv, vision)          s [width], 0 at first

    >>> import torch
    >>> branch, h = TextToVisionAdditive(16, 24, heads=2), torch.randn(2, 5, 16)
    >>> torch.equal(branch(h, torch.randn(2, 9, 24)), h)
    True

    The call takes h [B, N, width]; vision [B, M, vision_width], unprojected features, M = 0 for no picture; and a mask of `MaskedAttention`. A token that sees nothing is unchanged.

    Parameters: width, vision_width; heads, of vision_width / heads. Raises as `MaskedAttention` does."""

    def __init__(self, width: int, vision_width: int, *, heads: int = 8) -> None:
        super().__init__()
        check_sizes("TextToVisionAdditive", width=width, vision_width=vision_width)
        self.to_vision = nn.Linear(width, vision_width, bias=False)
        self.attention = MaskedAttention(vision_width, heads, out_width=width)
        self.scale = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor, vision: Tensor, mask: Any = None) -> Tensor:
        check_tokens("TextToVisionAdditive", "h", h, ("B", "N", self.to_vision.in_features))
        return h + self.scale * self.attention(self.to_vision(h), vision, mask)


class VisionAdditiveAttention(MaskedAttention):
    """The self-attention of a layer, to whose queries, keys and values is added what its tokens see in the picture. [Inverse-LLaVA, 2025; put together from the abstract]

    ::

        c = softmax((x W_tv) Z^T / sqrt(D)) Z                                             Z: vision tokens, unprojected, in vision_heads parts of width D
        q = W_q x + a_q V_q c,   k = W_k x + a_k V_k c,   v = W_v x + a_v V_v c           a = 0 at first: the attention of the host
        out = W_o masked_attention(rotate(q), rotate(k), v)

    >>> import torch
    >>> attention, x = VisionAdditiveAttention(16, 24, heads=4, terms="kv", rotary=10000.0), torch.randn(2, 5, 16)
    >>> attention(x, torch.randn(2, 9, 24), causal=True).shape
    torch.Size([2, 5, 16])

    The call takes x [B, N, width]; vision [B, M, vision_width] or None; vision_mask, which vision tokens a token sees; and mask, causal, positions, past and return_keys of
    `MaskedAttention`. The number of keys stays that of the text; a picture that is not there changes nothing.

    Parameters: width, vision_width, heads; terms, which of q, k and v are added to; vision_heads, 1 in the formula; options of `MaskedAttention`, whose weights keep their
    names. Raises as that does."""

    def __init__(self, width: int, vision_width: int, heads: int, *, terms: str = "qkv", vision_heads: int = 1, **options: Any) -> None:
        super().__init__(width, heads, **options)
        check_sizes("VisionAdditiveAttention", vision_width=vision_width, vision_heads=vision_heads)
        if not terms or any(terms.count(each) > 1 or each not in "qkv" for each in terms):
            raise ValueError(f'VisionAdditiveAttention: terms must be letters of "qkv", got {terms!r}')
        if vision_width % vision_heads:
            raise ValueError(f"VisionAdditiveAttention: vision_heads must divide vision_width = {vision_width}, got {vision_heads}")
        self.vision_heads = vision_heads
        self.to_vision = nn.Linear(width, vision_width, bias=False)
        widths = {"q": self.heads * self.head_width, "k": self.key_heads * self.head_width, "v": self.key_heads * self.head_width}
        self.vision_proj = nn.ModuleDict({each: nn.Linear(vision_width, widths[each], bias=False) for each in terms})
        self.vision_gate = nn.ParameterDict({each: nn.Parameter(torch.zeros(())) for each in terms})

    def seen(self, x: Tensor, vision: Tensor, vision_mask: Any = None) -> Tensor:
        """c [B, N, vision_width]"""
        check_tokens("VisionAdditiveAttention", "vision", vision, ("B", "M", self.to_vision.out_features), x)
        asked, looked = (each.unflatten(2, (self.vision_heads, -1)).transpose(1, 2) for each in (self.to_vision(x), vision))
        return masked_attention(asked, looked, looked, vision_mask).transpose(1, 2).flatten(2)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        vision: Tensor | None = None,
        mask: Any = None,
        *,
        vision_mask: Any = None,
        causal: bool | str = False,
        positions: Tensor | None = None,
        past: KeyValues | None = None,
        return_keys: bool = False,
    ) -> Any:
        check_tokens("VisionAdditiveAttention", "x", x, ("B", "N", self.width))
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if vision is not None:
            c = self.seen(x, vision, vision_mask)
            added = {each: self.vision_gate[each] * self.vision_proj[each](c) for each in self.vision_proj}
            q, k, v = q + added.get("q", 0), k + added.get("k", 0), v + added.get("v", 0)
        self.refuse_unread(positions=positions)
        if past is not None:
            positions = self.positions_behind(self.check_keys("past", past, x).key.shape[2], x, positions)
        keys = KeyValues(self._rotated(self._heads(k), positions), self._heads(v))
        keys = keys if past is None else past.append(keys)
        out = self.join(masked_attention(self._rotated(self._heads(q), positions), *keys, mask, causal=causal))
        return (out, keys) if return_keys else out
