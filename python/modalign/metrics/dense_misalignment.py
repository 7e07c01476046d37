"""Which words of a caption do not fit its picture, from the gradient of their similarity. [CLIP4DM, AAAI 2025]"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._arguments import check_alike, check_vectors, describe

__all__ = ["CaptionWords", "caption_words", "clip4dm_attribution", "clip_score", "f_clipscore", "misaligned_words", "word_attribution"]

MODES = ("threshold", "most_negative")


@torch.no_grad()
def clip4dm_attribution(attention: Tensor, value: Tensor, output_gradient: Tensor, end: Tensor) -> Tensor:
    """How much each token of a caption adds to the cosine y of caption and picture, by attention and its gradient in the last text layers.

    ::

        score[b, t] = mean over layers and heads of A[e, t] dy/dA[e, t],        dy/dA[e, t] = dy/dO[e] . v_t        for 0 < t < e, else 0

    e is the end token, whose output is the caption's embedding: O[e] = sum_t A[e, t] v_t. So one row of the attention of each layer is all there is to know.
    Nothing is cut off at 0: the negative scores are what is looked for.

    >>> import torch
    >>> attention, value = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([[0.0], [-2.0], [9.0]])
    >>> clip4dm_attribution(attention[None, None, None], value[None, None, None], torch.ones(1, 1, 1, 1), torch.tensor([2]))
    tensor([[ 0., -1.,  0.]])

    Parameters
    ----------
    attention : Tensor [S, B, H, L]
        Of the last S text layers (published: 3), the probabilities with which the end token attends to token t, by head.
    value : Tensor [S, B, H, L, E]
        The values v of these layers, by head.
    output_gradient : Tensor [S, B, H, E]
        Gradient of y, the cosine without a scale, in what the heads give the end token, before the output projection.
    end : Tensor int64 [B]
        Where the end token of each caption is: the largest id, for CLIP's tokens.

    Returns
    -------
    Tensor [B, L], float32 (float64 for float64)

    Raises
    ------
    TypeError, ValueError
        ``clip4dm_attribution: <argument> must ..., got ...``

    Products are made in float32: gradients of half types would vanish, so take them in float32 too, or scale y.

    Paper: Nam et al., "Extract free dense misalignment from CLIP", AAAI 2025, section 3.
    """
    op = "clip4dm_attribution"
    attention = check_vectors(op, "attention", attention, "[S, B, H, L]")
    value = check_vectors(op, "value", value, "[S, B, H, L, E]")
    output_gradient = check_vectors(op, "output_gradient", output_gradient, "[S, B, H, E]")
    check_alike(op, "output_gradient", output_gradient, "value", value)
    if value.dim() != 5 or value.shape[:4] != attention.shape or value.device != attention.device:
        raise ValueError(f"{op}: value must be [S, B, H, L, E] with [S, B, H, L] = {list(attention.shape)} on {attention.device}, got {describe(value)}")
    if output_gradient.shape[:-1] != attention.shape[:3]:
        raise ValueError(f"{op}: output_gradient must be [S, B, H, E] with [S, B, H] = {list(attention.shape[:3])}, got {describe(output_gradient)}")
    S, B, H, L = attention.shape
    if S == 0 or H == 0:
        raise ValueError(f"{op}: attention must have at least one layer and one head, got {describe(attention)}")
    if not isinstance(end, Tensor) or end.dtype is not torch.int64 or tuple(end.shape) != (B,):
        raise TypeError(f"{op}: end must be an int64 tensor [B] = [{B}], got {describe(end)}")
    if bool(((end < 0) | (end >= L)).any()):
        raise ValueError(f"{op}: end must hold positions from 0 to L - 1 = {L - 1}, got {end.tolist()}")
    real = torch.float64 if value.dtype is torch.float64 else torch.float32
    gradient = (value.to(real) @ output_gradient.to(real)[..., None]).squeeze(-1)
    place = torch.arange(L, device=end.device)
    return torch.where((place > 0) & (place < end[:, None]), (attention.to(real) * gradient).mean((0, 2)), 0)


class CaptionWords(NamedTuple):
    """words : the words of a caption that are judged
    index : for every piece, which of them it belongs to, or -1
    """

    words: list[str]
    index: list[int]


def caption_words(pieces: Sequence[str], *, prefix: str = "A photo depicts", end_of_word: str = "</w>") -> CaptionWords:
    """Words of a caption from the pieces of its tokens. Words of the prefix, words without a letter or digit, and special tokens like "<|endoftext|>" are
    not judged.

    >>> caption_words(["<|startoftext|>", "a</w>", "photo</w>", "depicts</w>", "co", "ke</w>", "!</w>", "<|endoftext|>"])
    CaptionWords(words=['coke'], index=[-1, -1, -1, -1, 0, 0, -1, -1])

    Parameters: pieces, one for each token, the last of a word ending in `end_of_word`; prefix, what the caption begins with in any case, "" for nothing.

    Raises ValueError for a caption that begins with something else."""
    words: list[str] = []
    word_of: list[int] = []
    start = True
    for piece in pieces:
        if piece.startswith("<|") and piece.endswith("|>"):
            word_of.append(-1)
            start = True
            continue
        if start:
            words.append("")
        start = piece.endswith(end_of_word)
        words[-1] += piece.removesuffix(end_of_word)
        word_of.append(len(words) - 1)
    before = prefix.lower().split()
    if [word.lower() for word in words[: len(before)]] != before:
        raise ValueError(f"caption_words: pieces must begin with the prefix {prefix!r}, got {' '.join(words)!r}")
    judged = [number for number, word in enumerate(words) if number >= len(before) and any(character.isalnum() for character in word)]
    renumbered = {number: new for new, number in enumerate(judged)}
    return CaptionWords([words[number] for number in judged], [renumbered.get(number, -1) for number in word_of])


@torch.no_grad()
def word_attribution(scores: Tensor, words: Tensor) -> Tensor:
    """The mean score of the tokens of every word.

    >>> import torch
    >>> word_attribution(torch.tensor([[9.0, 1.0, 3.0, -1.0]]), torch.tensor([[-1, 0, 0, 1]]))
    tensor([[ 2., -1.]])

    Parameters: scores float [B, L]; words int64 [B, L], the word of each token as `caption_words` gives it, -1 for none. Returns float32 (float64 for float64)
    [B, W], W the most words of a caption; NaN where a caption has fewer. Raises TypeError and ValueError."""
    op = "word_attribution"
    scores = check_vectors(op, "scores", scores, "[B, L]")
    if not isinstance(words, Tensor) or words.dtype is not torch.int64 or words.shape != scores.shape:
        raise TypeError(f"{op}: words must be an int64 tensor [B, L] = {list(scores.shape)}, got {describe(words)}")
    if bool((words < -1).any()):
        raise ValueError(f"{op}: words must hold numbers of words or -1, got {words.min().item()}")
    W = int(words.max()) + 1 if words.numel() else 0
    real = torch.float64 if scores.dtype is torch.float64 else torch.float32
    at = words + 1  # column 0 takes the tokens of no word
    total = scores.new_zeros((len(scores), W + 1), dtype=real).scatter_add(1, at, scores.to(real))
    count = scores.new_zeros((len(scores), W + 1), dtype=real).scatter_add(1, at, torch.ones_like(scores, dtype=real))
    return (total / count)[:, 1:]


@torch.no_grad()
def misaligned_words(scores: Tensor, *, mode: str = "threshold", threshold: float = -5e-5) -> Tensor:
    """Which words do not fit: those below `threshold`, or with mode "most_negative" the lowest one of each caption, of equal ones the first.

    >>> import torch
    >>> misaligned_words(torch.tensor([[2.1e-4, -4.4e-4, -1e-5]]))
    tensor([[False,  True, False]])

    Parameters: scores float [B, W], NaN for no word, as `word_attribution` gives them. Returns bool [B, W]; a caption without words has none. Raises
    ValueError."""
    scores = check_vectors("misaligned_words", "scores", scores, "[B, W]")
    if mode not in MODES:
        raise ValueError(f'misaligned_words: mode must be "threshold" or "most_negative", got {describe(mode)}')
    if mode == "threshold":
        return scores < threshold
    lowest = torch.where(scores.isnan(), torch.inf, scores)
    place = torch.arange(scores.shape[1], device=scores.device)
    return (place == lowest.argmin(1, keepdim=True)) & ~scores.isnan()


def clip_score(cosine: Tensor) -> Tensor:
    """``2.5 max(cosine, 0)``. [CLIPScore, EMNLP 2021]

    >>> import torch
    >>> clip_score(torch.tensor([0.3, -0.1]))
    tensor([0.7500, 0.0000])
    """
    return 2.5 * cosine.clamp(min=0)


@torch.no_grad()
def f_clipscore(cosine: Tensor, scores: Tensor, *, threshold: float = -5e-5) -> Tensor:
    """``N (1 - max(cosine, 0))``, N the sum of the scores of misaligned words: 0 where every word fits, else below. [CLIP4DM, AAAI 2025]

    >>> import torch
    >>> f_clipscore(torch.tensor([0.25, 0.25]), torch.tensor([[2e-4, -4e-4], [2e-4, 1e-4]]))
    tensor([-0.0003,  0.0000])

    Parameters: cosine float [B], of caption and picture; scores float [B, W] of the words, NaN for no word, as `word_attribution` gives them; threshold, 0 or
    below. Returns [B]. Raises TypeError and ValueError. Another paper gives this name to a CLIPScore averaged over nouns."""
    op = "f_clipscore"
    scores = check_vectors(op, "scores", scores, "[B, W]")
    if not isinstance(cosine, Tensor) or not cosine.is_floating_point() or cosine.shape != scores.shape[:1]:
        raise ValueError(f"{op}: cosine must be a floating-point tensor [B] = [{len(scores)}], got {describe(cosine)}")
    if threshold > 0:
        raise ValueError(f"{op}: threshold must be at most 0, got {threshold}")
    negative = torch.where(misaligned_words(scores, threshold=threshold), scores, 0).sum(1)
    return negative * (1 - cosine.clamp(min=0))
