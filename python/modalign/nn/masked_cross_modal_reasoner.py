"""Masked words guessed from the picture. [IRRA, CVPR 2023]"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .functional import _features as inputs
from .functional._linear_cross_entropy import linear_cross_entropy

__all__ = ["MaskedCrossModalReasoner"]


class MaskedCrossModalReasoner(nn.Module):
    """IRRA's implicit relation reasoning: words attend to patches and go through a small transformer; those that `functional.mask_tokens` hid are guessed.

    ::

        h = transformer(cross_attention(LN(text), LN(image), LN(image)))        pre-norm blocks of width D, 4 D inside, QuickGELU
        loss = mean over labels != -100 of CE(Linear(LN(QuickGELU(Linear(h)))), label)

    >>> import torch
    >>> reasoner = MaskedCrossModalReasoner(width=64, vocabulary=100)
    >>> reasoner(torch.randn(2, 5, 64), torch.randn(2, 9, 64), torch.tensor([[-100, 7, -100, -100, 3]] * 2)).shape
    torch.Size([])

    The call takes text [B, L, D], the text encoder's output for the masked words; image [B, N, D]; labels int64 [B, L], -100 where there is nothing to guess;
    and text_mask bool [B, L], optional, True for words: what stands elsewhere is never read. Returns float32 (float64); 0 without labels. The logits over
    the vocabulary are not stored. `hidden` gives h.

    Raises TypeError and ValueError, ``MaskedCrossModalReasoner: <argument> must ..., got ...``; RuntimeError for a label out of range, on the CPU only.

    Paper: Jiang and Ye, "Cross-modal implicit relation reasoning and aligning for text-to-image person retrieval", CVPR 2023, section 3.2. Released code has no
    text_mask: there, words attend to padding.

    Parameters
    ----------
    width : int
        D of both token sequences, 512 as published; heads are 64 wide, so a multiple of 64.
    vocabulary : int
        49408, CLIP's, as published.
    layers : int
        4, as published.
    """

    def __init__(self, width: int = 512, vocabulary: int = 49408, *, layers: int = 4) -> None:
        super().__init__()
        if width < 64 or width % 64:
            raise ValueError(f"MaskedCrossModalReasoner: width must be a multiple of 64, got {width}")
        if vocabulary < 1 or layers < 1:
            raise ValueError(f"MaskedCrossModalReasoner: vocabulary and layers must be at least 1, got {vocabulary} and {layers}")
        self.norm_text, self.norm_image = nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross_attention = nn.MultiheadAttention(width, width // 64, batch_first=True)
        block = nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, activation=_quick_gelu, batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.dense, self.norm, self.words = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, vocabulary)
        self._initialize(width**-0.5, width**-0.5 * (2 * layers) ** -0.5, (2 * width) ** -0.5)

    def _initialize(self, attention: float, projection: float, inner: float) -> None:
        """The released standard deviations; biases as torch has them."""
        for layer in (self.cross_attention, *(block.self_attn for block in self.transformer.layers)):
            nn.init.normal_(layer.in_proj_weight, std=attention)
            nn.init.normal_(layer.out_proj.weight, std=projection)
        for block in self.transformer.layers:
            nn.init.normal_(block.linear1.weight, std=inner)
            nn.init.normal_(block.linear2.weight, std=projection)
        nn.init.normal_(self.dense.weight, std=inner)
        nn.init.normal_(self.words.weight, std=projection)

    def hidden(self, text: Tensor, image: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """[B, L, D] behind the transformer."""
        absent = None
        if text_mask is not None:
            text = torch.where(text_mask[..., None], text, 0)
            absent = ~text_mask & text_mask.any(1, keepdim=True)  # a text without words attends to zeros: a softmax over nothing would be NaN
        image = self.norm_image(image)
        attended = self.cross_attention(self.norm_text(text), image, image, need_weights=False)[0]
        return self.transformer(attended, src_key_padding_mask=absent)

    def forward(self, text: Tensor, image: Tensor, labels: Tensor, text_mask: Tensor | None = None) -> Tensor:
        op = "MaskedCrossModalReasoner"
        inputs.check_features(op, text=(text, "[B, L, D]"), image=(image, "[B, N, D]"))
        labels = inputs.check_whole(op, "labels", labels, torch.int64, "[B, L]", tuple(text.shape[:2]), text)
        if text_mask is not None:
            text_mask = inputs.check_whole(op, "text_mask", text_mask, torch.bool, "[B, L]", tuple(text.shape[:2]), text)
        rows = self.norm(_quick_gelu(self.dense(self.hidden(text, image, text_mask))))
        return linear_cross_entropy(rows.flatten(0, 1), self.words.weight, self.words.bias, labels.flatten())


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)
