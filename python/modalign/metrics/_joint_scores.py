"""Similarity of single vectors with tuples of vectors: what `joint_retrieval` and `zero_shot` rank by."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops import gram_volume
from ..ops._arguments import describe
from ..ops._gram_schmidt import unit
from ..ops._registration import accumulation_dtype
from ..ops._volume_panels import panels

SCORES = ("volume", "volume_root", "cosine_sum", "max")


def check_score(metric: str, score: object) -> str:
    if score not in SCORES:
        raise ValueError(f"{metric}: score must be one of {', '.join(SCORES)}, got {describe(score)}")
    return score  # type: ignore[return-value]


def check_groups(metric: str, name: str, value: object, size: int, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype is not torch.int64:
        raise TypeError(f"{metric}: {name} must be an int64 tensor [{size}], got {describe(value)}")
    if tuple(value.shape) != (size,) or value.device != like.device:
        raise ValueError(f"{metric}: {name} must have shape [{size}] on {like.device}, got {describe(value)}")
    return value


def check_something_present(metric: str, present: Tensor | None) -> None:
    """Without any modality a tuple is neither near nor far, and its place would be a matter of rounding."""
    if present is not None and not bool(present.any(1).all()):
        raise ValueError(f"{metric}: present must leave every tuple at least one modality, got {int((~present.any(1)).sum())} tuples without")


def directions(vectors: Tensor) -> Tensor:
    """Unit rows in the accumulation dtype."""
    return unit(vectors.to(accumulation_dtype(vectors.dtype)))


def query_panels(queries: int, candidates: int, modalities: int, like: Tensor, workspace_bytes: int) -> Iterator[slice]:
    """Some queries with all candidates: a score per modality, and a sorted list of candidates with what it takes to look up their groups."""
    yield from panels(queries, max(1, workspace_bytes // (((modalities + 3) * like.dtype.itemsize + 32) * max(candidates, 1))))


def similarity(metric: str, anchor: Tensor, others: list[Tensor], present: Tensor | None, score: str) -> Tensor:
    """[B, C], larger is better, of unit rows anchor [B, D] with tuples others [C, D]. What an absent vector holds does not matter."""
    if score in ("volume", "volume_root"):
        found = -gram_volume(anchor, others, present=present, normalize="root" if score == "volume_root" else False)
    else:
        absent = 0.0 if score == "cosine_sum" else -torch.inf
        cosines = [anchor @ other.mT for other in others]
        if present is not None:
            cosines = [torch.where(present[:, p], cosine, absent) for p, cosine in enumerate(cosines)]
        found = torch.stack(cosines).sum(0) if score == "cosine_sum" else torch.stack(cosines).amax(0)
    if bool(found.isnan().any()):
        raise ValueError(f"{metric}: vectors that are present must not hold NaN or infinities, got {int(found.isnan().sum())} scores that are NaN")
    return found
