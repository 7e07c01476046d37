"""Heads that map frozen features into a shared space: linear, low-rank with a gate, and a plain stack. [STRUCTURE, NeurIPS 2025]"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from ..ops._structure import unit

__all__ = ["LinearHead", "LowRankResidualHead", "MLPHead"]


def _check_widths(name: str, **sizes: object) -> None:
    for key, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {key} must be a whole number of 1 or more, got {value!r}")


def _check_dropout(name: str, dropout: object) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"{name}: dropout must be at least 0 and less than 1, got {dropout!r}")


class LinearHead(nn.Linear):
    """``W x + b`` from features [..., D] to [..., out_features], unit vectors with `normalize_to_hypersphere`. [STRUCTURE, NeurIPS 2025, appendix]

    >>> import torch
    >>> LinearHead(8, 4, normalize_to_hypersphere=True)(torch.randn(2, 8)).shape
    torch.Size([2, 4])
    """

    def __init__(self, in_features: int, out_features: int = 512, *, bias: bool = True, normalize_to_hypersphere: bool = False) -> None:
        _check_widths("LinearHead", in_features=in_features, out_features=out_features)
        super().__init__(in_features, out_features, bias=bias)
        self.normalize_to_hypersphere = normalize_to_hypersphere

    def forward(self, input: Tensor) -> Tensor:
        return _finished(super().forward(input), self.normalize_to_hypersphere)


class LowRankResidualHead(nn.Module):
    """``P x + sigmoid(g) W2 dropout(gelu(W1 x))``: an orthogonal map and a low-rank correction that a gate lets in. [STRUCTURE, NeurIPS 2025, appendix]

    >>> import torch
    >>> head = LowRankResidualHead(8, 4)
    >>> torch.equal(head(torch.ones(1, 8)), head.projection(torch.ones(1, 8)))                # W2 begins as 0
    True

    P [out, in] and W1 [rank, in] begin (semi-)orthogonal, W2 [out, rank] as 0, no biases; rank: default max(8, out_features // 4), published 64. gate_init: the first
    value of sigmoid(g). With the published ``gate_init=0.0`` g is -inf, the gate and every gradient into g, W1 and W2 are 0 for ever, and the head is its linear part:
    kept for comparisons, with a warning. normalize_to_hypersphere: unit vectors. Raises ValueError for sizes, dropout and a gate outside [0, 1).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 512,
        *,
        rank: int | None = None,
        dropout: float = 0.1,
        gate_init: float = 0.05,
        normalize_to_hypersphere: bool = False,
    ) -> None:
        super().__init__()
        name = "LowRankResidualHead"
        _check_widths(name, in_features=in_features, out_features=out_features)
        rank = max(8, out_features // 4) if rank is None else rank
        _check_widths(name, rank=rank)
        _check_dropout(name, dropout)
        if isinstance(gate_init, bool) or not isinstance(gate_init, (int, float)) or not 0 <= gate_init < 1:
            raise ValueError(f"{name}: gate_init must be at least 0 and less than 1, got {gate_init!r}")
        if gate_init == 0:
            warnings.warn(f"{name}: gate_init=0.0 closes the gate for ever: g, W1 and W2 get no gradient, and the head stays linear", stacklevel=2)
        self.projection = nn.Linear(in_features, out_features, bias=False)
        self.down, self.up = nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.gate = nn.Parameter(torch.tensor(math.log(gate_init / (1 - gate_init)) if gate_init else -math.inf))
        nn.init.orthogonal_(self.projection.weight)
        nn.init.orthogonal_(self.down.weight)
        nn.init.zeros_(self.up.weight)
        self.normalize_to_hypersphere = normalize_to_hypersphere

    def forward(self, x: Tensor) -> Tensor:
        correction = self.up(self.dropout(nn.functional.gelu(self.down(x))))
        return _finished(self.projection(x) + self.gate.sigmoid() * correction, self.normalize_to_hypersphere)


class MLPHead(nn.Module):
    """Linear layers of width out_features with ReLU between them.

    >>> import torch
    >>> MLPHead(8, 4)(torch.ones(1, 8)).shape
    torch.Size([1, 4])

    layers: 1 or more, published 2; dropout after each ReLU; normalize_to_hypersphere: unit vectors. Raises ValueError for sizes and dropout.
    """

    def __init__(self, in_features: int, out_features: int = 512, *, layers: int = 2, dropout: float = 0.0, normalize_to_hypersphere: bool = False) -> None:
        super().__init__()
        _check_widths("MLPHead", in_features=in_features, out_features=out_features, layers=layers)
        _check_dropout("MLPHead", dropout)
        parts: list[nn.Module] = [nn.Linear(in_features, out_features)]
        for _ in range(layers - 1):
            parts += [nn.ReLU(), nn.Dropout(dropout), nn.Linear(out_features, out_features)]
        self.layers, self.normalize_to_hypersphere = nn.Sequential(*parts), normalize_to_hypersphere

    def forward(self, x: Tensor) -> Tensor:
        return _finished(self.layers(x), self.normalize_to_hypersphere)


def _finished(x: Tensor, normalize: bool) -> Tensor:
    """A zero vector stays 0, with gradient 0."""
    return unit(x.reshape(-1, x.shape[-1])).view(x.shape) if normalize else x
