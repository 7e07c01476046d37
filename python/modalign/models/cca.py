"""Regularised canonical correlation analysis for two or more modalities: the closed-form alignment that a learned one has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CanonicalCorrelation", "CanonicalCorrelationConfig"]


@dataclass(frozen=True)
class CanonicalCorrelationConfig:
    """`ridge` times the mean variance is added to every variance; directions are weighted by their correlation to the power `power`."""

    width: int = 256
    ridge: float = 0.3
    power: float = 0.5


@dataclass(frozen=True)
class CanonicalCorrelation:
    r"""One affine map per modality into a shared space, of greatest summed correlation.

    With centred features X_p (n rows), C_pp = X_p^T X_p / n + ridge * mean variance = L_p L_p^T and the whitened cross-covariances
    M_pq = L_p^-1 (X_p^T X_q / n) L_q^-T, the directions are the leading eigenvectors of the block matrix (M_pq), M_pp = I. For two modalities that is
    ordinary CCA, with eigenvalues 1 + rho; for k of them rho = (eigenvalue - 1) / (k - 1).
    """

    config: CanonicalCorrelationConfig
    weight: dict[str, Tensor]  # modality -> [width, D]
    bias: dict[str, Tensor]  # modality -> [width]
    correlation: Tensor  # [width]

    @classmethod
    def fit(
        cls,
        features: Mapping[str, Tensor],
        config: CanonicalCorrelationConfig = CanonicalCorrelationConfig(),
        *,
        present: Mapping[str, Tensor] | None = None,
    ) -> CanonicalCorrelation:
        """Fit on training items: a mapping of modality to [N, D_p], row i of all of them being item i. Computed in float64.

        present : bool [N] for the modalities that some items lack; a modality's covariance is over the items that have it, a cross-covariance over
        those that have both.
        """
        if len(features) < 2:
            raise ValueError(f"CanonicalCorrelation.fit: features must hold at least 2 modalities, got {len(features)}")
        rows = {name: len(x) for name, x in features.items()}
        if len(set(rows.values())) != 1 or min(rows.values()) < 2:
            raise ValueError(f"CanonicalCorrelation.fit: features must have equally many rows, at least 2, got {rows}")
        if config.width < 1 or not config.ridge > 0:
            raise ValueError(f"CanonicalCorrelation.fit: width and ridge must be positive, got {config.width} and {config.ridge}")
        if config.width > min(x.shape[1] for x in features.values()):
            widths = {name: x.shape[1] for name, x in features.items()}
            raise ValueError(f"CanonicalCorrelation.fit: width must not exceed the narrowest modality, got {config.width} and {widths}")
        total = next(iter(rows.values()))
        factors, whitened, means, masks = [], [], [], []
        for name, x in features.items():
            mask = (present or {}).get(name)
            exact = x.double()
            mean = exact.mean(0) if mask is None else exact[mask].mean(0)
            centred = exact - mean if mask is None else torch.where(mask[:, None], exact - mean, 0)
            count = total if mask is None else int(mask.sum())
            if count < 2:
                raise ValueError(f"CanonicalCorrelation.fit: present['{name}'] must hold at least 2 items, got {count}")
            masks.append(torch.ones(total, dtype=torch.float64) if mask is None else mask.double())
            covariance = centred.T @ centred / count
            ridge = config.ridge * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
            factor = torch.linalg.cholesky(covariance + ridge * torch.eye(len(covariance), dtype=torch.float64))
            factors.append(factor)
            whitened.append(torch.linalg.solve_triangular(factor, centred.T, upper=False) / count**0.5)  # [D_p, N]
            means.append(mean)
        joint = torch.cat(whitened)
        matrix = joint @ joint.T
        start = 0
        blocks = []
        for w in whitened:
            blocks.append(slice(start, start + len(w)))
            start += len(w)
        for p, row in enumerate(blocks):
            for q, column in enumerate(blocks):
                if p == q:
                    matrix[row, row] = torch.eye(len(whitened[p]), dtype=torch.float64)
                else:  # the sum is over the items that have both, of whom there may be fewer
                    shared = float(masks[p] @ masks[q])
                    matrix[row, column] *= float(masks[p].sum() * masks[q].sum()) ** 0.5 / shared if shared else 0.0
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values.flip(0)[: config.width], vectors.flip(1)[:, : config.width]
        # The sign of an eigenvector is arbitrary: fix it by its largest entry.
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        correlation = ((values - 1) / (len(features) - 1)).clamp(0, 1)
        weight, bias = {}, {}
        for name, factor, mean, part in zip(features, factors, means, vectors.split([len(w) for w in whitened]), strict=True):
            # sqrt(k) gives each modality's part of the joint unit eigenvector length about 1.
            directions = torch.linalg.solve_triangular(factor.T, part, upper=True) * correlation**config.power * len(features) ** 0.5
            weight[name] = directions.T.float().contiguous()
            bias[name] = (-mean @ directions).float()
        return cls(config, weight, bias, correlation.float())

    def embed(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Unit vectors in the shared space: a mapping of modality to [N, width]."""
        return {name: F.normalize(F.linear(x.float(), self.weight[name], self.bias[name]), dim=-1) for name, x in features.items()}
