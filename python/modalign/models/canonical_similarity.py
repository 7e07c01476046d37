"""Canonical similarity analysis: correlated directions of two encoders in closed form, and a refinement that keeps neighbourhoods. [CSA, ICLR 2025; STRUCTURE, NeurIPS 2025]"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import structure_loss

__all__ = ["CanonicalSimilarity", "CanonicalSimilarityConfig"]


@dataclass(frozen=True)
class CanonicalSimilarityConfig:
    """dims : how many directions are kept
    ridge : times the mean variance, added to every variance of both sides
    explained : keep only the principal directions of each side that hold this share of its variance, such as 0.999; None: all that it has
    """

    dims: int = 512
    ridge: float = 0.0
    explained: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.dims, bool) or not isinstance(self.dims, int) or self.dims < 1:
            raise ValueError(f"CanonicalSimilarityConfig: dims must be a whole number of 1 or more, got {self.dims!r}")
        if not self.ridge >= 0 or (self.explained is not None and not 0 < self.explained <= 1):
            raise ValueError(f"CanonicalSimilarityConfig: ridge must be 0 or more and explained above 0 and at most 1, got {self.ridge} and {self.explained}")


@dataclass(frozen=True)
class CanonicalSimilarity:
    r"""Maps of two sides onto their correlated directions and the similarity that weighs these by their correlations. [CSA, ICLR 2025, section 3]

    With centred pairs, covariances C_x, C_y and ``C_x^-1/2 C_xy C_y^-1/2 = U D V^T``, the maps are ``C_x^-1/2 U`` and ``C_y^-1/2 V``, `dims` columns of each, and

    ``similarity(x, y) = sum_i D_i u_i v_i / (|u| |v|)``, u and v the mapped vectors.
    """

    config: CanonicalSimilarityConfig
    weight: tuple[Tensor, Tensor]  # float64 [D_x, dims], [D_y, dims]
    mean: tuple[Tensor, Tensor]
    correlations: Tensor  # float64 [dims], falling

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, config: CanonicalSimilarityConfig = CanonicalSimilarityConfig()) -> CanonicalSimilarity:
        """Fit on x [n, D_x] and y [n, D_y], row i of both being one pair. Computed in float64; no gradient.

        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(100, 5)
        >>> CanonicalSimilarity.fit(x, x @ torch.randn(5, 5), CanonicalSimilarityConfig(dims=3)).correlations.float()
        tensor([1., 1., 1.])
        """
        sides = _checked("CanonicalSimilarity.fit", x, y)
        mean = tuple(side.mean(0) for side in sides)
        centred = [side - m for side, m in zip(sides, mean, strict=True)]
        roots = [_inverse_root(side, config) for side in centred]
        ranks = [root.shape[1] for root in roots]
        if config.dims > min(ranks):
            raise ValueError(f"CanonicalSimilarity.fit: dims must be at most the ranks of x and y, {ranks[0]} and {ranks[1]}, got {config.dims}")
        cross = (centred[0] @ roots[0]).T @ (centred[1] @ roots[1]) / len(sides[0])
        u, correlations, vh = torch.linalg.svd(cross, full_matrices=False)
        u, v = u[:, : config.dims], vh.T[:, : config.dims]
        sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()  # arbitrary in a pair of directions: the largest entry of x's is positive
        return cls(config, (roots[0] @ (u * sign), roots[1] @ (v * sign)), mean, correlations[: config.dims].clamp(max=1))

    def transform_x(self, x: Tensor) -> Tensor:
        """[N, D_x] -> [N, dims], float32 (float64 for float64)."""
        return self._mapped(0, x)

    def transform_y(self, y: Tensor) -> Tensor:
        return self._mapped(1, y)

    def embed_x(self, x: Tensor, *, weighted: bool = True) -> Tensor:
        """Vectors [N, dims] whose inner products with those of `embed_y` are the similarities: for `ops.knn(..., metric="dot")`. `weighted=False`: unit vectors, whose
        products are plain cosines, which the released STRUCTURE evaluation appears to use."""
        return self._embedded(0, x, weighted)

    def embed_y(self, y: Tensor, *, weighted: bool = True) -> Tensor:
        return self._embedded(1, y, weighted)

    def similarity(self, x: Tensor, y: Tensor, *, weighted: bool = True) -> Tensor:
        """[N, M] of all pairs."""
        return self.embed_x(x, weighted=weighted) @ self.embed_y(y, weighted=weighted).T

    def refined(
        self,
        x: Tensor,
        y: Tensor,
        *,
        structure: Callable[[Tensor, Tensor], Tensor] | None = None,
        structure_weight: float = 10.0,
        similarity_weight: float = 0.01,
        epochs: int = 10,
        learning_rate: float = 5e-4,
        batch_size: int = 4096,
        seed: int = 0,
    ) -> CanonicalSimilarity:
        r"""The maps after some epochs of Adam on ``structure_weight (R_x + R_y) / 2 - similarity_weight sum <x, y> / dims`` over unit mapped vectors, whitened again.

        structure : (source, aligned) -> scalar, default `ops.structure_loss` at temperature 0.2. Whitening: ``W <- W C^-1/2``, C the covariance of the mapped training
        vectors, so that theirs is I afterwards; correlations are those of the new directions. [STRUCTURE, released settings]
        """
        op = "CanonicalSimilarity.refined"
        sides = _checked(op, x, y)
        for name, value in (("epochs", epochs), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{op}: {name} must be a whole number of 1 or more, got {value!r}")
        regularizer = structure or (lambda source, aligned: structure_loss(source, aligned, temperature=0.2))
        raw = [side.float() for side in (x, y)]
        centred = [(side - mean).float() for side, mean in zip(sides, self.mean, strict=True)]
        weight = [w.float().clone().requires_grad_() for w in self.weight]
        optimizer = torch.optim.Adam(weight, lr=learning_rate)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=generator).to(x.device).split(batch_size):
                mapped = [torch.nn.functional.normalize(side[rows] @ w, dim=1) for side, w in zip(centred, weight, strict=True)]
                kept = sum(regularizer(side[rows], z) for side, z in zip(raw, mapped, strict=True)) / 2
                loss = structure_weight * kept - similarity_weight * (mapped[0] * mapped[1]).sum() / self.config.dims
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        found = []
        for side, mean, w in zip(sides, self.mean, weight, strict=True):
            projected = (side - mean) @ w.detach().double()
            values, vectors = torch.linalg.eigh(projected.T @ projected / len(side))
            if values[0] <= values[-1] * len(values) * torch.finfo(values.dtype).eps:
                raise ValueError(f"{op}: the mapped vectors must have dims = {self.config.dims} independent directions, got fewer")
            found.append(w.detach().double() @ vectors / values.sqrt() @ vectors.T)
        x_mapped, y_mapped = ((side - mean) @ w for side, mean, w in zip(sides, self.mean, found, strict=True))
        correlations = (x_mapped * y_mapped).mean(0).clamp(-1, 1)
        return CanonicalSimilarity(self.config, (found[0], found[1]), self.mean, correlations)

    def _mapped(self, side: int, vectors: Tensor) -> Tensor:
        name, width = "xy"[side], len(self.weight[side])
        if vectors.dim() != 2 or vectors.shape[1] != width:
            raise ValueError(f"CanonicalSimilarity: {name} must be [N, {width}], got {list(vectors.shape)}")
        return ((vectors.double() - self.mean[side]) @ self.weight[side]).to(torch.promote_types(vectors.dtype, torch.float32))

    def _embedded(self, side: int, vectors: Tensor, weighted: bool) -> Tensor:
        mapped = torch.nn.functional.normalize(self._mapped(side, vectors), dim=1)
        if not weighted:
            return mapped
        root = self.correlations.abs().sqrt() * (self.correlations.sign() if side else 1)
        return mapped * root.to(mapped.dtype)


def _checked(op: str, x: Tensor, y: Tensor) -> list[Tensor]:
    for name, side in (("x", x), ("y", y)):
        if side.dim() != 2 or not side.is_floating_point():
            raise ValueError(f"{op}: {name} must be a floating-point matrix [n, D], got {side.dtype} {list(side.shape)}")
        if not bool(side.isfinite().all()):
            raise ValueError(f"{op}: {name} must be finite, got a NaN or an Inf")
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"{op}: x and y must have equally many rows, 2 or more, got {len(x)} and {len(y)}")
    return [x.detach().double(), y.detach().double()]


def _inverse_root(centred: Tensor, config: CanonicalSimilarityConfig) -> Tensor:
    """[D, rank]: onto the principal directions that are kept, each of variance 1."""
    covariance = centred.T @ centred / len(centred)
    ridge = config.ridge * covariance.diagonal().mean()
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = values + ridge > (values[0] + ridge) * max(centred.shape) * torch.finfo(values.dtype).eps
    if config.explained is not None:
        before = values.clamp(min=0).cumsum(0) - values.clamp(min=0)
        kept &= before < config.explained * values.clamp(min=0).sum()
    return vectors[:, kept] / (values[kept] + ridge).sqrt()
