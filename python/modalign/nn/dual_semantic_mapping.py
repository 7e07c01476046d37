"""A projector and its way back, each held to what the other side means. [FUSION, 2025]"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops._arguments import describe
from ..ops._gram_schmidt import unit

__all__ = ["DualSemanticMapping"]


class DualSemanticMapping(nn.Module):
    r"""The loss between a projector P from vision to the language model and one R from text to vision. [FUSION, 2025]

    ::

        loss = weight (mean over patches (1 - cos(E_v, R(P(F_v)))) + mean over question tokens (1 - cos(E_q, P(F_q))))

    E_v are the patch embeddings before the first block of the vision encoder, E_q the question's embeddings of the language model, F_v and F_q what the
    encoder makes of the patches and of the question's tokens (after R) beside them.

    >>> import torch
    >>> loss = DualSemanticMapping(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
    >>> loss(torch.randn(2, 9, 4), torch.randn(2, 9, 6), torch.randn(2, 5, 8), torch.randn(2, 5, 6)).shape
    torch.Size([])

    Parameters: projector, a module [..., F] -> [..., D]; aux_projector, a module [..., D] -> [..., Dv]; weight, published 0.1. Both modules are those of the
    model and are trained by this loss as well.

    The call takes patch_embeddings [B, N, Dv], patch_features [B, N, F], question_embeddings [B, L, D], question_features [B, L, F] and
    question_mask bool [B, L], False for padding, which is never read. It gives float32 (float64 for float64). All tensors get a gradient; detach what is to
    stand still. A question without tokens adds nothing; a zero vector has cosine 0. Raises ValueError for shapes."""

    def __init__(self, projector: nn.Module, aux_projector: nn.Module, *, weight: float = 0.1) -> None:
        super().__init__()
        self.projector, self.aux_projector, self.weight = projector, aux_projector, weight

    def forward(
        self,
        patch_embeddings: Tensor,
        patch_features: Tensor,
        question_embeddings: Tensor,
        question_features: Tensor,
        question_mask: Tensor | None = None,
    ) -> Tensor:
        sizes = question_embeddings.shape[:-1]
        if question_mask is not None and (question_mask.dtype is not torch.bool or question_mask.shape != sizes):
            raise ValueError(f"DualSemanticMapping: question_mask must be bool [B, L] = {list(sizes)}, got {describe(question_mask)}")
        if question_features.shape[:-1] != sizes:
            raise ValueError(f"DualSemanticMapping: question_features must be [B, L, F] with [B, L] = {list(sizes)}, got {describe(question_features)}")
        if patch_features.shape[:-1] != patch_embeddings.shape[:-1]:
            raise ValueError(
                f"DualSemanticMapping: patch_features must be [B, N, F] with [B, N] = {list(patch_embeddings.shape[:-1])}, got {describe(patch_features)}"
            )
        if question_mask is not None:
            question_embeddings, question_features = (torch.where(question_mask[..., None], t, 0) for t in (question_embeddings, question_features))
        patches = _distance(patch_embeddings, self.aux_projector(self.projector(patch_features)), None)
        return self.weight * (patches + _distance(question_embeddings, self.projector(question_features), question_mask))


def _distance(target: Tensor, mapped: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of 1 - cos over the tokens that are there, 0 over none."""
    if target.dtype is not torch.float64:
        target, mapped = target.float(), mapped.float()
    distance = 1 - (unit(target) * unit(mapped)).sum(-1)
    if mask is None:
        mask = torch.ones_like(distance, dtype=torch.bool)
    return torch.where(mask, distance, 0).sum() / mask.sum().clamp(min=1)
