"""Two embeddings of an item from one pass, each with its own InfoNCE. [NoteLLM-2, 2024]"""

from __future__ import annotations

import math

from torch import Tensor

from ...ops import _arguments as arguments
from ...ops import clip_loss
from . import _features as inputs

__all__ = ["notellm2_objective"]


def notellm2_objective(
    multimodal: tuple[Tensor, Tensor],
    visual: tuple[Tensor, Tensor],
    *,
    logit_scale: float | Tensor,
    alpha: float,
    direction: str = "both",
    normalize: bool = True,
) -> Tensor:
    """``(L_m + alpha L_v) / (1 + alpha)``, each an `ops.clip_loss` of items with their related items.

    >>> import torch
    >>> item, related = torch.eye(3), torch.eye(3)
    >>> notellm2_objective((item, related), (item, related), logit_scale=1.0, alpha=0.5)
    tensor(0.5514)

    Parameters: multimodal and visual, each two tensors [B, D], row i of the second is related to row i of the first; logit_scale positive,
    already exponentiated, a tensor gets a gradient; alpha 0 or more, 0: the multimodal loss alone; direction "both" or "rows"; normalize, make all vectors unit length first.
    `nn.LateFusionGate` makes the multimodal embedding. Returns float32 (float64), differentiable once.

    Raises TypeError and ValueError, ``notellm2_objective: <argument> must ..., got ...``.

    Paper: Zhang et al., "NoteLLM-2: multimodal large representation models for recommendation", 2024. Put together from its abstract."""
    op = "notellm2_objective"
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < math.inf:
        raise ValueError(f"{op}: alpha must be a finite number of 0 or more, got {arguments.describe(alpha)}")
    for name, pair in (("multimodal", multimodal), ("visual", visual)):
        if len(arguments.check_sequence(op, name, pair, name + "[{}]", "[B, D]")) != 2:
            raise ValueError(f"{op}: {name} must be two tensors [B, D], got {len(pair)}")
        inputs.check_features(op, **{f"{name}[{side}]": (tensor, "[B, D]") for side, tensor in enumerate(pair)})
    of_both, of_visual = (clip_loss(*pair, logit_scale=logit_scale, direction=direction, normalize=normalize) for pair in (multimodal, visual))
    return (of_both + alpha * of_visual) / (1 + alpha)
