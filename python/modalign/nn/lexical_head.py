"""Features as activations of the words of a vocabulary. [LexVLA, NeurIPS 2024]"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import segment_max_similarity
from ..ops._arguments import describe
from .functional.keep_largest import keep_largest

__all__ = ["LexicalHead"]


class LexicalHead(nn.Module):
    r"""How active each word of a codebook is in a sample: ``s_v = max(0, max over tokens n of x_n . c_v)``. [LexVLA, NeurIPS 2024]

    Two samples are alike by the product of their activations, unit length, as in `ops.clip_loss`; `nn.functional.overuse_penalty` keeps words from being
    active everywhere. As published the text's codebook stays as it is, learnable=False, and that of pictures is trained. The paper names the parts; no code
    was released.

    >>> import torch
    >>> head = LexicalHead(torch.eye(4), top_k=1).eval()
    >>> head(torch.tensor([[[0.5, 2.0, 0.0, 0.0], [1.0, 0.0, -1.0, 0.0]]]))          # two patches of one picture
    tensor([[0., 2., 0., 0.]], grad_fn=<WhereBackward0>)

    Parameters: codebook float [V, D], copied; learnable; top_k, the words that are kept of a sample outside training, default all.

    The call takes [B, D], or tokens [B, N, D] with mask bool [B, N], False for padding, which is never read, and gives [B, V]. Products of tokens and words
    are not stored: memory is linear in B N and B V. A token's gradient comes from the words for which it is the first best one of its sample, and which are
    active. A sample without tokens has no active word. Raises TypeError and ValueError for shapes and dtypes."""

    def __init__(self, codebook: Tensor, *, learnable: bool = True, top_k: int | None = None) -> None:
        super().__init__()
        if codebook.dim() != 2 or not codebook.is_floating_point():
            raise ValueError(f"LexicalHead: codebook must be a floating-point tensor [V, D], got {describe(codebook)}")
        if top_k is not None and not 1 <= top_k <= len(codebook):
            raise ValueError(f"LexicalHead: top_k must be None or from 1 to V = {len(codebook)}, got {top_k}")
        self.codebook, self.top_k = nn.Parameter(codebook.detach().clone(), requires_grad=learnable), top_k

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        if features.dim() not in (2, 3) or features.shape[-1] != self.codebook.shape[1]:
            raise ValueError(f"LexicalHead: features must be [B, D] or [B, N, D] with D = {self.codebook.shape[1]}, got {describe(features)}")
        tokens = features[:, None] if features.dim() == 2 else features
        if mask is None:
            rows, lengths = tokens.flatten(0, 1), torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
        else:
            if mask.dtype is not torch.bool or mask.shape != features.shape[:2] or features.dim() == 2:
                raise ValueError(f"LexicalHead: mask must be bool [B, N] of features [B, N, D], got {describe(mask)}")
            rows, lengths = tokens[mask], mask.sum(1)
        active = segment_max_similarity(rows, F.pad(lengths.cumsum(0), (1, 0)), self.codebook).values.relu()
        return active if self.training or self.top_k is None else keep_largest(active, self.top_k)

    def extra_repr(self) -> str:
        return f"words={self.codebook.shape[0]}, width={self.codebook.shape[1]}, top_k={self.top_k}"
