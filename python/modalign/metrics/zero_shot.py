"""Zero-shot classification: the class whose text lies nearest to the sample's modalities, by cosine or by volume. [CLIP, ICML 2021; GRAM, ICLR 2025]"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops._arguments import check_alike, check_presence, check_sequence, check_vectors, describe
from ..ops._volume_panels import check_workspace
from ._joint_scores import check_groups, check_score, check_something_present, directions, query_panels, similarity
from .retrieval import first_hits, recall_at_k

__all__ = ["ZeroShot", "zero_shot"]


@dataclass(frozen=True)
class ZeroShot:
    """Shares of samples whose class is the first, or among the first five; `per_class`: the share of the first for each class, None for one without
    samples."""

    top1: float
    top5: float
    per_class: tuple[float | None, ...]

    @property
    def mean_per_class(self) -> float:
        """Mean over the classes that have samples: small classes count as much as large ones."""
        found = [share for share in self.per_class if share is not None]
        return sum(found) / len(found)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def zero_shot(
    queries: Tensor | Sequence[Tensor],
    prototypes: Tensor,
    labels: Tensor,
    *,
    score: str = "cosine_sum",
    present: Tensor | None = None,
    workspace_bytes: int | None = None,
) -> ZeroShot:
    """Classify samples by the text vectors of the classes; all vectors are made unit length. Equal scores go to the lower class.

    >>> import torch
    >>> zero_shot(torch.eye(4)[[0, 1, 1]], torch.eye(4)[:3], torch.tensor([0, 1, 2]))
    ZeroShot(top1=0.666..., top5=1.0, per_class=(1.0, 1.0, 0.0))

    Parameters
    ----------
    queries : Tensor [N, D], or a sequence of m >= 1 of them
        The modalities of the samples.
    prototypes : Tensor [K, D] or [K, P, D]
        One text vector per class, or those of P prompts: then the class has the unit mean of the unit vectors.
    labels : int64 Tensor [N]
        0 to K - 1.
    score : "volume", "volume_root", "cosine_sum" or "max"
        As in `joint_retrieval`, with the class's text as the anchor. "cosine_sum" of one modality is its cosine; "volume" takes all modalities together.
    present : bool Tensor [N, m], optional
        Which modalities a sample has, at least one.
    workspace_bytes : int, optional
        What a panel of samples may take, default 64 MiB; at least one sample with all classes.

    Returns
    -------
    ZeroShot(top1, top5, per_class): with five classes or fewer top5 is 1.

    Raises
    ------
    TypeError, ValueError
        ``zero_shot: <argument> must ..., got ...``; also where a score is NaN and where a label is out of range.

    Papers: Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021, section 3.1.4 (prompts); Cicchetti et al.,
    ICLR 2025, for the volume.
    """
    metric = "zero_shot"
    prototypes = check_vectors(metric, "prototypes", prototypes, "[K, D]")
    if prototypes.dim() not in (2, 3) or 0 in prototypes.shape:
        raise ValueError(f"{metric}: prototypes must have shape [K, D] or [K, P, D] with at least one class and prompt, got {describe(prototypes)}")
    classes = directions(prototypes) if prototypes.dim() == 2 else directions(directions(prototypes).mean(1))
    vectors, present = _check_queries(metric, queries, present, prototypes)
    N, K = len(vectors[0]), len(classes)
    labels = check_groups(metric, "labels", labels, N, classes)
    score = check_score(metric, score)
    workspace = check_workspace(metric, workspace_bytes)
    if N == 0:
        raise ValueError(f"{metric}: queries must hold at least one sample, got none")
    if bool(((labels < 0) | (labels >= K)).any()):
        raise ValueError(f"{metric}: labels must be from 0 to K - 1 = {K - 1}, got {int(labels.min())} to {int(labels.max())}")
    names, ranks = torch.arange(K, device=classes.device), []
    with torch.autocast(classes.device.type, enabled=False):
        for rows in query_panels(N, K, len(vectors), classes, workspace):
            samples = [directions(vector[rows]) for vector in vectors]
            scores = similarity(metric, classes, samples, None if present is None else present[rows], score).mT
            ranks.append(first_hits(metric, scores.argsort(dim=1, descending=True, stable=True), labels[rows], names))
    rank = torch.cat(ranks)
    right, samples_of = labels[rank == 0].bincount(minlength=K).tolist(), labels.bincount(minlength=K).tolist()
    per_class = tuple(hits / count if count else None for hits, count in zip(right, samples_of, strict=True))
    return ZeroShot(recall_at_k(rank, 1), recall_at_k(rank, 5), per_class)


def _check_queries(metric: str, queries: object, present: object, prototypes: Tensor) -> tuple[list[Tensor], Tensor | None]:
    vectors = check_sequence(metric, "queries", [queries] if isinstance(queries, Tensor) else queries, "queries[{}]", "[N, D]")
    for index, vector in enumerate(vectors):
        check_alike(metric, f"queries[{index}]", vector, "prototypes", prototypes)
        if vector.dim() != 2 or len(vector) != len(vectors[0]):
            raise ValueError(f"{metric}: queries[{index}] must have shape [N, D], as many samples as the others, got {describe(vector)}")
    mask = check_presence(metric, present, "queries", vectors[0], "[N, m]", (len(vectors[0]), len(vectors)))
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"{metric}: present must have shape [N, m], got {describe(mask)}")
    check_something_present(metric, mask)
    return vectors, mask
