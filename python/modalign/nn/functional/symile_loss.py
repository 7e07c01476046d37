"""Symile: a contrastive loss on the multilinear inner product of any number of modalities. [NeurIPS 2024]"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...ops import _arguments as arguments
from ...ops import _contrastive as contrastive
from ...ops._gram_schmidt import unit
from . import _features as inputs

__all__ = ["symile_loss", "symile_similarity"]

MOST_TUPLES = 1 << 31


def symile_loss(
    modalities: Sequence[Tensor],
    *,
    logit_scale: float | Tensor,
    negative_sampling: str = "n",
    generator: torch.Generator | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross entropy of each modality as anchor against tuples of the others, logits ``logit_scale * sum_d x[d] y[d] z[d] ...``, averaged over the anchors.

    "n": each other modality is shuffled on its own, and row i sees its true tuple and the shuffled tuples j != i. "n_squared": row i sees all combinations of
    rows of the others, B^(k-1) of them.

    >>> import torch
    >>> symile_loss([torch.eye(3)] * 3, logit_scale=2.0, negative_sampling="n_squared")
    tensor(0.7337)

    Parameters
    ----------
    modalities : sequence of k Tensors [B, D], k of 2 or more
    logit_scale : float or Tensor of one element
        Positive, already exponentiated; a tensor gets a gradient.
    negative_sampling : str
        "n" or "n_squared". With two modalities both are InfoNCE: the order of one list does not matter, so "n" leaves it.
    generator : torch.Generator, optional
        For the shuffles, on its own device or that of the modalities. "n_squared" draws nothing.
    normalize : bool
        Make all vectors unit length first.
    reduction : str
        "mean", "sum" or "none": [B], the mean over the anchors.

    Returns
    -------
    Tensor, float32 (float64 for float64)

    Gradient
    --------
    In all modalities and logit_scale, by autograd.

    Edges
    -----
    B = 1: 0. B = 0: 0. A NaN makes the loss NaN.

    Raises
    ------
    TypeError, ValueError
        ``symile_loss: <argument> must ..., got ...``; also for more than 2^31 combinations.

    Complexity
    ----------
    2 k B^2 D FLOP for "n", 2 k B^k D for "n_squared"; logits are made in panels and, if there are several, again in the backward: memory is linear in B.

    Paper: Saporta et al., "Contrasting with Symile: simple model-agnostic representation learning for unlimited modalities", NeurIPS 2024, section 3.
    """
    op = "symile_loss"
    vectors = inputs.check_list(op, "modalities", modalities)
    if len(vectors) < 2:
        raise ValueError(f"{op}: modalities must be two or more, got {len(vectors)}")
    (B, _), m = vectors[0].shape, len(vectors) - 1
    scale = inputs.check_scale(op, "logit_scale", logit_scale, vectors[0])
    if negative_sampling not in ("n", "n_squared"):
        raise ValueError(f'{op}: negative_sampling must be "n" or "n_squared", got {arguments.describe(negative_sampling)}')
    if negative_sampling == "n_squared" and B**m > MOST_TUPLES:
        raise ValueError(f'{op}: negative_sampling must be "n" for more than {MOST_TUPLES} combinations, got {B}^{m} = {B**m}')
    normalize, reduction = arguments.check_flag(op, "normalize", normalize), contrastive.check_reduction(op, reduction)
    with torch.autocast(vectors[0].device.type, enabled=False):
        if normalize:
            vectors = [unit(vector) for vector in vectors]
        anchors = [(vectors[p], vectors[:p] + vectors[p + 1 :]) for p in range(m + 1)]
        losses = [_all_tuples(x, others, scale) if negative_sampling == "n_squared" else _shuffled_tuples(x, others, scale, generator) for x, others in anchors]
        return inputs.mean_of(torch.stack(losses).mean(0), reduction)


def symile_similarity(candidates: Tensor, queries: Sequence[Tensor]) -> Tensor:
    """Multilinear inner products ``sum_d candidates[c, d] prod_p queries[p][b, d]`` of each query tuple with every candidate of the missing modality: [B, C].

    >>> import torch
    >>> symile_similarity(torch.eye(2), [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])])
    tensor([[3., 8.]])

    Parameters: candidates [C, D]; queries, a sequence of [B, D], none of them changed. Returns [B, C] in float32 (float64), differentiable.
    Raises TypeError and ValueError, ``symile_similarity: <argument> must ..., got ...``."""
    op = "symile_similarity"
    given = arguments.check_sequence(op, "queries", queries, "queries[{}]", "[B, D]")
    candidates, *vectors = inputs.check_features(op, candidates=(candidates, "[C, D]"), **{f"queries[{p}]": (query, "[B, D]") for p, query in enumerate(given)})
    with torch.autocast(candidates.device.type, enabled=False):
        return math.prod(vectors) @ candidates.mT


def _shuffled_tuples(x: Tensor, others: list[Tensor], scale: Tensor, generator: torch.Generator | None) -> Tensor:
    B = len(x)

    def shuffled(vectors: Tensor) -> Tensor:
        return vectors[torch.randperm(B, generator=generator, device=x.device if generator is None else generator.device).to(x.device)]

    true, tuples = math.prod(others), others[0] if len(others) == 1 else math.prod(map(shuffled, others))
    index = torch.arange(B, device=x.device)

    def entropy(rows: Tensor, true_of_rows: Tensor, index_of_rows: Tensor) -> Tensor:
        label = scale * (rows * true_of_rows).sum(1, keepdim=True)
        return torch.where(index_of_rows[:, None] == index, label, scale * rows @ tuples.mT).logsumexp(1) - label.squeeze(1)

    return inputs.by_panels(entropy, B, x, true, index)


def _all_tuples(x: Tensor, others: list[Tensor], scale: Tensor) -> Tensor:
    (B, D), count = x.shape, len(x) ** len(others)
    size = max(1, inputs.PANEL // max(1, B, D))

    def log_sum(start: int) -> Tensor:
        tuples, rest = 1, torch.arange(start, min(start + size, count), device=x.device)
        for vectors in others:
            tuples, rest = tuples * vectors[rest % B], rest // B
        return (scale * x @ tuples.mT).logsumexp(1)

    if count == 0:
        return x.sum(1)
    panels = [checkpoint(log_sum, start, use_reentrant=False, preserve_rng_state=False) if count > size else log_sum(start) for start in range(0, count, size)]
    return torch.stack(panels).logsumexp(0) - scale * (x * math.prod(others)).sum(1)
