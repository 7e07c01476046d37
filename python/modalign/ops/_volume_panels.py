"""What searches by Gramian volume share: the matrix of volumes, a panel of rows and candidates at a time.

A candidate is factored once per panel of rows, and a row costs a selection per panel of candidates, so panels are about as high as wide. A pair has the
same bits in any panel: `gram_volume` sums over D in one order, wherever the pair stands in a tile. (Plain torch, which takes over at 8 others, does not
promise that.)"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _arguments as arguments
from ._registration import accumulation_dtype
from .gram_contrastive_loss import _checked as check_tuples
from .gram_volume import gram_volume

__all__ = ["check_tuples", "check_workspace", "panel_sizes", "panels", "volumes"]

WORKSPACE_BYTES = 64 << 20
LEAST = 64  # rows and candidates of the smallest panel: about one tile


def check_workspace(op: str, workspace_bytes: object) -> int:
    if workspace_bytes is None:
        return WORKSPACE_BYTES
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        raise TypeError(f"{op}: workspace_bytes must be None or a whole number, got {arguments.describe(workspace_bytes)}")
    if workspace_bytes < 0:
        raise ValueError(f"{op}: workspace_bytes must be at least 0, got {workspace_bytes}")
    return workspace_bytes


def panel_sizes(B: int, C: int, k: int, dtype: torch.dtype, workspace_bytes: int) -> tuple[int, int]:
    """Rows and candidates of a panel: k candidates or more, and no more pairs than the workspace holds unless the smallest panel does."""
    pairs = workspace_bytes // (4 * dtype.itemsize)  # a volume, and what it takes to select among them
    wanted = max(k, math.isqrt(pairs), LEAST)
    rows = max(min(B, pairs // max(1, min(C, wanted))), LEAST)
    return rows, max(pairs // max(1, min(B, rows)), k, LEAST)


def panels(size: int, step: int) -> list[slice]:
    """One empty panel where there is nothing, so that an empty result comes out as any other."""
    return [slice(start, min(start + step, size)) for start in range(0, max(size, 1), step)]


def volumes(anchor: Tensor, others: list[Tensor], present: Tensor | None, normalize: bool | str, rows: slice, candidates: slice | Tensor) -> Tensor:
    """`gram_volume` of these rows with these candidates in the accumulation dtype: what is ranked is never rounded to a half type."""
    real = accumulation_dtype(anchor.dtype)
    vectors = [other[candidates].to(real) for other in others]
    return gram_volume(anchor[rows].to(real), vectors, present=None if present is None else present[candidates], normalize=normalize)
