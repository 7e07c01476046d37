"""The windows of neighbourhood attention on a grid of tokens, and an order of the tokens in which few tiles of pairs are touched by windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._trees import register_tree
from .mask import Mask, relation
from .rules import grid_clip, whole_number
from .tokens import FIELDS, Tokens

__all__ = ["Neighborhood", "Window", "checked_windows", "neighborhood", "neighborhood_of"]

TILE = 96  # queries, and keys, of a tile of the attention kernel: csrc/cpu/tile.h
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96)  # of strips, to choose from

Window = tuple[int, int, int, int, bool]  # of one dimension of a grid: its size, kernel, dilation, stride, causal


@dataclass(frozen=True, eq=False)
class Neighborhood:
    """Which tokens of a grid each of its tokens keeps, once they stand in an order that makes few tiles of pairs. A pytree.

    mask: of the tokens in that order; order: int64 [N], the token at each place, numbered along the grid with the last dimension fastest; places: int64 [N], the place of each token. Both
    None where tokens stay where they are.
    """

    mask: Mask
    order: Tensor | None
    places: Tensor | None

    def arrange(self, x: Tensor, dim: int = -2) -> Tensor:
        """Tokens that lie along the grid, in the order of the mask."""
        return x if self.order is None else x.index_select(dim, self.order)

    def restore(self, x: Tensor, dim: int = -2) -> Tensor:
        """The other way round."""
        return x if self.places is None else x.index_select(dim, self.places)

    def to(self, device: Any) -> Neighborhood:
        return pytree.tree_map_only(Tensor, lambda each: each.to(device), self)


register_tree(Neighborhood, ("mask", "order", "places"))


def neighborhood(
    grid: Sequence[int],
    kernel_size: Sequence[int] | int,
    *,
    dilation: Sequence[int] | int = 1,
    stride: Sequence[int] | int = 1,
    is_causal: Sequence[bool] | bool = False,
    device: Any = None,
) -> Neighborhood:
    """What the rule `grid_shift` keeps on a grid of one to three dimensions, with an order of its tokens.

    >>> hood = neighborhood((2, 3), (1, 2))
    >>> hood.restore(hood.restore(hood.mask.dense()[0, 0], 0), 1).int()
    tensor([[1, 1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [0, 0, 0, 1, 1, 0],
            [0, 0, 0, 1, 1, 0],
            [0, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    return neighborhood_of(checked_windows("neighborhood", grid, kernel_size, dilation, stride, is_causal), device)


def checked_windows(op: str, grid: Any, kernel_size: Any, dilation: Any, stride: Any, is_causal: Any) -> list[Window]:
    if not isinstance(grid, Sequence) or not 1 <= len(grid) <= 3:
        raise ValueError(f"{op}: grid must have the sizes of one to three dimensions, got {grid!r}")
    named = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride, "is_causal": is_causal}
    wide = {name: given if isinstance(given, Sequence) else [given] * len(grid) for name, given in named.items()}
    for name, given in wide.items():
        if len(given) != len(grid):
            raise ValueError(f"{op}: {name} must be one for each of {len(grid)} dimensions, or one for all, got {given!r}")
    found = list(zip(grid, *wide.values(), strict=True))
    for size, kernel, dilation, stride, causal in found:
        for name, value in (("grid", size), ("kernel_size", kernel), ("dilation", dilation), ("stride", stride)):
            whole_number(op, name, value, 1)
        if not isinstance(causal, bool):
            raise TypeError(f"{op}: is_causal must be True or False, got {causal!r}")
        if kernel * dilation > size:
            raise ValueError(f"{op}: kernel_size * dilation must be at most the size of the grid, got {kernel} * {dilation} for {size}")
        if stride > kernel:
            raise ValueError(f"{op}: stride must be at most kernel_size, got {stride} for {kernel}")
    return found


def neighborhood_of(windows: Sequence[Window], device: Any) -> Neighborhood:
    """Sizes of the grid may be symbols of a compiled graph: nothing branches on them.

    A window is the places from `first` to first + kernel - 1 among the tokens of one residue. Twice a place, it lies at most kernel - 1 from the middle of the window; so a query has that middle
    for its coordinate, and the rule is grid_clip. By the ranges of a tile that rule knows whether all windows hold it, and nearly always whether none meets it. (grid_shift is told where a query
    is, not its window: it has to allow for the shift at the border everywhere.)
    """
    rest = math.prod([size for size, *_ in windows])
    token = torch.arange(rest, device=device)
    zero = torch.zeros_like(token)
    residues, places, members, first, last_first = zero, [], [], [], []
    for size, kernel, dilation, stride, causal in windows:
        rest = rest // size
        along = token // rest % size
        place, residue = along // dilation, along % dilation
        count = (size - residue + dilation - 1) // dilation  # tokens of that residue
        leader = torch.minimum(place // stride * stride + (stride - 1 if causal else stride // 2), count - 1)
        first.append(leader - kernel + 1 if causal else torch.minimum((leader - kernel // 2).clamp(min=0), count - kernel))
        last_first.append(place - kernel + 1 if causal else first[-1])  # the window that ends with the query
        residues, places, members = residues * dilation + residue, [*places, place], [*members, count]

    order = _order(windows, residues, places, members) if len(windows) > 1 or windows[0][2] > 1 else None
    kernels = [kernel for _, kernel, *_ in windows]

    def tokens(coordinates: list[Tensor]) -> Tokens:
        given = dict.fromkeys(FIELDS, zero) | {"index": token, "segment": residues, "valid": zero + 1} | dict(zip("xyt", reversed(coordinates), strict=False))
        fields = torch.stack([given[name] for name in FIELDS]).to(torch.int32)
        return Tokens((fields if order is None else fields[:, order])[None])

    keys = tokens([2 * place + kernel - 1 for place, kernel in zip(places, kernels, strict=True)])
    rule = grid_clip(*[0] * (3 - len(kernels)), *(kernel - 1 for kernel in kernels))

    def keep(first: list[Tensor]) -> Mask:
        return relation({(0, 0): rule}, tokens([2 * (start + kernel - 1) for start, kernel in zip(first, kernels, strict=True)]), keys)

    mask = keep(first)
    if any(causal and stride > 1 for *_, stride, causal in windows):
        mask = mask & keep(last_first)
    return Neighborhood(mask, order, None if order is None else order.argsort())


def _order(windows: Sequence[Window], residues: Tensor, places: list[Tensor], members: list[Tensor]) -> Tensor:
    """Tokens of one residue after the other, those of a residue in strips along the last dimension. Strips run to and fro, so that any TILE tokens one behind the other are a box, or close to it,
    whatever the sizes."""
    counts = _strips([-(-size // dilation) for size, _, dilation, *_ in windows], [kernel for _, kernel, *_ in windows], residues.device) if len(windows) > 1 else []
    strip, inside, key = torch.zeros_like(residues), torch.zeros_like(residues), residues
    for (size, *_), place, count, strips in zip(windows[:-1], places, members, counts, strict=False):
        number = place * strips // count
        strip = strip * strips + torch.where(strip % 2 == 1, strips - 1 - number, number)
        inside, key = inside * size + place, key * strips
    along = torch.where(strip % 2 == 1, members[-1] - 1 - places[-1], places[-1])
    return (((key + strip) * windows[-1][0] + along) * math.prod([size for size, *_ in windows[:-1]]) + inside).argsort()


def _strips(sizes: list[int], kernels: list[int], device: Any) -> Tensor:
    """In how many strips to cut all dimensions but the last: so that a tile, TILE tokens of one strip, meets few others. Across strips, windows of a tile of side b meet its own and as many on either
    side as they reach into; along a strip they are kernel + b - 1 long, and tiles of the next strip lie anyhow."""
    widths: list[list[int]] = [[]]
    for _ in sizes[:-1]:
        widths = [[*each, width] for each in widths for width in WIDTHS if math.prod(each) * width <= TILE]
    size, kernel = (torch.tensor(each, dtype=torch.float64, device=device) for each in (sizes, kernels))
    strips = (size[:-1] / torch.tensor(widths, dtype=torch.float64, device=device)).ceil()
    side = list((size[:-1] / strips).unbind(1))
    side.append(TILE / math.prod(side))
    for n in range(len(sizes) - 1, 0, -1):  # what is longer than its dimension goes on in the next strip
        side[n - 1], side[n] = side[n - 1] * (side[n] / size[n]).clamp(min=1), torch.minimum(side[n], size[n])
    b, left = torch.stack(side, 1), kernel.div(2, rounding_mode="floor")
    met = 1 + (left / b).ceil() + ((kernel - 1 - left) / b).ceil()
    met[:, -1] = 1.5 + (kernel[-1] - 1) / b[:, -1]
    return strips[torch.minimum(met, size / b).prod(1).argmin(0, keepdim=True)][0].long()
