"""The assignment of rows to columns of least cost."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assignment"]


def assignment(op: str, cost: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns), each at most once, as many as the smaller side has, of least total cost [rows, columns]. By SciPy (Jonker and Volgenant's algorithm)."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as missing:
        raise ImportError(f"{op}: SciPy must be installed for the best assignment, got none: pip install scipy") from missing
    rows, columns = linear_sum_assignment(cost.detach().double().cpu().numpy())
    return torch.from_numpy(rows).to(cost.device), torch.from_numpy(columns).to(cost.device)
