"""The entry of segment_max_similarity in `cases.py`. The battery looks at values; the tests of the op look at indices."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from modalign import ops
from modalign.ops import SegmentMax
from modalign.ops.segment_max_similarity import formula_segment_max_similarity, reference_segment_max_similarity
from modalign.testing import NOT_FINITE, BadInput, Maker, OpCase, Sample, degenerate_zoo


def offsets_of(make: Maker, *lengths: int) -> Tensor:
    return make.place(torch.tensor([0, *lengths]).cumsum(0))


def uneven(make: Maker, S: int) -> Tensor:
    """S segments of 1 to 4 rows."""
    return offsets_of(make, *((5 * s + 2) % 4 + 1 for s in range(S)))


def samples(make: Maker) -> list[Sample]:
    def call(name: str, A: int, D: int, *lengths: int) -> Sample:
        return Sample(name, (make.unit(sum(lengths), D), offsets_of(make, *lengths), make.unit(A, D)))

    return [
        call("one row each", 11, 16, *[1] * 9),
        call("ragged", 37, 33, *[1, 7, 2, 30, 3, 1, 12] * 3),
        call("one segment", 19, 24, 50),
        call("segments over several tiles", 130, 40, 3, 210, 100, 1, 150),
        call("wide rows", 9, 300, 5, 2, 9),
        call("one candidate", 1, 20, 4, 11, 6),
        call("D = 1", 5, 1, 3, 4),
    ]


def tiny(make: Maker) -> list[Sample]:
    return [
        Sample("uneven", (make.randn(6, 4), offsets_of(make, 2, 1, 3), make.randn(3, 4))),
        Sample("one segment", (make.randn(5, 3), offsets_of(make, 5), make.randn(4, 3))),
    ]


def sized(make: Maker, n: int) -> Sample:
    offsets = uneven(make, n)
    return Sample(f"n={n}", (make.randn(int(offsets[-1]), n + 9), offsets, make.randn(n + 2, n + 9)))


def degenerate(make: Maker) -> list[Sample]:
    zoo = [(name, vectors[0], vectors[1]) for name, vectors in degenerate_zoo(make, 2).items() if name not in NOT_FINITE and name != "huge"]
    same = make.unit(1, 8).expand(6, 8).contiguous()
    zoo += [("all rows equal", same, same), ("zero rows", torch.zeros_like(same), make.unit(4, 8)), ("zero candidates", same, torch.zeros_like(same))]
    return [Sample(name, (x, offsets_of(make, 1, x.shape[0] - 1), y)) for name, x, y in zoo]


def empty(make: Maker) -> list[tuple[Sample, tuple[int, ...]]]:
    return [
        (Sample("no segments", (make.randn(0, 8), offsets_of(make), make.randn(3, 8))), (0, 3)),
        (Sample("no candidates", (make.randn(5, 8), offsets_of(make, 2, 3), make.randn(0, 8))), (2, 0)),
        (Sample("no rows", (make.randn(0, 8), offsets_of(make, 0, 0), make.randn(3, 8))), (2, 3)),
    ]


def raw(make: Maker) -> list[tuple[object, tuple[object, ...]]]:
    forward, backward = (getattr(torch.ops.modalign, name).default for name in ("segment_max_similarity", "segment_max_similarity_bwd"))
    x, offsets, y = make.randn(6, 12), offsets_of(make, 2, 0, 4), make.randn(5, 12)
    values, indices = forward(x, offsets, y)
    found: list[tuple[object, tuple[object, ...]]] = [(forward, (x.clone().requires_grad_(), offsets, y.clone().requires_grad_()))]
    for need in ((True, True), (True, False), (False, True), (False, False)):
        found.append((backward, (torch.ones_like(values), indices, x, offsets, y, *need)))
    return found


def bad_inputs(make: Maker) -> list[BadInput]:
    x, y, offsets = make.randn(4, 8), make.randn(3, 8), offsets_of(make, 1, 3)

    def bad(name: str, error: type[Exception], message: str, *args: object) -> BadInput:
        return BadInput(Sample(name, args), error, "segment_max_similarity: " + message)

    return [
        bad("x is a list", TypeError, r"x must be a tensor \[R, D\], got list", [1.0], offsets, y),
        bad("integer x", TypeError, "x must be float16, bfloat16, float32 or float64, got a int64 tensor", x.long(), offsets, y),
        bad("batched x", ValueError, r"x must have 2 dimensions \[R, D\], got a float32 tensor of shape \(1, 4, 8\)", x[None], offsets, y),
        bad("D = 0", ValueError, "x must have a last dimension D of 1 or more", x[:, :0], offsets, y[:, :0]),
        bad("one candidate vector", ValueError, r"y must have 2 dimensions \[A, D\], got a float32 tensor of shape \(8,\)", x, offsets, y[0]),
        bad("mixed dtypes", TypeError, "y must have x's dtype torch.float32, got torch.float64", x, offsets, y.double()),
        bad("mixed devices", ValueError, "y must be on x's device .*, got meta", x, offsets, y.to("meta")),
        bad("mixed widths", ValueError, r"y must have x's width D = 8, got a float32 tensor of shape \(3, 7\)", x, offsets, y[:, :7]),
        bad("offsets is a list", TypeError, r"offsets must be an int64 tensor \[S \+ 1\], got list", x, [0, 4], y),
        bad("offsets of another dtype", TypeError, "offsets must be an int64 tensor .* got a int32 tensor", x, offsets.int(), y),
        bad("a matrix of offsets", ValueError, r"offsets must have one dimension of 1 to 2\^31 - 1 entries, got a int64 tensor", x, offsets[None], y),
        bad("no offsets", ValueError, "offsets must have one dimension", x, offsets[:0], y),
        bad("offsets on another device", ValueError, "offsets must be on x's device .*, got meta", x, offsets.to("meta"), y),
        bad("offsets that begin late", RuntimeError, "offsets must rise from 0 to R = 4, got 1 at position 0", x, offsets[1:], y),
        bad("offsets that end early", RuntimeError, "offsets must rise from 0 to R = 4, got 1 at position 1", x, offsets[:2], y),
        bad("offsets beyond the rows", RuntimeError, "offsets must rise from 0 to R = 4, got 5 at position 1", x, offsets_of(make, 5), y),
        bad("falling offsets", RuntimeError, "offsets must rise from 0 to R = 4, got 2 at position 2", x, offsets_of(make, 3, -1, 2), y),
    ]


def values_of(function: Callable[..., SegmentMax]) -> Callable[..., Tensor]:
    @wraps(function)
    def values(x: Tensor, offsets: Tensor, y: Tensor) -> Tensor:
        return function(x, offsets, y).values

    return values


SEGMENT_MAX_SIMILARITY = OpCase(
    name="segment_max_similarity",
    call=values_of(ops.segment_max_similarity),
    reference=values_of(reference_segment_max_similarity),
    formula=values_of(formula_segment_max_similarity),
    samples=samples,
    tiny=tiny,
    sized=sized,
    degenerate=degenerate,
    empty=empty,
    raw=raw,
    bad_inputs=bad_inputs,
    double_backward=False,
    func_grad=True,
    vmap=True,
    jvp=False,
    autocast=torch.float32,
    compile=True,
    export=True,
    checkpoint=True,
    strided=True,
    deterministic=True,
)
