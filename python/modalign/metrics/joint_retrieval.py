"""Retrieval between single vectors and tuples of several modalities, both ways. [GRAM, ICLR 2025]"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops._arguments import describe
from ..ops._volume_panels import check_tuples, check_workspace
from ._joint_scores import check_groups, check_score, check_something_present, directions, query_panels, similarity
from .retrieval import Retrieval, figures_of, first_hits

__all__ = ["JointRetrieval", "joint_retrieval"]

Rerank = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class JointRetrieval:
    """`to_tuples`: each anchor among all tuples; `to_anchors`: each tuple among all anchors. `gramian_value`: mean over the anchors of the smallest
    volume (of its root for "volume_root"), which falls as alignment improves; None for scores of cosines."""

    to_tuples: Retrieval
    to_anchors: Retrieval
    gramian_value: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def joint_retrieval(
    anchor: Tensor,
    others: Sequence[Tensor],
    *,
    score: str = "volume",
    groups: Tensor | None = None,
    candidate_groups: Tensor | None = None,
    present: Tensor | None = None,
    rerank: Rerank | None = None,
    rerank_top: int = 50,
    workspace_bytes: int | None = None,
) -> JointRetrieval:
    """R@1, R@5, R@10 and median rank of anchors among tuples and of tuples among anchors; all vectors are made unit length.

    Scores are made for a panel of queries at a time. Equal ones are listed by index, as in `hit_ranks`.

    >>> import torch
    >>> text, video, audio = torch.eye(4), torch.eye(4), torch.eye(4).roll(1, 0)
    >>> joint_retrieval(text, [video, audio]).to_tuples
    Retrieval(r1=0.75, r5=1.0, r10=1.0, median=1.0)

    Parameters
    ----------
    anchor : Tensor [B, D]
    others : sequence of m >= 1 Tensor [C, D]
        Row j of all of them is tuple j.
    score : "volume", "volume_root", "cosine_sum" or "max"
        ``-V[i, j]``; ``-V ** (1 / n_j)``, n_j the number of vectors with the anchor, which lets tuples with and without gaps be compared; the sum of the
        anchor's cosines with the others; the largest of them.
    groups, candidate_groups : int64 Tensors [B] and [C], optional
        A tuple is right for an anchor, and the anchor for the tuple, when their groups are equal. Without them row i belongs to tuple i and B must equal
        C. `candidate_groups` defaults to `groups`.
    present : bool Tensor [C, m], optional
        Which modalities a tuple has, at least one. An absent one counts as cosine 0 in the sum and is left out of the largest and of the volume.
    rerank : callable, optional
        ``rerank(anchors, tuples)``: two int64 tensors [b, n] of indices, n = min(rerank_top, candidates); gives floating-point scores [b, n] of these
        pairs, larger is better, such as the probability of a match. The first n stay the first n of the list, in the order of these scores. Called for
        both directions.
    rerank_top : int
    workspace_bytes : int, optional
        What a panel may take, default 64 MiB; at least one query with all candidates.

    Returns
    -------
    JointRetrieval(to_tuples, to_anchors, gramian_value)

    Raises
    ------
    TypeError, ValueError
        ``joint_retrieval: <argument> must ..., got ...``; also where a score is NaN, and where a query has no right answer.

    Paper: Cicchetti et al., "Gramian Multimodal Representation Learning and Alignment", ICLR 2025, section 4; the released code re-ranks the first 50.
    """
    metric = "joint_retrieval"
    anchor, vectors, present = check_tuples(metric, anchor, others, present)
    B, C = len(anchor), len(vectors[0])
    check_something_present(metric, present)
    score = check_score(metric, score)
    workspace = check_workspace(metric, workspace_bytes)
    if isinstance(rerank_top, bool) or not isinstance(rerank_top, int) or rerank_top < 1:
        raise ValueError(f"{metric}: rerank_top must be a whole number of at least 1, got {describe(rerank_top)}")
    if B == 0 or C == 0:
        raise ValueError(f"{metric}: anchor and others must hold at least one row, got {B} and {C}")
    if groups is None:
        if candidate_groups is not None:
            raise ValueError(f"{metric}: groups must be given with candidate_groups, got None")
        if B != C:
            raise ValueError(f"{metric}: groups must be given where there are not as many tuples as anchors, got {B} anchors and {C} tuples")
        groups = torch.arange(B, device=anchor.device)
    groups = check_groups(metric, "groups", groups, B, anchor)
    candidate_groups = check_groups(metric, "candidate_groups", groups if candidate_groups is None else candidate_groups, C, anchor)
    with torch.autocast(anchor.device.type, enabled=False):
        anchor, vectors = directions(anchor), [directions(vector) for vector in vectors]
        to_tuples, to_anchors, smallest = [], [], []
        for rows in query_panels(B, C, len(vectors), anchor, workspace):
            scores = similarity(metric, anchor[rows], vectors, present, score)
            smallest.append(-scores.amax(1))
            order = _listed(scores, rows, rerank, rerank_top)
            to_tuples.append(first_hits(metric, order, groups[rows], candidate_groups))
        swapped = None if rerank is None else lambda tuples, anchors: rerank(anchors, tuples)
        for rows in query_panels(C, B, len(vectors), anchor, workspace):
            tuples = [vector[rows] for vector in vectors]
            scores = similarity(metric, anchor, tuples, None if present is None else present[rows], score).mT
            to_anchors.append(first_hits(metric, _listed(scores, rows, swapped, rerank_top), candidate_groups[rows], groups))
    gramian_value = float(torch.cat(smallest).double().mean()) if score in ("volume", "volume_root") else None
    return JointRetrieval(figures_of(torch.cat(to_tuples)), figures_of(torch.cat(to_anchors)), gramian_value)


def _listed(scores: Tensor, rows: slice, rerank: Rerank | None, top: int) -> Tensor:
    """Indices of the candidates of each row in order, the first `top` of them in the order that `rerank(queries, candidates)` gives."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    if rerank is None:
        return order
    first = order[:, :top].sort(1).values  # so that equal scores go by index
    queries = torch.arange(rows.start, rows.stop, device=scores.device)[:, None].expand_as(first)
    again = rerank(queries, first)
    if not isinstance(again, Tensor) or not again.is_floating_point() or again.shape != first.shape:
        raise ValueError(f"joint_retrieval: rerank must give floating-point scores {list(first.shape)}, got {describe(again)}")
    if bool(again.isnan().any()):
        raise ValueError(f"joint_retrieval: rerank must give scores that are not NaN, got {int(again.isnan().sum())} NaN of {again.numel()}")
    return torch.cat([first.gather(1, again.argsort(dim=1, descending=True, stable=True)), order[:, top:]], 1)
