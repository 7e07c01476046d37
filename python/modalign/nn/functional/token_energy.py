"""How redundant every token is: energies by which tokens are protected from merging. [PiToMe, NeurIPS 2024]"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import _arguments as arguments

__all__ = ["energy_order", "token_energy"]

PANEL_BYTES = 1 << 26


def token_energy(features: Tensor, margin: float, *, alpha: float = 1.0, kernel: str = "elu") -> Tensor:
    """The mean over all tokens of a function of the cosine with them, large for a token that has many like it.

    ::

        E_i = mean over j of f(cos_ij)        elu: f(x) = elu(x - margin, alpha)        gaussian: f(x) = exp(-((1 - x) / s)^2 / 2) / (s sqrt(2 pi)), s = 1 - margin

    >>> import torch
    >>> token_energy(torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]), 0.5).argmin()
    tensor(2)

    Parameters: features [B, N, D]; margin below 1 (published: 0.95 falling to 0 over the layers of CLIP, from 0.9 or 0.75 for DeiT).

    Returns [B, N], float32 (float64). No gradient: it ranks. Rows are made in panels of 64 MiB, nothing N x N. A zero vector has cosine 0 with everything.

    Raises TypeError and ValueError, ``token_energy: <argument> must ..., got ...``.

    Paper: Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS 2024."""
    op = "token_energy"
    arguments.check_vectors(op, "features", features, "[B, N, D]")
    if features.dim() != 3:
        raise ValueError(f"{op}: features must have shape [B, N, D], got {arguments.describe(features)}")
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not (math.isfinite(margin) and margin < 1):
        raise ValueError(f"{op}: margin must be a number below 1, got {arguments.describe(margin)}")
    if kernel not in ("elu", "gaussian"):
        raise ValueError(f'{op}: kernel must be "elu" or "gaussian", got {arguments.describe(kernel)}')
    with torch.no_grad():
        unit = F.normalize(features.detach().to(torch.float64 if features.dtype is torch.float64 else torch.float32), dim=2)
        B, N, _ = unit.shape
        step = max(1, PANEL_BYTES // max(1, B * N * unit.itemsize))
        panels = []
        for rows in unit.split(step, 1):
            cosine = rows @ unit.mT
            if kernel == "elu":
                value = F.elu(cosine.sub_(margin), alpha, inplace=True)
            else:
                spread = 1 - margin
                value = cosine.sub_(1).div_(spread).square_().mul_(-0.5).exp_().div_(spread * math.sqrt(2 * math.pi))
            panels.append(value.mean(2))
        return torch.cat(panels, 1) if panels else unit.new_zeros(B, 0)


def energy_order(energy: Tensor, r: int, *, protected: int = 0) -> Tensor:
    """The `order` for `match_tokens` by which r of the 2 r tokens with the most energy join one of the others, and all others stay.

    ::

        order = energy_order(token_energy(features[:, 1:], margin), r, protected=1)                                       # energies of all but the class token
        match = match_tokens(features, r, order=order, protected=features.shape[1] - 2 * r)

    >>> import torch
    >>> energy_order(torch.tensor([[0.1, 0.9, 0.2, 0.8]]), 1, protected=1)
    tensor([[0, 3, 1, 4, 2]])

    Parameters: energy [B, N - protected] of the tokens that may merge; r at most half of them. Returns int64 [B, N]: the first tokens, those that stay by falling energy, then the 2 r by falling
    energy, alternately source and destination (of two the first is a source).

    Paper: as `token_energy`."""
    if not isinstance(energy, Tensor) or energy.dim() != 2 or not energy.is_floating_point():
        raise TypeError(f"energy_order: energy must be a floating-point tensor [B, N], got {arguments.describe(energy)}")
    B, N = energy.shape
    if isinstance(r, bool) or not isinstance(r, int) or not 0 <= 2 * r <= N:
        raise ValueError(f"energy_order: r must be a whole number from 0 to half of {N}, got {arguments.describe(r)}")
    ranked = energy.argsort(dim=1, descending=True, stable=True) + protected
    redundant, stays = ranked[:, : 2 * r].reshape(B, r, 2), ranked[:, 2 * r :]
    if (protected + N) % 2:  # sources stand at even places
        redundant = redundant.flip(2)
    return torch.cat([torch.arange(protected, device=energy.device).expand(B, -1), stays, redundant.flatten(1)], 1)
