"""The contrastive losses as modules with the temperatures of their papers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import clip_loss, cosine_sum_contrastive_loss, gram_contrastive_loss, siglip_loss, triangle_contrastive_loss

__all__ = ["ClipLoss", "CosineSumContrastiveLoss", "GramContrastiveLoss", "SigLipLoss", "TriangleContrastiveLoss"]


class _TemperatureLoss(nn.Module):
    """A loss that divides by a temperature, learnt as it is and kept inside `limits` while training."""

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable: bool = True,
        limits: tuple[float, float] = (0.001, 0.5),
        label_smoothing: float = 0.1,
        normalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        name, (low, high) = type(self).__name__, limits
        if not 0 < low <= high < math.inf:
            raise ValueError(f"{name}: limits must be two positive numbers in order, got {limits}")
        if not low <= temperature <= high:
            raise ValueError(f"{name}: temperature must be within limits {limits}, got {temperature}")
        self.temperature = nn.Parameter(torch.tensor(float(temperature)), requires_grad=learnable)
        self.limits, self.options = (low, high), {"label_smoothing": label_smoothing, "normalize": normalize, **options}

    def _settings(self, options: dict[str, Any]) -> dict[str, Any]:
        if self.training and self.temperature.requires_grad:
            with torch.no_grad():
                self.temperature.clamp_(*self.limits)
        return {"temperature": self.temperature, **self.options, **options}

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.options.items())


class GramContrastiveLoss(_TemperatureLoss):
    """`ops.gram_contrastive_loss` with a learnable temperature, unit vectors and label smoothing 0.1, as in the released GRAM code. [ICLR 2025]

    >>> import torch
    >>> loss = GramContrastiveLoss()
    >>> text, video, audio = torch.eye(4), torch.eye(4), torch.eye(4)
    >>> loss(text, [video, audio], label_smoothing=0.0)
    tensor(1.3863, grad_fn=<DivBackward0>)

    Parameters: temperature (initial), learnable, limits (kept while training), label_smoothing, normalize, and any further option of the op. The call
    takes the op's tensors and may override options. Raises ValueError for a temperature outside its limits."""

    def forward(self, anchor: Tensor, others: Sequence[Tensor], **options: Any) -> Any:
        return gram_contrastive_loss(anchor, others, **self._settings(options))


class TriangleContrastiveLoss(_TemperatureLoss):
    """`ops.triangle_contrastive_loss` with a learnable temperature. [TRIANGLE, NeurIPS 2025]

    >>> import torch
    >>> loss = TriangleContrastiveLoss(learnable=False, label_smoothing=0.0)
    >>> bool(loss(torch.eye(4), torch.eye(4), torch.eye(4).roll(2, 0)) > 0)
    True
    """

    def forward(self, anchor: Tensor, u: Tensor, v: Tensor, **options: Any) -> Any:
        return triangle_contrastive_loss(anchor, u, v, **self._settings(options))


class CosineSumContrastiveLoss(_TemperatureLoss):
    """`ops.cosine_sum_contrastive_loss` with the settings of `GramContrastiveLoss`, so that the score alone differs. [GRAM, ICLR 2025]

    >>> import torch
    >>> loss = CosineSumContrastiveLoss(learnable=False, label_smoothing=0.0)
    >>> loss(torch.eye(4), [torch.eye(4), torch.eye(4)]).item() < 1e-5
    True
    """

    def forward(self, anchor: Tensor, others: Sequence[Tensor], **options: Any) -> Any:
        return cosine_sum_contrastive_loss(anchor, others, **self._settings(options))


class ClipLoss(nn.Module):
    """`ops.clip_loss` with a learnable scale, kept as its logarithm and at most `max_scale`. [CLIP, ICML 2021]

    >>> import torch
    >>> ClipLoss()(torch.eye(3), torch.eye(3)).item() < 1e-5
    True
    >>> ClipLoss()(torch.eye(3), torch.eye(3)[:2], positive_ids=(torch.tensor([7, 8, 9]), torch.tensor([7, 8]))).item() < 1e-5
    True

    The call takes any option of the op, such as `positive_ids` and `negatives`, and may override those of the constructor."""

    def __init__(self, scale: float = 1 / 0.07, *, learnable: bool = True, max_scale: float = 100.0, normalize: bool = True, **options: Any) -> None:
        super().__init__()
        if not 0 < scale <= max_scale < math.inf:
            raise ValueError(f"ClipLoss: scale must be positive and at most max_scale = {max_scale}, got {scale}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learnable)
        self.max_scale, self.options = max_scale, {"normalize": normalize, **options}

    def forward(self, x: Tensor, y: Tensor, **options: Any) -> Any:
        return clip_loss(x, y, logit_scale=self.log_scale.exp().clamp(max=self.max_scale), **{**self.options, **options})


class SigLipLoss(nn.Module):
    """`ops.siglip_loss` with a learnable scale, kept as its logarithm, and bias; published start 10 and -10. [SigLIP, ICCV 2023]

    >>> import torch
    >>> round(SigLipLoss()(torch.eye(3), torch.eye(3)).item(), 4)
    0.6932

    The call takes any option of the op, as that of `ClipLoss`."""

    def __init__(self, scale: float = 10.0, bias: float = -10.0, *, learnable: bool = True, normalize: bool = True, **options: Any) -> None:
        super().__init__()
        if not 0 < scale < math.inf:
            raise ValueError(f"SigLipLoss: scale must be positive and finite, got {scale}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learnable)
        self.bias = nn.Parameter(torch.tensor(float(bias)), requires_grad=learnable)
        self.options = {"normalize": normalize, **options}

    def forward(self, x: Tensor, y: Tensor, **options: Any) -> Any:
        return siglip_loss(x, y, logit_scale=self.log_scale.exp(), logit_bias=self.bias, **{**self.options, **options})
