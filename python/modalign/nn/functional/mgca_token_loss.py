"""Words and patches of a pair aligned with each other through cross-attention. [MGCA, NeurIPS 2022]"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import _arguments as arguments
from ...ops import _contrastive as contrastive
from ...ops._gram_schmidt import unit
from . import _features as inputs
from ._values import check_not_negative

__all__ = ["mgca_token_loss"]

QUANTILES = (0.1, 0.9)  # weights beyond these are drawn in: single tokens do not rule a sample


def mgca_token_loss(
    words: Tensor,
    patches: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    word_mask: Tensor | None = None,
    patch_mask: Tensor | None = None,
    word_weights: Tensor | None = None,
    patch_weights: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Each word shall know the mean of the patches it attends to among those of the sample's other words, and each patch likewise; both ways, summed.

    ::

        o_l     = unit(sum_n softmax_n(e_l . p_n / temperature) p_n)                      S[l, l'] = e_l . o_l' / temperature
        word_b  = 1/2 sum_l w_l (CE(S[l, :], l) + CE(S[:, l], l))                         loss_b = word_b + patch_b, words and patches changed over

    >>> import torch
    >>> mgca_token_loss(torch.eye(3)[None], torch.eye(3)[None], temperature=1.0)
    tensor(1.5231)

    Parameters
    ----------
    words : Tensor [B, L, D]
    patches : Tensor [B, N, D]
        The tokens of sample b; L and N of 1 or more.
    temperature : float or Tensor of one element
        Positive, of the attention and of the logits; a tensor gets a gradient.
    word_mask : Tensor bool [B, L], optional
    patch_mask : Tensor bool [B, N], optional
        False: padding, which is neither attended to nor told apart from, and is never read.
    word_weights : Tensor [B, L], optional
    patch_weights : Tensor [B, N], optional
        How much a token counts: the attention of [CLS] in the encoder's last layer. Over the tokens that are there with a weight above 0 the weights are
        drawn into their 10 % to 90 % quantiles, then divided by their sum. They are constants. Default: equal weights.
    normalize : bool
        Scale all tokens to unit length first.
    reduction : str
        "mean", "sum" or "none": [B].

    Returns
    -------
    Tensor, float32 (float64 for float64)

    Gradient
    --------
    In words, patches and temperature, by autograd, where torch's attention has it once.

    Edges
    -----
    One token against any number of patches: the words' half is 0. A sample without words or without patches, or whose weights are all 0, adds 0. B = 0: 0. A
    NaN makes the loss of its sample NaN.

    Raises
    ------
    TypeError, ValueError
        ``mgca_token_loss: <argument> must ..., got ...``; for negative weights on the CPU only.

    Complexity
    ----------
    Attention streams. The logits of a sample are stored, B (L^2 + N^2) numbers: 111 words and 196 patches in the published model.

    Paper: Wang et al., "Multi-granularity cross-modal alignment for generalized medical visual representation learning", NeurIPS 2022, section 3.3.
    """
    op = "mgca_token_loss"
    words, patches = inputs.check_features(op, words=(words, "[B, L, D]"), patches=(patches, "[B, N, D]"))
    temperature = inputs.check_scale(op, "temperature", temperature, words)
    reduction = contrastive.check_reduction(op, reduction)
    normalize = arguments.check_flag(op, "normalize", normalize)
    sides = [
        _checked(op, *side)
        for side in (("word", "words", "[B, L]", words, word_mask, word_weights), ("patch", "patches", "[B, N]", patches, patch_mask, patch_weights))
    ]
    both = sides[0][1].any(1) & sides[1][1].any(1)

    def one_way(queries: Tensor, here: Tensor, weights: Tensor, keys: Tensor, there: Tensor) -> Tensor:
        attended = unit(F.scaled_dot_product_attention(queries / temperature, keys, keys, attn_mask=there[:, None], scale=1.0))
        logits = queries @ attended.mT / temperature
        rows = logits.masked_fill(~here[:, None, :], -torch.inf).logsumexp(2)
        columns = logits.masked_fill(~here[:, :, None], -torch.inf).logsumexp(1)
        return (weights * ((rows + columns) / 2 - logits.diagonal(dim1=1, dim2=2))).sum(1)

    with torch.autocast(words.device.type, enabled=False):
        tokens, masks, weights = [], [], []
        for vectors, mask, given in sides:
            vectors = torch.where((mask & both[:, None])[..., None], vectors, 0)
            tokens.append(unit(vectors) if normalize else vectors)
            # Where a sample has nothing, its zeros stand for tokens, of weight 0: a softmax over nothing would have NaN for a gradient.
            masks.append(mask | ~both[:, None])
            weights.append(_token_weights(given, mask & both[:, None]))
        loss = one_way(tokens[0], masks[0], weights[0], tokens[1], masks[1]) + one_way(tokens[1], masks[1], weights[1], tokens[0], masks[0])
    return inputs.mean_of(loss, reduction)


def _checked(op: str, kind: str, name: str, shape: str, tokens: Tensor, mask: object, weights: object) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of one side with their mask and weights, all True and all 1 where they are not given."""
    if tokens.shape[1] == 0:
        raise ValueError(f"{op}: {name} must hold at least one token, got {arguments.describe(tokens)}")
    sizes = tuple(tokens.shape[:2])
    if mask is None:
        mask = tokens.new_ones(sizes, dtype=torch.bool)
    mask = inputs.check_whole(op, f"{kind}_mask", mask, torch.bool, shape, sizes, tokens)
    if weights is None:
        return tokens, mask, tokens.new_ones(sizes)
    (weights,) = inputs.check_features(op, **{f"{kind}_weights": (weights, shape)})
    if tuple(weights.shape) != sizes or weights.device != tokens.device:
        raise ValueError(f"{op}: {kind}_weights must be {shape} = {list(sizes)} on {tokens.device}, got {arguments.describe(weights)}")
    weights = torch.where(mask, weights.detach().to(tokens.dtype), 0)
    return tokens, mask, check_not_negative(op, f"{kind}_weights", weights)


def _token_weights(weights: Tensor, mask: Tensor) -> Tensor:
    if len(weights) == 0:  # quantiles of nothing are refused
        return weights
    some = mask & (weights != 0)
    low, high = (torch.where(some, weights, torch.nan).nanquantile(q, dim=1, keepdim=True) for q in QUANTILES)
    drawn_in = torch.where(some, weights.clamp(low, high), 0)
    total = drawn_in.sum(1, keepdim=True)
    return drawn_in / torch.where(total == 0, 1, total)
