"""Cross entropy behind a linear layer, whose logits are never stored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import clip_loss


def linear_cross_entropy(rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Mean cross entropy of the logits ``rows @ weight.T + bias`` over the rows whose target is not -100: a contrastive loss of one direction in which the
    classes are the candidates. The bias rides along as one more column."""
    if bias is not None:
        rows, weight = F.pad(rows, (0, 1), value=1), torch.cat([weight, bias[:, None]], 1)
    return clip_loss(rows, weight, logit_scale=1.0, target=target, direction="rows")
