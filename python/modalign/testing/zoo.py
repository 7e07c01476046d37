"""Vectors on which formulas divide by zero, overflow or cancel. Ops that measure vectors have to survive all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .cases import Maker

ZERO_VOLUME = ("zero", "all_zero", "identical", "antiparallel", "duplicated", "scaled_copy")
NOT_FINITE = ("nan", "inf")


def degenerate_zoo(maker: Maker, count: int = 3, rows: int = 5, width: int = 16) -> dict[str, list[Tensor]]:
    """name -> `count` (2 or more) matrices [rows, width]; row i of all of them is one tuple. Entries named in ZERO_VOLUME are exactly dependent in
    every row; entries in NOT_FINITE hold their bad value in row 1 of the last matrix alone."""
    plain = [maker.unit(rows, width) for _ in range(count)]

    def changed(index: int, value: Tensor) -> list[Tensor]:
        return [value if position == index % count else vectors.clone() for position, vectors in enumerate(plain)]

    half = maker.dtype in (torch.float16, torch.bfloat16)
    # The square of a volume of three is the sixth power: just in range.
    large, small = (2.0**2, 2.0**-4) if maker.dtype is torch.float16 else (2.0**20, 2.0**-20)
    holed = plain[-1].clone()
    holed[1, 3] = torch.nan
    endless = plain[-1].clone()
    endless[1, 3] = torch.inf
    wide = [maker.unit(rows, 2 * width)[:, ::2] for _ in range(count)]
    return {
        "zero": changed(-1, torch.zeros_like(plain[0])),
        "all_zero": [torch.zeros_like(plain[0]) for _ in range(count)],
        "identical": [plain[0].clone() for _ in range(count)],
        "antiparallel": changed(-1, -plain[0]),
        "duplicated": changed(-1, plain[0].clone()),
        "scaled_copy": changed(-1, 4 * plain[0]),  # a power of two, so that the copy is exact in every dtype
        "nearly_collinear": maker.nearly_collinear(count, rows, width, 0.1 if half else 1e-3),
        "huge": [large * vectors for vectors in plain],
        "tiny": [small * vectors for vectors in plain],
        "nan": changed(-1, holed),
        "inf": changed(-1, endless),
        "strided": wide,
        "reversed_layout": [vectors.mT.contiguous().mT for vectors in plain],
        "expanded": [vectors[:1].expand(rows, width) for vectors in plain],
    }
