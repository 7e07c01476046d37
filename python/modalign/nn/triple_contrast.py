"""TCL's triple contrastive loss with its queues and its temperature. [CVPR 2022]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import _contrastive as contrastive
from ..ops._distributed import all_gather, gather_sizes
from ..ops._gram_schmidt import unit
from .feature_queue import FeatureQueue
from .functional import tcl_loss
from .functional.tcl_loss import TclLoss

__all__ = ["TripleContrast"]


class TripleContrast(nn.Module):
    """`functional.tcl_loss` with a queue of keys for each modality and a learnable temperature within `limits`, with the published settings.

    >>> import torch
    >>> loss, eye = TripleContrast(width=4, queue_size=16), torch.eye(4)
    >>> loss(eye, eye, eye, eye, eye[:, None], eye[:, None], alpha=0.0).total.requires_grad
    True

    The call takes the tensors of `functional.tcl_loss`, alpha and text_mask, and gives its `TclLoss`; while training, the keys go into the queues
    afterwards. The momentum encoders (published: 0.995 of the old weights) are the caller's.

    Parameters: width D; queue_size K; temperature (initial) and limits, kept while training; process_group: keys of all its processes go into the queues.
    Raises ValueError, ``TripleContrast: <argument> must ..., got ...``."""

    def __init__(
        self, width: int = 256, queue_size: int = 65536, *, temperature: float = 0.07, limits: tuple[float, float] = (0.001, 0.5), process_group: Any = None
    ) -> None:
        super().__init__()
        low, high = limits
        if not 0 < low <= temperature <= high:
            raise ValueError(f"TripleContrast: temperature must be positive and within limits {limits}, got {temperature}")
        contrastive.check_group("TripleContrast", process_group, "full", "gather")
        self.temperature, self.limits, self.process_group = nn.Parameter(torch.tensor(float(temperature))), limits, process_group
        self.image_queue, self.text_queue = FeatureQueue(queue_size, width), FeatureQueue(queue_size, width)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        image_keys: Tensor,
        text_keys: Tensor,
        image_locals: Tensor,
        text_locals: Tensor,
        *,
        alpha: float = 0.4,
        text_mask: Tensor | None = None,
    ) -> TclLoss:
        if self.training:
            with torch.no_grad():
                self.temperature.clamp_(*self.limits)
        queues = {"image_queue": self.image_queue.features, "text_queue": self.text_queue.features}
        loss = tcl_loss(image, text, image_keys, text_keys, image_locals, text_locals, temperature=self.temperature, alpha=alpha, text_mask=text_mask, **queues)
        if self.training:
            self._push(self.image_queue, image_keys)
            self._push(self.text_queue, text_keys)
        return loss

    @torch.no_grad()
    def _push(self, queue: FeatureQueue, keys: Tensor) -> None:
        keys = unit(keys.to(queue.features.dtype))
        queue.push(keys if self.process_group is None else all_gather(keys, gather_sizes(len(keys), keys, self.process_group), self.process_group))
