"""Linear maps between two spaces of embeddings in closed form: least squares, ridge, Procrustes and a Procrustes that outliers do not rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import Neighbors, knn

__all__ = ["LinearAlignment", "LinearAlignmentConfig"]

METHODS = ("ols", "ridge", "procrustes", "robust_procrustes")


@dataclass(frozen=True)
class LinearAlignmentConfig:
    """method : "ols", "ridge", "procrustes" or "robust_procrustes"
    ridge : what "ridge" adds to the diagonal of X^T X
    standardize : bring every column of both sides to mean 0 and standard deviation 1 first; a constant one becomes 0
    rounds, epsilon : "robust_procrustes" weighs every pair by 1 / (its residual's length + epsilon) and solves again, `rounds` times
    """

    method: str = "procrustes"
    ridge: float = 1.0
    standardize: bool = True
    rounds: int = 5
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"LinearAlignmentConfig: method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.ridge < 0 or self.rounds < 0 or not self.epsilon > 0:
            raise ValueError(
                f"LinearAlignmentConfig: ridge and rounds must not be negative and epsilon positive, got {self.ridge}, {self.rounds} and {self.epsilon}"
            )


@dataclass(frozen=True)
class LinearAlignment:
    r"""x -> target space by ``W`` between standardised sides: ``y = ((x - mean_x) / std_x) W std_y + mean_y``. [SITTA, 2023]

    With standardised pairs X [n, D_x] and Y [n, D_y]:

    * "ols": W = argmin |X W - Y|^2, of smallest norm where there are many; "ridge": + ridge |W|^2.
    * "procrustes": W = U V^T of X^T Y = U S V^T: no stretching, W^T W = I where D_x >= D_y and W W^T = I where D_x <= D_y.
    * "robust_procrustes": the same from pairs weighted by 1 / (|y - x W| + epsilon), solved `rounds` times more.

    Least squares fits the training pairs best; Procrustes has nothing to overfit with and does better on few pairs or on another domain.
    """

    config: LinearAlignmentConfig
    weight: Tensor  # [D_x, D_y], between standardised sides
    mean: tuple[Tensor, Tensor]  # [D_x], [D_y]
    std: tuple[Tensor, Tensor]  # [D_x], [D_y]; 0 for a constant column

    @classmethod
    def fit(
        cls,
        source: Tensor,
        target: Tensor,
        config: LinearAlignmentConfig = LinearAlignmentConfig(),
        *,
        pairs: Tensor | None = None,
        chunk: int = 8192,
    ) -> LinearAlignment:
        """Fit on source [N, D_x] and target [M, D_y], row i of both being one pair, or on `pairs` int64 [n, 2] of their rows.

        With `pairs` an image can go with each token of its captions: the rows are looked up `chunk` pairs at a time and never all written out. Products are
        summed in float64, so memory is (D_x + D_y)^2 beside the tables.

        >>> import torch
        >>> x, rotation = torch.randn(50, 6), torch.linalg.qr(torch.randn(6, 6)).Q
        >>> model = LinearAlignment.fit(x, x @ rotation, LinearAlignmentConfig(standardize=False))
        >>> torch.allclose(model(x), x @ rotation, atol=1e-5)
        True
        """
        op = "LinearAlignment.fit"
        for name, table in (("source", source), ("target", target)):
            if table.dim() != 2 or not table.is_floating_point():
                raise ValueError(f"{op}: {name} must be a floating-point tensor of 2 dimensions, got {table.dtype} {list(table.shape)}")
            if not bool(table.isfinite().all()):
                raise ValueError(f"{op}: {name} must be finite, got a NaN or an Inf")
        if pairs is None:
            if len(source) != len(target):
                raise ValueError(f"{op}: source and target must have equally many rows where pairs is not given, got {len(source)} and {len(target)}")
            pairs = torch.arange(len(source), device=source.device)[:, None].expand(-1, 2)
        if pairs.dtype is not torch.int64 or pairs.dim() != 2 or pairs.shape[1] != 2 or len(pairs) == 0:
            raise ValueError(f"{op}: pairs must be int64 [n, 2] with n of 1 or more, got {pairs.dtype} {list(pairs.shape)}")
        if bool((pairs < 0).any()) or bool((pairs >= pairs.new_tensor([len(source), len(target)])).any()):
            raise ValueError(f"{op}: pairs must name rows of source, 0 to {len(source) - 1}, and of target, 0 to {len(target) - 1}")
        if chunk < 1:
            raise ValueError(f"{op}: chunk must be at least 1, got {chunk}")

        def chunks() -> Iterator[tuple[Tensor, Tensor]]:
            for rows in pairs.split(chunk):
                yield source[rows[:, 0]].double(), target[rows[:, 1]].double()

        mean, std = _moments(chunks, len(pairs)) if config.standardize else _identity(source, target)
        inverse = [torch.where(s == 0, 0, 1 / torch.where(s == 0, 1, s)) for s in std]

        def standardized() -> Iterator[tuple[Tensor, Tensor]]:
            for x, y in chunks():
                yield (x - mean[0]) * inverse[0], (y - mean[1]) * inverse[1]

        if config.method in ("ols", "ridge"):
            weight = _least_squares(standardized, config.ridge if config.method == "ridge" else 0.0)
        else:
            weight = _rotation(sum(x.T @ y for x, y in standardized()))
            for _ in range(config.rounds if config.method == "robust_procrustes" else 0):
                weight = _rotation(sum((x / (torch.linalg.vector_norm(y - x @ weight, dim=1, keepdim=True) + config.epsilon)).T @ y for x, y in standardized()))
        return cls(config, weight.float(), tuple(m.float() for m in mean), tuple(s.float() for s in std))

    def __call__(self, source: Tensor) -> Tensor:
        """[N, D_x] -> float32 [N, D_y]."""
        mean, std = self.mean, self.std
        standardized = torch.where(std[0] == 0, 0, (source.float() - mean[0]) / torch.where(std[0] == 0, 1, std[0]))
        return standardized @ self.weight * std[1] + mean[1]

    def nearest_tokens(self, source: Tensor, table: Tensor, k: int = 8) -> Neighbors:
        """The k rows of a token table [V, D_y] of largest cosine with each mapped row of source [N, D_x]: what a prompt is made of. [SITTA, section 3.2]

        Largest first, equal ones by index; values float32 [N, k], indices int64: `ops.knn`.

        >>> import torch
        >>> model = LinearAlignment.fit(torch.eye(4), torch.eye(4), LinearAlignmentConfig(standardize=False))
        >>> model.nearest_tokens(torch.eye(4)[:2], torch.eye(4), 2).indices
        tensor([[0, 1],
                [1, 0]])
        """
        if table.dim() != 2 or table.shape[1] != self.weight.shape[1]:
            raise ValueError(f"LinearAlignment.nearest_tokens: table must be [V, {self.weight.shape[1]}], got {list(table.shape)}")
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(table):
            raise ValueError(f"LinearAlignment.nearest_tokens: k must be from 1 to V = {len(table)}, got {k!r}")
        return knn(self(source), table.float(), k)


def _identity(source: Tensor, target: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    widths = [(table.shape[1], table.device) for table in (source, target)]
    return [torch.zeros(D, dtype=torch.float64, device=at) for D, at in widths], [torch.ones(D, dtype=torch.float64, device=at) for D, at in widths]


def _moments(chunks, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Means and population standard deviations of both sides; the latter exactly 0 where nothing but rounding is left of a column."""
    mean = [sum(sums) / count for sums in zip(*((x.sum(0), y.sum(0)) for x, y in chunks()), strict=True)]
    variance = [sum(sums) / count for sums in zip(*(((x - mean[0]).square().sum(0), (y - mean[1]).square().sum(0)) for x, y in chunks()), strict=True)]
    return mean, [torch.where(v.sqrt() > 1e-12 * m.abs(), v.sqrt(), 0) for m, v in zip(mean, variance, strict=True)]


def _least_squares(standardized, ridge: float) -> Tensor:
    """(X^T X + ridge)^-1 X^T Y on the directions that X has."""
    gram, cross = (sum(sums) for sums in zip(*((x.T @ x, x.T @ y) for x, y in standardized()), strict=True))
    values, vectors = torch.linalg.eigh(gram)
    there = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors @ (torch.where(there, 1 / torch.where(there, values + ridge, 1), 0)[:, None] * (vectors.T @ cross))


def _rotation(cross: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(cross, full_matrices=False)
    return u @ vh
