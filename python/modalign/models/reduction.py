"""Principal components of training features: raw encoder features are wide, and light heads learn better on the directions that carry them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PrincipalComponents"]


@dataclass(frozen=True)
class PrincipalComponents:
    """x -> P (x - mean); the rows of P [K, D] are orthonormal, leading directions of the items it was fitted on first."""

    mean: Tensor  # [D]
    components: Tensor  # [K, D]

    @classmethod
    def fit(cls, features: Tensor, width: int) -> PrincipalComponents:
        """Fit on training items [N, D] in float64; `width` is at most D and N - 1.

        >>> import torch
        >>> reduction = PrincipalComponents.fit(torch.randn(50, 8), 3)
        >>> reduction(torch.randn(4, 8)).shape
        torch.Size([4, 3])
        """
        limit = min(features.shape[1], len(features) - 1)
        if not 1 <= width <= limit:
            raise ValueError(f"PrincipalComponents.fit: width must be in 1..{limit} for features {list(features.shape)}, got {width}")
        exact = features.double()
        mean = exact.mean(0)
        centred = exact - mean
        _, vectors = torch.linalg.eigh(centred.T @ centred)  # rising eigenvalues
        components = vectors.flip(1)[:, :width].T
        # The sign of an eigenvector is arbitrary: fix it by its largest entry.
        components = components * components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
        return cls(mean.float(), components.float().contiguous())

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) @ self.components.T
