"""Pairs together, others apart, and what is far apart already left alone. [CAPIMAC, IJCAI 2025]"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...ops._arguments import describe

__all__ = ["noise_robust_pair_loss"]


def noise_robust_pair_loss(x: Tensor, y: Tensor, positive: Tensor, *, margin: float = 5.0, share: float = 0.5, distance: str = "cosine") -> Tensor:
    r"""A contrastive loss whose push on a negative pair fades where the pair is near, so that a true pair among the negatives does little harm.

    ::

        mean over pairs of [ y D^2 + (1 - y) / margin  D max(share margin - D, 0)^2 ] / 2

    >>> import torch
    >>> x, y = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> noise_robust_pair_loss(x, y, torch.tensor([True, False]), distance="euclidean").item()
    0.08...

    Parameters
    ----------
    x, y : Tensor [P, D]
        The two sides of P pairs.
    positive : Tensor bool [P]
    margin, share : float
        A negative pair is pushed up to the distance share * margin; published 5 and 0.5.
    distance : "cosine" or "euclidean"
        D = 1 - cos as the paper has it, which never reaches 2.5; the released code takes the length of the difference.

    Returns
    -------
    Tensor scalar. Gradient: to x and y, finite, 0 for a pair at distance 0.

    Raises
    ------
    TypeError, ValueError
        ``noise_robust_pair_loss: <argument> must ..., got ...``.
    """
    op = "noise_robust_pair_loss"
    for name, each in (("x", x), ("y", y)):
        if not isinstance(each, Tensor) or each.dim() != 2 or not each.is_floating_point() or each.shape != x.shape or len(each) == 0:
            raise ValueError(f"{op}: {name} must be a floating-point matrix [P, D] like the other, P 1 or more, got {describe(each)}")
    if not isinstance(positive, Tensor) or positive.dtype is not torch.bool or positive.shape != (len(x),):
        raise ValueError(f"{op}: positive must be a bool tensor [{len(x)}], got {describe(positive)}")
    if not all(isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < math.inf for number in (margin, share)):
        raise ValueError(f"{op}: margin and share must be positive, got {margin!r} and {share!r}")
    if distance not in ("cosine", "euclidean"):
        raise ValueError(f'{op}: distance must be "cosine" or "euclidean", got {describe(distance)}')
    if distance == "cosine":
        apart = 1 - torch.nn.functional.cosine_similarity(x, y, dim=1)
    else:
        square = (x - y).square().sum(1)
        apart = torch.where(square == 0, 0, square.where(square != 0, 1).sqrt())  # the root has no slope at 0; NaN stays NaN
    push = apart * torch.relu(share * margin - apart).square() / margin
    return torch.where(positive, apart.square(), push).mean() / 2
