"""Linear reduction of encoder features: centre, rotate to the leading principal components of the training items, round to eight bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .storage import dequantize, quantize

__all__ = ["FeatureBasis"]


@dataclass(frozen=True)
class FeatureBasis:
    """Maps raw encoder features [N, W] to the K stored dimensions. Stored with the data, so that a new text or picture lands in the same space.

    The components themselves are kept as int8 (one scale per component). Stored features are made with the rounded components, so rounding them
    changes the space a little but never makes stored and new features disagree.
    """

    mean: Tensor  # [W] float32
    components: Tensor  # [K, W] int8
    component_scale: Tensor  # [K] float32
    feature_scale: Tensor  # [K] float32: one step of the stored int8 features

    @classmethod
    def fit(cls, features: Tensor, width: int) -> FeatureBasis:
        """Fit on the features of training items [N, W]; at most N - 1 components carry anything."""
        if features.shape[0] <= width:
            raise ValueError(f"FeatureBasis.fit: features must have more rows than width, got {features.shape[0]} rows and width {width}")
        exact = features.double()
        mean = exact.mean(0)
        _, _, components = torch.linalg.svd(exact - mean, full_matrices=False)
        components = components[:width]
        # A singular vector's sign is arbitrary: fix it by its largest entry, so that two builds of torch write the same file.
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        values, scale = quantize((components * largest.sign()).float(), 0)
        basis = cls(mean.float(), values, scale, torch.ones(width))
        _, step = quantize(basis.project(features), 1)
        return cls(basis.mean, values, scale, step)

    def project(self, features: Tensor) -> Tensor:
        """Raw features [N, W] to float32 coordinates [N, K]."""
        if features.dim() != 2 or features.shape[1] != self.mean.shape[0]:
            raise ValueError(f"FeatureBasis.project: features must be [N, {self.mean.shape[0]}], got {list(features.shape)}")
        return (features.float() - self.mean) @ dequantize(self.components, self.component_scale, 0).T

    def encode(self, features: Tensor) -> Tensor:
        """Raw features [N, W] to the stored int8 coordinates [N, K]. Items outside the fitting set are clamped to its range."""
        return (self.project(features) / self.feature_scale).round().clamp(-127, 127).to(torch.int8)

    def decode(self, stored: Tensor) -> Tensor:
        return dequantize(stored, self.feature_scale, 1)

    def tensors(self, name: str) -> dict[str, Tensor]:
        return {
            f"{name}.mean": self.mean,
            f"{name}.components": self.components,
            f"{name}.component_scale": self.component_scale,
            f"{name}.feature_scale": self.feature_scale,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], name: str) -> FeatureBasis:
        return cls(*(tensors[f"{name}.{part}"] for part in ("mean", "components", "component_scale", "feature_scale")))
