"""Masked words for masked language modelling."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...ops import _arguments as arguments
from . import _features as inputs

__all__ = ["MaskedTokens", "mask_tokens"]


class MaskedTokens(NamedTuple):
    """tokens: int64 [B, L] to show to the encoder; labels: int64 [B, L], the hidden word, -100 where there is nothing to guess."""

    tokens: Tensor
    labels: Tensor


def mask_tokens(
    tokens: Tensor, *, mask_id: int = 49405, rate: float = 0.15, maskable: Tensor | None = None, generator: torch.Generator | None = None
) -> MaskedTokens:
    """Hide a share `rate` of the words: 80 % of the hidden ones become `mask_id`, 10 % a word drawn at random, 10 % stay, all are to be guessed.

    >>> import torch
    >>> mask_tokens(torch.tensor([[49406, 320, 0, 0]]), rate=0.0).labels              # at least one word of every text
    tensor([[-100,  320, -100, -100]])

    Parameters: tokens int64 [B, L]; mask_id, the token that says "hidden"; rate between 0 and 1; maskable bool [B, L], True for words, default: tokens above 0
    and below `mask_id`, which are the words of CLIP's vocabulary with IRRA's mask token; generator, for the draws, on its own device or that of `tokens`.
    Words drawn at random lie between 1 and ``mask_id - 1``. The first word by chance is hidden where a text would have none; a text without words has none.

    Raises TypeError and ValueError, ``mask_tokens: <argument> must ..., got ...``.

    Paper: Devlin et al., BERT, NAACL 2019, section 3.1; settings of Jiang and Ye, "IRRA", CVPR 2023, section 3.2."""
    op = "mask_tokens"
    if not isinstance(tokens, Tensor) or tokens.dtype is not torch.int64 or tokens.dim() != 2 or tokens.shape[1] == 0:
        raise TypeError(f"{op}: tokens must be an int64 tensor [B, L] with L of 1 or more, got {arguments.describe(tokens)}")
    if isinstance(mask_id, bool) or not isinstance(mask_id, int) or mask_id < 2:
        raise ValueError(f"{op}: mask_id must be a whole number of at least 2, got {arguments.describe(mask_id)}")
    rate = inputs.check_share(op, "rate", rate)
    words = (tokens > 0) & (tokens < mask_id) if maskable is None else maskable
    words = inputs.check_whole(op, "maskable", words, torch.bool, "[B, L]", tuple(tokens.shape), tokens)
    device = tokens.device if generator is None else generator.device
    draw, kind = torch.rand(2, *tokens.shape, generator=generator, device=device).to(tokens.device)
    other = torch.randint(1, mask_id, tuple(tokens.shape), generator=generator, device=device).to(tokens.device)
    draw = torch.where(words, draw, 2)
    hidden = words & ((draw < rate) | (draw == draw.amin(1, keepdim=True)))
    shown = torch.where(kind < 0.8, mask_id, torch.where(kind < 0.9, other, tokens))
    return MaskedTokens(torch.where(hidden, shown, tokens), torch.where(hidden, tokens, -100))
