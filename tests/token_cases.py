"""The entry of merge_tokens in `cases.py`. The battery looks at merged tokens, which are compared by their own first elements; the tests of the op look at who joins whom."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from modalign import ops
from modalign.ops.merge_tokens import formula_merge_tokens, reference_merge_tokens
from modalign.testing import BadInput, Maker, OpCase, Sample


def tokens_of(function: Callable[..., ops.MergedTokens]) -> Callable[..., Tensor]:
    """Of tokens that are compared by themselves: features have no gradient, and none is asked for."""

    @wraps(function)
    def call(x: Tensor, r: int, width: int = 8, **options: object) -> Tensor:
        return function(x, x.detach()[..., :width], r, **options).tokens

    return call


def samples(make: Maker) -> list[Sample]:
    def sizes(B: int, N: int) -> Tensor:
        return make.place(torch.arange(B * N).reshape(B, N) % 7 + 1)

    return [
        Sample("even", (make.randn(2, 20, 24), 7)),
        Sample("odd, sizes, class token", (make.randn(3, 37, 40), 9), {"size": sizes(3, 37), "protected": 1}),
        Sample("all that can", (make.randn(2, 50, 16), 25), slack=2),  # some means are twice the RMS, and rounded to a half type as such
        Sample("r beyond the cap, distilled", (make.randn(1, 31, 16), 40), {"protected": 2}),
        Sample("none", (make.randn(2, 9, 12), 0)),
        Sample("several tiles", (make.randn(1, 700, 12), 200), {"width": 12}),
    ]


def tiny(make: Maker) -> list[Sample]:
    return [
        Sample("one item", (make.randn(1, 6, 3), 2), {"width": 2}),
        Sample("sizes", (make.randn(2, 5, 2), 2), {"width": 2, "size": make.place(torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])), "protected": 1}),
    ]


def sized(make: Maker, n: int) -> Sample:
    return Sample(f"n={n}", (make.randn(2, n + 3, 20), 3))


def degenerate(make: Maker) -> list[Sample]:
    same = make.randn(1, 1, 8).expand(2, 9, 8).contiguous()
    zeros = torch.zeros_like(same)
    mixed = make.randn(2, 9, 8)
    mixed[:, 3] = 0
    return [
        Sample("all equal", (same, 4)),
        Sample("zeros", (zeros, 3)),
        Sample("a zero vector", (mixed, 3)),
        Sample("sizes of 0", (mixed, 4), {"size": make.place(torch.zeros(2, 9, dtype=torch.int64))}),
        Sample("one token", (make.randn(2, 1, 8), 3)),
    ]


def empty(make: Maker) -> list[tuple[Sample, tuple[int, ...]]]:
    return [
        (Sample("no items", (make.randn(0, 6, 8), 2)), (0, 4, 8)),
        (Sample("no tokens", (make.randn(2, 0, 8), 2)), (2, 0, 8)),
    ]


def raw(make: Maker) -> list[tuple[object, tuple[object, ...]]]:
    match, reduce, spread = (getattr(torch.ops.modalign, name).default for name in ("match_tokens", "reduce_groups", "spread_groups"))
    features = make.randn(2, 7, 5)
    packed = torch.tensor([0, 3, 3, 14], dtype=torch.int32, device=make.device)
    members, offsets = torch.tensor([2, 0, 1, 3], dtype=torch.int32, device=make.device), torch.tensor([0, 1, 1, 4], dtype=torch.int32, device=make.device)
    x, y = make.randn(4, 6).requires_grad_(), make.randn(3, 6).requires_grad_()
    weight = torch.rand(4, dtype=torch.float64 if make.dtype is torch.float64 else torch.float32).to(make.device)
    found: list[tuple[object, tuple[object, ...]]] = [(match, (features, None, 0, 1, -1, 2, None, False)), (match, (features.reshape(1, 14, 5), packed, 11, 0, 3, 4, 0.1, True))]
    found += [(reduce, (x, members, offsets, weight, mode)) for mode in range(3)] + [(reduce, (x, members, offsets, None, 1))]
    return found + [(spread, (y, members, offsets, weight, mode)) for mode in range(2)]


def bad_inputs(make: Maker) -> list[BadInput]:
    x = make.randn(2, 6, 8)

    def bad(args: tuple[object, ...], error: type[Exception], message: str, **options: object) -> BadInput:
        return BadInput(Sample(message, args, options), error, message)

    return [
        bad((x, 1.5), TypeError, r"match_tokens: r must be a whole number, got float 1\.5"),
        bad((x, None), TypeError, r"match_tokens: r must be a whole number unless there is a threshold, got None"),
        bad((x, -1), ValueError, r"match_tokens: r must be 0 or more, got -1"),
        bad((x, 2), ValueError, r"match_tokens: protected must be 0 or more, got -2", protected=-2),
        bad((x, 2), ValueError, r"match_tokens: protected must be 0 where sources are told, got 1", protected=1, sources=3),
        bad((x, 2), ValueError, r"match_tokens: sources must be 0 or more, got -3", sources=-3),
        bad((x, 2), TypeError, r"match_tokens: keep_order must be True or False, got int 1", keep_order=1),
        bad((x[0], 2), ValueError, r"match_tokens: features must have 3 or more dimensions \[B, N, D\], got .*|match_tokens: features must have shape .*"),
        bad((x, 2), TypeError, r"match_tokens: threshold must be None or a number, got float nan", threshold=float("nan")),
        bad((x, 2), ValueError, r"TokenMatch\.merge: size must have shape \[2, 6\] or \[2, 6, 1\] on .*, got .*", size=torch.ones(2, 5, device=make.device)),
        bad((x, 2), TypeError, r"TokenMatch\.merge: size must be a tensor of numbers \[2, 6\], got int 3", size=3),
        bad((x, 2), ValueError, r"match_tokens: longest must be None unless there are cu_seqlens, got 4", longest=4),
    ]


MERGE_TOKENS = OpCase(
    name="merge_tokens",
    call=tokens_of(ops.merge_tokens),
    reference=tokens_of(reference_merge_tokens),
    formula=tokens_of(formula_merge_tokens),
    samples=samples,
    tiny=tiny,
    sized=sized,
    degenerate=degenerate,
    empty=empty,
    raw=raw,
    bad_inputs=bad_inputs,
    refusal="TokenMatch.merge",
    double_backward=True,
    autocast=torch.bfloat16,  # as it came: sums are made in float32 anyway
)
