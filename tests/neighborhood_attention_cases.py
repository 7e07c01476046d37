"""The entry of neighborhood_attention in `cases.py`. Identities are in test_neighborhood_attention.py."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attention_cases import MASKED_ATTENTION, with_lse
from modalign import ops
from modalign.ops.neighborhood_attention import reference_neighborhood_attention
from modalign.testing import NOT_FINITE, BadInput, Maker, Sample, degenerate_zoo


def operands(make: Maker, B: int, H: int, Hkv: int, grid: tuple[int, ...], D: int, Dv: int) -> tuple[Tensor, Tensor, Tensor]:
    N = math.prod(grid)
    return make.randn(B, H, N, D), make.randn(B, Hkv, N, D), make.randn(B, Hkv, N, Dv)


def samples(make: Maker) -> list[Sample]:
    def call(name: str, grid: tuple[int, ...], kernel_size: int | tuple[int, ...], H: int = 2, Hkv: int = 2, **options: object) -> Sample:
        return Sample(name, operands(make, 2, H, Hkv, grid, 16, 8), {"grid": grid, "kernel_size": kernel_size, **options})

    return [
        call("1-D", (203,), 21),
        call("1-D, even, dilated", (203,), 10, dilation=3),
        call("1-D, causal with strides", (130,), 30, stride=7, is_causal=True),
        call("2-D, groups", (13, 17), (5, 7), 4, 2),
        call("2-D, even, one dimension causal", (16, 15), (4, 6), is_causal=(True, False), scale=0.5),
        call("2-D, dilated, unequal classes", (11, 16), 3, dilation=(2, 5), stride=(2, 3)),
        call("2-D, dense", (9, 12), (9, 12)),
        call("3-D", (5, 6, 8), (3, 3, 5)),
        call("3-D, everything", (4, 7, 9), (2, 3, 4), dilation=(1, 2, 2), stride=(2, 1, 3), is_causal=(True, False, False)),
    ]


def tiny(make: Maker) -> list[Sample]:
    return [
        Sample("2-D", operands(make, 1, 2, 1, (3, 4), 3, 2), {"grid": (3, 4), "kernel_size": (2, 3)}),
        Sample("dilated, causal", operands(make, 1, 1, 1, (7,), 2, 2), {"grid": (7,), "kernel_size": 3, "dilation": 2, "stride": 2, "is_causal": True}),
        Sample("3-D", operands(make, 2, 1, 1, (2, 2, 3), 2, 1), {"grid": (2, 2, 3), "kernel_size": (1, 2, 2)}),
    ]


def sized(make: Maker, n: int) -> Sample:
    grid = (n, n + 1)
    return Sample(f"n={n}", operands(make, 2, 2, 1, grid, 16, 8), {"grid": grid, "kernel_size": (4, 3), "dilation": (1, 2), "stride": 2, "is_causal": (True, False)})


def degenerate(make: Maker) -> list[Sample]:
    found = []
    for name, (q, k, v) in degenerate_zoo(make, 3).items():
        if name not in NOT_FINITE and name not in ("huge", "tiny"):  # a logit of 1e60 is no number
            found.append(Sample(name, (q[None, None], k[None, None], v[None, None]), {"grid": (len(q),), "kernel_size": 3}))
    return found


def bad_inputs(make: Maker) -> list[BadInput]:
    q, k, v = operands(make, 2, 4, 2, (4, 5), 8, 3)

    def bad(name: str, error: type[Exception], message: str, *args: object, **options: object) -> BadInput:
        return BadInput(Sample(name, args or (q, k, v), {"grid": (4, 5), "kernel_size": 3, **options}), error, "neighborhood_attention: " + message)

    return [
        bad("a list", TypeError, r"query must be a tensor \[B, H, N, D\], got list", [1.0], k, v),
        bad("mixed dtypes", TypeError, "value must have query's dtype torch.float32, got torch.float64", q, k, v.double()),
        bad("heads", ValueError, "key must have heads that divide the query's 4, got 3", q, make.randn(2, 3, 20, 8), make.randn(2, 3, 20, 3)),
        bad("another number of tokens", ValueError, r"query must have the N = 24 tokens of the grid \[4, 6\], got 20", grid=(4, 6)),
        bad("other keys", ValueError, r"key must have the N = 20 tokens of the grid \[4, 5\], got 19", q, k[:, :, 1:], v[:, :, 1:]),
        bad("no grid", ValueError, "grid must have the sizes of one to three dimensions, got 20", grid=20),
        bad("four dimensions", ValueError, "grid must have the sizes of one to three dimensions", grid=(1, 1, 4, 5)),
        bad("kernel of another rank", ValueError, r"kernel_size must be one for each of 2 dimensions, or one for all, got \(3, 3, 3\)", kernel_size=(3, 3, 3)),
        bad("kernel beyond the grid", ValueError, r"kernel_size \* dilation must be at most the size of the grid, got 5 \* 1 for 4", kernel_size=5),
        bad("dilation beyond the grid", ValueError, r"kernel_size \* dilation must be at most the size of the grid, got 2 \* 3 for 4", kernel_size=2, dilation=3),
        bad("stride beyond the kernel", ValueError, "stride must be at most kernel_size, got 4 for 3", stride=4),
        bad("no kernel", ValueError, "kernel_size must be 1 or more, got 0", kernel_size=(0, 3)),
        bad("half a kernel", TypeError, "kernel_size must be a whole number, got 1.5", kernel_size=1.5),
        bad("dilation", ValueError, "dilation must be 1 or more, got 0", dilation=(1, 0)),
        bad("causal", TypeError, "is_causal must be True or False, got 1", is_causal=1),
        bad("scale", TypeError, "scale must be a number, got str", scale="1"),
        bad("return_lse", TypeError, "return_lse must be True or False", return_lse=1),
    ]


NEIGHBORHOOD_ATTENTION = replace(
    MASKED_ATTENTION,
    name="neighborhood_attention",
    call=ops.neighborhood_attention,
    reference=reference_neighborhood_attention,
    formula=reference_neighborhood_attention,
    samples=samples,
    tiny=tiny,
    sized=sized,
    degenerate=degenerate,
    empty=lambda make: [(Sample("no items", operands(make, 0, 4, 2, (4, 5), 4, 3), {"grid": (4, 5), "kernel_size": 3}), (0, 4, 20, 3))],
    raw=None,
    bad_inputs=bad_inputs,
    refusal="masked_attention",
)

NEIGHBORHOOD_ATTENTION_LSE = replace(
    NEIGHBORHOOD_ATTENTION,
    label="neighborhood_attention_lse",
    call=with_lse(ops.neighborhood_attention),
    reference=with_lse(reference_neighborhood_attention),
    formula=with_lse(reference_neighborhood_attention),
    samples=lambda make: samples(make)[3:6],
    empty=None,
    bad_inputs=None,
    dtypes=(torch.float32, torch.float64),
)

NEIGHBORHOODS = [NEIGHBORHOOD_ATTENTION, NEIGHBORHOOD_ATTENTION_LSE]
