"""Patches against words, averaged, as a contrastive loss. [CG-VLM, 2023]"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import clip_loss
from ...ops._gram_schmidt import unit
from . import _features as inputs

__all__ = ["cgvlm_loss"]


def cgvlm_loss(patches: Tensor, tokens: Tensor, *, logit_scale: float | Tensor, token_mask: Tensor | None = None) -> Tensor:
    r"""`ops.clip_loss` in which picture i and caption j are as similar as the mean patch of i is to the words of j on average.

    ::

        s[i, j] = 1 / T_j sum_t cos(mean_n patches_in, tokens_jt)

    A mean of products with one vector is the product with the mean of the unit words, so no pair of a patch and a word is ever formed.

    >>> import torch
    >>> cgvlm_loss(torch.eye(3)[:, None], torch.eye(3)[:, None], logit_scale=1.0)
    tensor(0.5514)

    Parameters
    ----------
    patches : Tensor [B, N, D]
        What the connector gives to the language model, N of 1 or more.
    tokens : Tensor [B, L, D]
        The language model's input embeddings of the caption; detach them to train the connector alone, as published.
    logit_scale : float or Tensor of one element
        Positive, already exponentiated; a tensor gets a gradient.
    token_mask : Tensor bool [B, L], optional
        True for words; what stands elsewhere is never read. A sample without words is neither row nor candidate.

    Returns
    -------
    Tensor, float32 (float64 for float64)

    Gradient
    --------
    In patches, tokens and logit_scale, once. With `token_mask` a GPU is waited for, since rows are picked out.

    Raises
    ------
    TypeError, ValueError
        ``cgvlm_loss: <argument> must ..., got ...``

    Paper: Liu et al., "Contrastive vision-language alignment makes efficient instruction learner", 2023. Put together from its abstract.
    """
    op = "cgvlm_loss"
    patches, tokens = inputs.check_features(op, patches=(patches, "[B, N, D]"), tokens=(tokens, "[B, L, D]"))
    if patches.shape[1] == 0 or tokens.shape[1] == 0:
        raise ValueError(f"{op}: patches and tokens must have N and L of 1 or more, got {patches.shape[1]} and {tokens.shape[1]}")
    if token_mask is None:
        return clip_loss(unit(patches.mean(1)), unit(tokens).mean(1), logit_scale=logit_scale)
    token_mask = inputs.check_whole(op, "token_mask", token_mask, torch.bool, "[B, L]", tuple(tokens.shape[:2]), tokens)
    with_words = token_mask.any(1)
    words = inputs.masked_mean(unit(torch.where(token_mask[..., None], tokens, 0)), token_mask)
    return clip_loss(unit(patches.mean(1))[with_words], words[with_words], logit_scale=logit_scale)
