"""How close perceptual and textual tokens lie inside a language model. [Implicit Multimodal Alignment, NeurIPS 2024]"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops._arguments import check_vectors, describe

__all__ = ["IMPLICIT_REDUCTIONS", "implicit_alignment"]

FLOOR = 1e-7  # of lengths, as published


def _median(x: Tensor) -> Tensor:
    """Over what is not NaN; the lower of the middle two, as torch.median."""
    return x.flatten().nanmedian()


OVER_TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda c: c.max(),
    "min": lambda c: c.min(),
    "mean": lambda c: c.mean(),
    "median": _median,
    "max_mean": lambda c: c.max(1).values.mean(),
    "diag_mean": lambda c: c.diagonal().mean(),
    "diag_median": lambda c: _median(c.diagonal()),
    "diag_max": lambda c: c.diagonal().max(),
}
IMPLICIT_REDUCTIONS = ("global", "pairwise", *OVER_TOKENS)


def implicit_alignment(
    perceptual: Tensor, textual: Tensor, reduction: str = "global", *, perceptual_mask: Tensor | None = None, textual_mask: Tensor | None = None
) -> Tensor:
    """The similarity of hidden states of two kinds of tokens at one layer; the mean over layers of such numbers is the implicit alignment score of a model.

    >>> import torch
    >>> states = torch.eye(2)[None]
    >>> implicit_alignment(states, states[:, :1], "max"), implicit_alignment(states, states[:, :1], "mean")
    (tensor(1.), tensor(0.5000))

    Parameters
    ----------
    perceptual : Tensor [B, U, D]
        Hidden states of picture, sound or video tokens of B examples.
    textual : Tensor [B, T, D]
    reduction : str
        "global": cosine of the two means over all examples (of each one's mean token). "pairwise": mean over examples of the cosine of their mean tokens.
        Others: of the matrix of cosines [U, T] of each example, then the mean over examples: "max", "min", "mean", "median", "max_mean" (each perceptual
        token's largest), "diag_mean", "diag_median", "diag_max" (token i with token i).
    perceptual_mask, textual_mask : bool Tensor [B, U], [B, T], optional
        True where there is a token. One or more for every example.

    Returns
    -------
    Tensor scalar from -1 to 1, float32 (float64 for float64). Differentiable. max >= max_mean >= mean >= min.

    Raises
    ------
    TypeError, ValueError
        ``implicit_alignment: <argument> must ..., got ...``.
    """
    op = "implicit_alignment"
    if reduction not in IMPLICIT_REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(IMPLICIT_REDUCTIONS)}, got {reduction!r}")
    sides = []
    for name, states, mask in (("perceptual", perceptual, perceptual_mask), ("textual", textual, textual_mask)):
        x = check_vectors(op, name, states, "[B, T, D]")
        if x.dim() != 3 or 0 in x.shape:
            raise ValueError(f"{op}: {name} must have shape [B, T, D] with one token or more, got {describe(x)}")
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or mask.shape != x.shape[:2]:
            raise ValueError(f"{op}: {name}_mask must be a bool tensor {list(x.shape[:2])}, got {describe(mask)}")
        if not bool(mask.any(1).all()):
            raise ValueError(f"{op}: {name}_mask must leave every example a token, got {int((~mask.any(1)).sum())} without")
        sides.append((x.to(torch.promote_types(x.dtype, torch.float32)), mask))
    (u, there_u), (v, there_v) = sides
    if len(u) != len(v) or u.shape[2] != v.shape[2]:
        raise ValueError(f"{op}: textual must have perceptual's B and D, got {list(v.shape)} beside {list(u.shape)}")

    def unit(x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True).clamp(min=FLOOR)

    if reduction in ("global", "pairwise"):
        means = [torch.where(there[..., None], x, 0).sum(1) / there.sum(1, keepdim=True) for x, there in sides]
        if reduction == "global":
            means = [mean.mean(0, keepdim=True) for mean in means]
        return (unit(means[0]) * unit(means[1])).sum(-1).mean()
    cosines = []
    for x, y, here, there in zip(unit(u), unit(v), there_u, there_v, strict=True):
        cosines.append(OVER_TOKENS[reduction](x[here] @ y[there].mT))
    return torch.stack(cosines).mean()
