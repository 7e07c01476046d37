"""One draw per row and per column of a matrix of logits that is never stored: what the hard-negative ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _arguments as arguments
from ._registration import call
from ._results import HardNegatives


def check_floor(op: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: floor must be a number, got {arguments.describe(value)}")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{op}: floor must be finite and at least 0, got {value!r}")
    return float(value)


def check_generator(op: str, value: object, like: Tensor) -> torch.Generator | None:
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"{op}: generator must be None or a torch.Generator, got {arguments.describe(value)}")
    if value is not None and value.device.type != like.device.type:
        raise ValueError(f"{op}: generator must be on the device of the other arguments, {like.device}, got {value.device}")
    return value


def check_sizes(op: str, target: Tensor | None, rows: int, columns: int) -> None:
    if target is None and rows == 1:
        raise ValueError(f"{op}: anchor must have at least 2 rows, got a batch of one: it has no negative")
    if rows and not columns:
        raise ValueError(f"{op}: there must be candidates to draw from, got C = 0")


@torch.no_grad()
def draw(
    name: str,
    anchor: Tensor,
    others: list[Tensor],
    scale: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    present: Tensor | None,
    eps: float,
    floor: float,
    generator: torch.Generator | None,
) -> HardNegatives:
    """Weights ``softmax(z) + floor`` on all candidates that take part but the own one: with the share of the softmax that its part of the mass has, the
    kernel's draw in proportion to exp(z), else a uniform one."""
    B, C, device = anchor.shape[0], others[0].shape[0], anchor.device
    seed = torch.randint(-(2**63), 2**63 - 1, (), generator=generator, device=device)
    uniform = torch.rand(2, B + C, generator=generator, device=device, dtype=torch.float64)
    _, row_lse, column_lse, _, _, label, row_draw, column_draw, *_ = call(
        name, anchor, others, scale, bias, target, present, 0.0, 0.5, 0.5, eps, 0, seed
    )
    rows, columns = row_lse != -torch.inf, column_lse != -torch.inf
    own = torch.arange(B, device=device) if target is None else target
    labelled = rows & (own >= 0) & (own < C)
    at = torch.where(labelled, own, 0)
    labelled = labelled & columns[at] if C else labelled
    if not B or not C:
        return HardNegatives(row_draw, column_draw)

    # Columns in their order; the own one of a row is left out by its place among them.
    place = columns.cumsum(0) - 1
    row_pick = uniform_but(columns.argsort(descending=True, stable=True), columns.sum(), place[at], labelled.long(), uniform[0, :B])
    row_mass = -torch.expm1(torch.where(labelled, label - row_lse, -torch.inf))
    # Rows ordered by their label: those whose label is j stand together. Rows without one come before, rows that take no part last.
    key = torch.where(labelled, at, torch.where(rows, -1, C))
    order = key.argsort(stable=True)
    first, length = torch.searchsorted(key[order], torch.arange(C, device=device)), torch.bincount(at[labelled], minlength=C)
    column_pick = uniform_but(order, rows.sum(), first, length, uniform[0, B:])
    share = torch.where(labelled, (label - column_lse[at]).exp(), 0)
    column_mass = (1 - torch.zeros_like(column_lse).index_add(0, at, share)).clamp(min=0)

    def mix(drawn: Tensor, pick: Tensor, mass: Tensor, count: Tensor, chance: Tensor, part: Tensor) -> Tensor:
        uniformly = chance * (mass + floor * count) >= mass
        return torch.where(part & (count > 0), torch.where(uniformly & (floor > 0) | (drawn < 0), pick, drawn), -1)

    return HardNegatives(
        mix(row_draw, row_pick, row_mass, columns.sum() - labelled.long(), uniform[1, :B], rows),
        mix(column_draw, column_pick, column_mass, rows.sum() - length, uniform[1, B:], columns),
    )


def uniform_but(order: Tensor, count: Tensor, first: Tensor, length: Tensor, chance: Tensor) -> Tensor:
    """A uniform draw out of the first `count` entries of `order` without those at `first` to `first + length`; anything where none is left."""
    left = (count - length).clamp(min=1)
    place = torch.minimum((chance * left).long(), left - 1)
    return order[torch.where(place >= first, place + length, place).clamp(max=order.shape[0] - 1)]
