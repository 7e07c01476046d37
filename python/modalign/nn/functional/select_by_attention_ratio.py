"""Preference pairs from answers that looked at the wrong picture. [MIA-DPO, ICLR 2025]"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import _arguments as arguments
from ...ops import attention_segment_mass
from ...ops._attention_arguments import MaskProgram
from . import _features as inputs

__all__ = ["attention_ratio", "select_by_attention_ratio"]


def attention_ratio(
    query: Tensor,
    key: Tensor,
    segments: Tensor,
    num_images: int,
    *,
    per_key: bool = True,
    mask: Tensor | MaskProgram | None = None,
    causal: bool | str = True,
    scale: float | None = None,
) -> Tensor:
    """The share of each picture in what the tokens of an answer look at, among the pictures of the prompt.

    ::

        a_i = mean over heads, queries and the keys of picture i of p        R_i = a_i / sum_i' a_i'

    >>> import torch
    >>> attention_ratio(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 8, 4), torch.tensor([0, 0, 0, 1, 1, 1, -1, -1]), 2)        # all keys alike
    tensor([[0.5000, 0.5000]])

    Parameters: query [B, H, Nq, D] of the generated tokens, the last ones, at one middle layer (published: layer 16 of 32, from 0); key [B, Hkv, Nk, D] of everything up to
    them; segments int64 [Nk] or [B, Nk], the picture of each key, -1: none; per_key=False compares sums over the keys in place of means, as for the share of a
    picture within a picture; mask, causal, scale as in `modalign.ops.masked_attention`.

    Returns float32 (float64) [B, num_images]. Rows sum to 1; where nothing of any picture is looked at, or there are no queries, they are 0. The gradient is that of
    `attention_segment_mass`, which also says what is refused.

    Paper: Liu et al., "MIA-DPO: multi-image augmented direct preference optimization for large vision-language models", ICLR 2025, section 3.2."""
    per_key = arguments.check_flag("attention_ratio", "per_key", per_key)
    mass = attention_segment_mass(query, key, segments, num_images, mask, causal=causal, scale=scale)
    looked = mass.sum((1, 2))
    if per_key:
        keys = (segments[..., None] == torch.arange(num_images, device=segments.device)).sum(-2)
        looked = looked / keys.clamp(min=1)
    total = looked.sum(1, keepdim=True)
    return torch.where(total == 0, 0, looked / torch.where(total == 0, 1, total))


def select_by_attention_ratio(
    ratio: Tensor, differs: Tensor, log_probabilities: Tensor, threshold: float | Tensor, *, answer_mask: Tensor | None = None, least_perplexity: float = 1.1
) -> Tensor:
    """Which generated answers become the rejected side of a preference pair: those that differ from the reference answer, hardly looked at the picture that was asked
    about, and were not sure.

    >>> import torch
    >>> ratio, sure, unsure = torch.tensor([0.3, 0.9, 0.3]), [-0.01, -0.01], [-0.9, -0.4]
    >>> select_by_attention_ratio(ratio, torch.tensor([True, True, True]), torch.tensor([unsure, unsure, sure]), 0.8)
    tensor([ True, False, False])

    Parameters: ratio [B], `attention_ratio` of the picture asked about; differs bool [B], the answer is not the reference; log_probabilities [B, T], of the likeliest
    token at each place of the answer; answer_mask bool [B, T], False: padding; threshold, a number or [B].

    Returns bool [B]: differs, ratio < threshold, and perplexity exp(-mean log_probabilities) > least_perplexity. An answer without tokens has perplexity 1; a NaN selects
    nothing.

    Raises TypeError and ValueError, ``select_by_attention_ratio: <argument> must ..., got ...``.

    Paper: as `attention_ratio`; published also: answers below 512 characters."""
    op = "select_by_attention_ratio"
    ratio, log_probabilities = inputs.check_features(op, ratio=(ratio, "[B]"), log_probabilities=(log_probabilities, "[B, T]"))
    differs = inputs.check_whole(op, "differs", differs, torch.bool, "[B]", tuple(ratio.shape), ratio)
    if answer_mask is None:
        answer_mask = torch.ones_like(log_probabilities, dtype=torch.bool)
    answer_mask = inputs.check_whole(op, "answer_mask", answer_mask, torch.bool, "[B, T]", tuple(log_probabilities.shape), ratio)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, Tensor)) or (isinstance(threshold, Tensor) and threshold.shape not in ((), ratio.shape)):
        raise TypeError(f"{op}: threshold must be a number or a tensor [B], got {arguments.describe(threshold)}")
    perplexity = (-inputs.masked_mean(log_probabilities[..., None], answer_mask)[:, 0]).exp()
    return differs & (ratio < threshold) & (perplexity > least_perplexity)
