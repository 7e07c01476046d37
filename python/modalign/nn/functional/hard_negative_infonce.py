"""InfoNCE in which every query has hard negatives of its own. [mmE5, 2025]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops import _arguments as arguments
from ...ops import _contrastive as contrastive
from ...ops import clip_loss
from ...ops._gram_schmidt import unit
from . import _features as inputs

__all__ = ["hard_negative_infonce"]


def hard_negative_infonce(
    queries: Tensor,
    targets: Tensor,
    negatives: Tensor,
    *,
    temperature: float | Tensor = 0.02,
    present: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    process_group: Any = None,
    gather_grad: str = "full",
) -> Tensor:
    r"""Cross entropy of each query over all targets of the batch and its own hard negatives, which no other query sees.

    ::

        loss_i = log(sum_j exp(q_i . t_j / temperature) + sum_h exp(q_i . n_ih / temperature)) - q_i . t_i / temperature

    >>> import torch
    >>> hard_negative_infonce(torch.eye(2), torch.eye(2), torch.eye(2)[:, None], temperature=1.0)        # as near as the target
    tensor(0.8620)

    Parameters
    ----------
    queries, targets : Tensor [B, D]
        Row i of targets answers query i.
    negatives : Tensor [B, H, D]
        H = 0: InfoNCE in one direction.
    temperature : float or Tensor of one element
        Positive; a tensor gets a gradient.
    present : Tensor bool [B, H], optional
        False: query i has no such negative, what stands there is never read.
    normalize : bool
        Make all vectors unit length, as published.
    reduction : str
        "mean", "sum" or "none": [B].
    process_group, gather_grad
        Targets of all processes, see `ops.gram_contrastive_loss`; hard negatives stay at home. The released code is gather_grad="local".

    Returns
    -------
    Tensor, float32 (float64 for float64)

    Gradient
    --------
    In queries, targets, negatives and temperature, once. The matrix of queries and targets is not stored.

    Edges
    -----
    B = 1: the query and its hard negatives. B = 0: 0. A NaN that takes part makes the loss NaN.

    Raises
    ------
    TypeError, ValueError
        ``hard_negative_infonce: <argument> must ..., got ...``

    Paper: Chen et al., "mmE5: improving multimodal multilingual embeddings via high-quality synthetic data", ACL Findings 2025.
    """
    op = "hard_negative_infonce"
    queries, targets, negatives = inputs.check_features(op, queries=(queries, "[B, D]"), targets=(targets, "[B, D]"), negatives=(negatives, "[B, H, D]"))
    temperature = inputs.check_scale(op, "temperature", temperature, queries)
    if present is None:
        present = torch.ones(negatives.shape[:2], dtype=torch.bool, device=negatives.device)
    present = inputs.check_whole(op, "present", present, torch.bool, "[B, H]", tuple(negatives.shape[:2]), queries)
    normalize, reduction = arguments.check_flag(op, "normalize", normalize), contrastive.check_reduction(op, reduction)
    contrastive.check_group(op, process_group, gather_grad, "gather")
    with torch.autocast(queries.device.type, enabled=False):
        negatives = torch.where(present[..., None], negatives, 0)
        if normalize:
            queries, targets, negatives = unit(queries), unit(targets), unit(negatives)
        in_batch = clip_loss(
            queries, targets, logit_scale=1 / temperature, direction="rows", reduction="none", process_group=process_group, gather_grad=gather_grad
        )
        apart = torch.einsum("bd,bhd->bh", queries, negatives) - (queries * targets).sum(1, keepdim=True)
        own = torch.where(present, apart / temperature, -torch.inf)
        return inputs.mean_of(torch.logaddexp(in_batch, own.logsumexp(1)), reduction)  # log1p inside: nearly solved rows keep their digits
