"""One classifier of identities for both modalities. [IRRA, CVPR 2023]"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _features as inputs
from ._linear_cross_entropy import linear_cross_entropy

__all__ = ["id_loss"]


def id_loss(x: Tensor, y: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Mean of the cross entropies of x and of y under one linear classifier: ``(CE(x @ weight.T + bias, ids) + CE(y @ weight.T + bias, ids)) / 2``.

    >>> import torch
    >>> id_loss(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), torch.eye(5, 2))
    tensor(0.9048)

    Parameters: x, y float [B, D], taken as they are; ids int64 [B], the class of row i of both, -100: the row takes no part; weight float [K, D] and bias
    float [K] of the classifier, see `nn.IdentityClassifier`.

    Returns float32 (float64 for float64); 0 where no row takes part. Differentiable once in x, y, weight and bias. The logits are not stored: memory is linear
    in B + K.

    Raises TypeError and ValueError, ``id_loss: <argument> must ..., got ...``; RuntimeError for an identity out of range, on the CPU only.

    Paper: Zheng et al., "Dual-path convolutional image-text embeddings with instance loss", TOMM 2020; in Jiang and Ye, CVPR 2023, section 3.4."""
    op = "id_loss"
    x, y, weight, bias = inputs.check_features(op, x=(x, "[B, D]"), y=(y, "[B, D]"), weight=(weight, "[K, D]"), bias=(bias, "[K]"))
    ids = inputs.check_whole(op, "ids", ids, torch.int64, "[B]", (x.shape[0],), x)
    return linear_cross_entropy(torch.cat([x, y]), weight, bias, torch.cat([ids, ids]))
