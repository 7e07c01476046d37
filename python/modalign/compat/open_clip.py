"""The losses of open_clip with their constructor and call order. Replace their import by this one; nothing else changes.

>>> import torch
>>> from modalign.compat.open_clip import ClipLoss
>>> ClipLoss()(torch.eye(3), torch.eye(3), torch.tensor(1.0))
tensor(0.5514)

The matrix of logits is never stored. Several processes: values and gradients are those of the original for each of its options. With `local_loss` the
loss is that of the rank's own rows, without it that of all. With `gather_with_grad` averaged gradients are exact; without either option features get the
gradient divided by the number of ranks, and with `local_loss` alone only the gradient of their own direction, as they do there.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..ops import clip_loss, siglip_loss

__all__ = ["ClipLoss", "SigLipLoss"]


def _result(loss: Tensor, output_dict: bool) -> Any:
    return {"contrastive_loss": loss} if output_dict else loss


def _with_gradient_over(divisor: int, features: Tensor) -> Tensor:
    return features.detach() + (features - features.detach()) / divisor


class ClipLoss(nn.Module):
    """`forward(image_features, text_features, logit_scale, logit_bias=None, output_dict=False)`."""

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,  # there are no labels to keep
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("ClipLoss: use_horovod must be False (torch.distributed is used), got True")
        self.local_loss, self.gather_with_grad, self.rank, self.world_size = local_loss, gather_with_grad, rank, world_size

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None, output_dict: bool = False) -> Any:
        options = {"logit_scale": logit_scale, "logit_bias": logit_bias}
        if self.world_size == 1:
            return _result(clip_loss(image_features, text_features, **options), output_dict)
        local = self.local_loss and not self.gather_with_grad
        if not (self.local_loss or self.gather_with_grad):
            image_features, text_features = (_with_gradient_over(self.world_size, features) for features in (image_features, text_features))
        loss = clip_loss(image_features, text_features, **options, process_group=dist.group.WORLD, gather_grad="local" if local else "full")
        if self.local_loss:
            return _result(loss, output_dict)
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return _result(mean / self.world_size + (loss - loss.detach()), output_dict)


class SigLipLoss(nn.Module):
    """`forward(image_features, text_features, logit_scale, logit_bias, output_dict=False)`; `dist_impl` chooses among ways to send the same numbers,
    "gather" the one that holds all texts, every other the ring."""

    def __init__(self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None) -> None:
        super().__init__()
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f'SigLipLoss: dist_impl must be "bidir", "shift", "reduce" or "gather", got {dist_impl!r}')
        self.rank, self.world_size, self.dist_impl = rank, world_size, dist_impl or "bidir"

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor, output_dict: bool = False) -> Any:
        options = {"logit_scale": logit_scale, "logit_bias": logit_bias}
        if self.world_size > 1:
            options |= {"process_group": dist.group.WORLD, "exchange": "gather" if self.dist_impl == "gather" else "ring"}
        return _result(siglip_loss(image_features, text_features, **options), output_dict)
