"""The entry of dynamic_mask_attention in `cases.py`. The choice itself and its identities are in test_dynamic_mask_attention.py."""

from __future__ import annotations

from dataclasses import replace

import torch

from attention_cases import MASKED_ATTENTION, operands
from modalign import ops
from modalign.ops.dynamic_mask_attention import reference_dynamic_mask_attention
from modalign.testing import BadInput, Maker, Sample


def samples(make: Maker) -> list[Sample]:
    def call(name: str, B: int, H: int, Hkv: int, Nq: int, Nk: int, D: int, Dv: int, bias: tuple[int, ...], keep: int, **options: object) -> Sample:
        return Sample(name, (*operands(make, B, H, Hkv, Nq, Nk, D, Dv), make.randn(*bias), keep), options)

    padded = make.randn(2, 2, 1, 130).masked_fill(make.mask(2, 2, 1, 130, probability=0.3), -torch.inf)
    return [
        call("small", 1, 1, 1, 3, 4, 8, 8, (1, 1, 1, 4), 2),
        call("gathered", 2, 4, 2, 300, 300, 24, 24, (2, 2, 1, 300), 7),
        call("gathered, heads of their own", 1, 4, 1, 200, 290, 20, 12, (1, 4, 1, 290), 5),
        call("all are kept", 1, 2, 2, 50, 60, 16, 16, (1, 2, 1, 60), 60),
        call("global", 2, 2, 2, 110, 130, 16, 16, (2, 2, 1, 130), 20, scope="global"),
        call("not causal", 2, 2, 2, 110, 130, 16, 16, (2, 2, 1, 130), 20, causal=False),
        call("more queries than keys", 1, 2, 1, 130, 50, 16, 16, (1, 1, 1, 50), 9, scale=0.3),
        # Gradients of single pairs: a few are 20 times the RMS, and as much more wrong where they are rounded to half types.
        replace(call("scores of every query", 2, 2, 2, 70, 101, 16, 16, (2, 2, 70, 101), 13), slack=2),
        Sample("padding", (*operands(make, 2, 4, 2, 130, 130, 16, 16), padded, 20)),
    ]


def tiny(make: Maker) -> list[Sample]:
    return [
        Sample("scores of keys", (*operands(make, 1, 2, 1, 4, 5, 3, 2), make.randn(1, 1, 1, 5), 2)),
        Sample("scores of every query", (*operands(make, 2, 2, 2, 3, 3, 2, 2), make.randn(2, 2, 3, 3), 2)),
        Sample("not causal", (*operands(make, 1, 2, 2, 3, 4, 2, 3), make.randn(1, 2, 1, 4), 2), {"causal": False}),
    ]


def raw(make: Maker) -> list[tuple[object, tuple[object, ...]]]:
    ends, kept = (getattr(torch.ops.modalign, name).default for name in ("dynamic_mask_ends", "dynamic_mask_kept"))
    return [(ends, (make.randn(2, 3, 40).float(), 5)), (kept, (make.randn(1, 2, 7, 9).float(), 3, True)), (kept, (make.randn(1, 2, 7, 9).double(), 20, False))]


def bad_inputs(make: Maker) -> list[BadInput]:
    q, k, v = operands(make, 2, 4, 2, 5, 6, 8, 3)
    bias = make.randn(2, 2, 1, 6)

    def bad(name: str, error: type[Exception], message: str, *args: object, **options: object) -> BadInput:
        return BadInput(Sample(name, args, options), error, message)

    return [
        bad("keep", ValueError, "dynamic_mask_attention: keep must be a whole number of 1 or more, got int 0", q, k, v, bias, 0),
        bad("keep", ValueError, "dynamic_mask_attention: keep must be a whole number of 1 or more, got float", q, k, v, bias, 2.0),
        bad("scope", ValueError, 'dynamic_mask_attention: scope must be "causal" or "global", got', q, k, v, bias, 2, scope="row"),
        bad("causal", TypeError, "dynamic_mask_attention: causal must be True or False, got", q, k, v, bias, 2, causal="top_left"),
        bad("no bias", TypeError, "dynamic_mask_attention: bias must be a floating-point tensor", q, k, v, None, 2),
        bad("bias of another size", ValueError, "dynamic_mask_attention: bias must broadcast to", q, k, v, make.randn(3, 1, 6), 2),
        bad("bias without columns", ValueError, "dynamic_mask_attention: bias must have as many columns as there are keys, 6", q, k, v, make.randn(2, 2, 1, 1), 2),
    ]


DYNAMIC_MASK_ATTENTION = replace(
    MASKED_ATTENTION,
    name="dynamic_mask_attention",
    call=ops.dynamic_mask_attention,
    reference=reference_dynamic_mask_attention,
    formula=reference_dynamic_mask_attention,
    samples=samples,
    tiny=tiny,
    sized=lambda make, n: Sample(f"n={n}", (*operands(make, 2, 4, 2, n, n + 3, 16, 8), make.randn(2, 2, 1, n + 3), 3)),
    degenerate=None,
    empty=lambda make: [
        (Sample("no queries", (*operands(make, 2, 4, 2, 0, 5, 4, 3), make.randn(2, 2, 1, 5), 2)), (2, 4, 0, 3)),
        (Sample("no keys", (*operands(make, 2, 4, 2, 5, 0, 4, 3), make.randn(2, 2, 1, 0), 2)), (2, 4, 5, 3)),
        (Sample("no items", (*operands(make, 0, 4, 2, 5, 6, 4, 3), make.randn(0, 2, 1, 6), 2)), (0, 4, 5, 3)),
    ],
    raw=raw,
    bad_inputs=bad_inputs,
    refusal="masked_attention",
)
