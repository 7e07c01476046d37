"""The entries in `cases.py` of the ops that read attention's probabilities. Identities are in test_attention_scores.py."""

from __future__ import annotations

from dataclasses import replace

import torch

import attention_cases
from modalign import masks, ops
from modalign.ops.attention_column_sum import reference_attention_column_sum
from modalign.ops.attention_columns import reference_attention_columns
from modalign.ops.attention_power_iteration import reference_attention_power_iteration
from modalign.ops.attention_rows import reference_attention_rows
from modalign.ops.attention_segment_mass import reference_attention_segment_mass
from modalign.testing import BadInput, Maker, OpCase, Sample


def operands(make: Maker, B: int, H: int, Hkv: int, Nq: int, Nk: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    return make.randn(B, H, Nq, D), make.randn(B, Hkv, Nk, D)


def indices(make: Maker, *shape: int, low: int = 0, high: int) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()) * 7 % (high - low) + low).view(shape).to(make.device)


def common(make: Maker, extra) -> list[Sample]:  # type: ignore[no-untyped-def]
    """Calls under every kind of option; extra(B, Nq, Nk): the arguments between key and options."""

    def call(name: str, B: int, H: int, Hkv: int, Nq: int, Nk: int, D: int, **options: object) -> Sample:
        return Sample(name, (*operands(make, B, H, Hkv, Nq, Nk, D), *extra(B, Nq, Nk)), options)

    bias = make.randn(2, 2, 30, 101).masked_fill(make.mask(2, 2, 30, 101, probability=0.2), -torch.inf)
    tokens = masks.layout([("prefix", 9), ("visual", (6, 10)), ("question", 31)]).to(make.device)
    return [
        call("small", 1, 1, 1, 3, 4, 8),
        call("several tiles, groups", 2, 4, 2, 130, 201, 24),
        call("causal", 1, 4, 1, 100, 130, 33, causal=True),
        call("top left, lengths", 2, 2, 2, 70, 110, 16, causal="top_left", key_lengths=torch.tensor([70, 0], device=make.device)),
        call("a published mask", 2, 2, 1, 100, 100, 16, mask=masks.modality_mutual(tokens)),
        call("mask of pairs", 2, 2, 2, 99, 101, 16, mask=make.mask(2, 2, 99, 101)),
        # Gradients of single pairs: a few are 20 times the RMS, and as much more wrong where they are rounded to half types.
        replace(call("bias of pairs", 2, 2, 2, 30, 101, 16, bias=bias), slack=2),
        call("bias of keys, soft-cap", 2, 4, 2, 30, 110, 16, bias=make.randn(2, 2, 1, 110), softcap=3.0, scale=1.0),
    ]


def common_tiny(make: Maker, extra) -> list[Sample]:  # type: ignore[no-untyped-def]
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool, device=make.device)
    return [
        Sample("mask", (*operands(make, 1, 2, 1, 3, 4, 3), *extra(1, 3, 4)), {"mask": mask}),
        Sample("bias of pairs", (*operands(make, 2, 2, 2, 3, 3, 2), *extra(2, 3, 3)), {"bias": make.randn(3, 3)}),
        Sample("bias of keys, soft-cap", (*operands(make, 2, 2, 1, 3, 4, 2), *extra(2, 3, 4)), {"bias": make.randn(1, 1, 4), "softcap": 1.0, "causal": True}),
        Sample("bias of queries", (*operands(make, 1, 2, 2, 3, 4, 2), *extra(1, 3, 4)), {"bias": make.randn(2, 3, 1)}),
    ]


def common_degenerate(make: Maker, extra) -> list[Sample]:  # type: ignore[no-untyped-def]
    return [replace(each, args=(*each.args[:2], *extra(each.args[0].shape[0], each.args[0].shape[2], each.args[1].shape[2]))) for each in attention_cases.degenerate(make)]


def common_bad(op: str, make: Maker, *extra: object) -> list[BadInput]:
    q, k = operands(make, 2, 4, 2, 5, 6, 8)

    def bad(name: str, error: type[Exception], message: str, *args: object, **options: object) -> BadInput:
        return BadInput(Sample(name, (*args, *extra), options), error, f"{op}: {message}")

    return [
        bad("a list", TypeError, r"query must be a tensor \[B, H, N, D\], got list", [1.0], k),
        bad("heads", ValueError, "key must have heads that divide the query's 4, got 3", q, make.randn(2, 3, 6, 8)),
        bad("mask of another size", ValueError, "mask must broadcast to", q, k, mask=make.mask(6, 5)),
        bad("bias of another size", ValueError, "bias must broadcast to", q, k, bias=make.randn(3, 1, 6)),
        bad("causal", ValueError, 'causal must be False, True, "bottom_right" or "top_left", got str', q, k, causal="left"),
        bad("scale", ValueError, "scale must be finite, got inf", q, k, scale=float("inf")),
        bad("lengths", TypeError, r"key_lengths must be an int64 tensor \[2\]", q, k, key_lengths=[1, 2]),
    ]


COMMON = OpCase(
    name="", call=lambda: None, reference=lambda: None, samples=lambda make: [], tiny=lambda make: [], sized=lambda make, n: Sample("", ()), accumulates=True,
    autocast_inputs=torch.bfloat16,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------------------------- column sums


def nothing(B: int, Nq: int, Nk: int) -> tuple[()]:
    return ()


def column_sum_samples(make: Maker) -> list[Sample]:
    weighted = [replace(each, name=f"{each.name}, weights", kwargs={**each.kwargs, "weights": make.randn(*each.args[0].shape[:3])}) for each in common(make, nothing)]
    q, k = operands(make, 2, 4, 2, 70, 110, 16)
    return [
        *common(make, nothing),
        *weighted,
        Sample("mean", (q, k), {"reduction": "mean", "weights": make.randn(2, 70).abs(), "causal": True}),
        Sample("visible mean", (q, k), {"reduction": "visible_mean", "mask": make.mask(70, 110, probability=0.1)}),
        *(Sample(f"{heads} over heads", (q, k), {"heads": heads}) for heads in ("sum", "mean", "max")),
    ]


def column_sum_tiny(make: Maker) -> list[Sample]:
    return [replace(each, kwargs={**each.kwargs, "weights": make.randn(*each.args[0].shape[:3:2])}) for each in common_tiny(make, nothing)]


def column_sum_raw(make: Maker) -> list[tuple[object, tuple[object, ...]]]:
    op, lse_of = torch.ops.modalign.attention_column_sum.default, torch.ops.modalign.masked_attention.default
    q, k = operands(make, 1, 2, 1, 5, 6, 4)
    found: list[tuple[object, tuple[object, ...]]] = []
    for mask, bias, lengths in ((([], []), None, None), (([make.mask(1, 1, 5, 6)], [3, 0, 0, 0]), make.randn(1, 2, 1, 6), torch.tensor([4], device=make.device))):
        rest = (1, 0.5, 0.0, *mask)
        lse = lse_of(q, k, k, bias, lengths, None, None, 0, 0, *rest)[1]
        found.append((op, (*(each.clone().requires_grad_() for each in (q, k)), lse, make.randn(1, 2, 5).requires_grad_(), bias, lengths, *rest, 0)))
    return found


def column_sum_bad(make: Maker) -> list[BadInput]:
    op, (q, k) = "attention_column_sum", operands(make, 2, 4, 2, 5, 6, 8)

    def bad(name: str, error: type[Exception], message: str, **options: object) -> BadInput:
        return BadInput(Sample(name, (q, k), options), error, f"{op}: {message}")

    return [
        *common_bad(op, make),
        bad("reduction", ValueError, "reduction must be one of sum, mean, visible_mean, square, max, got str 'median'", reduction="median"),
        bad("heads", ValueError, "heads must be one of none, sum, mean, max, got bool True", heads=True),
        bad("weights", ValueError, r"weights must have shape \[2, 5\] or \[2, 4, 5\]", weights=make.randn(2, 6)),
        bad("weights", TypeError, "weights must be a tensor of torch.float32, got a bool", weights=make.mask(2, 5)),
        bad("lse", TypeError, r"lse must be a torch.float32 tensor \[2, 4, 5\], got a float64", lse=torch.zeros(2, 4, 5, dtype=torch.float64)),
        bad("lse", ValueError, r"lse must have shape \[2, 4, 5\]", lse=make.randn(2, 4, 6)),
    ]


ATTENTION_COLUMN_SUM = replace(
    COMMON,
    name="attention_column_sum",
    call=ops.attention_column_sum,
    reference=reference_attention_column_sum,
    formula=reference_attention_column_sum,
    samples=column_sum_samples,
    tiny=column_sum_tiny,
    sized=lambda make, n: Sample(f"n={n}", operands(make, 2, 4, 2, n, n + 3, 16), {"mask": make.mask(n, n + 3), "bias": make.randn(2, 1, n + 3), "weights": make.randn(2, n)}),
    degenerate=lambda make: common_degenerate(make, nothing),
    empty=lambda make: [
        (Sample("no keys", operands(make, 2, 4, 2, 5, 0, 4)), (2, 4, 0)),
        (Sample("no items", operands(make, 0, 4, 2, 5, 6, 4)), (0, 4, 6)),
    ],
    raw=column_sum_raw,
    bad_inputs=column_sum_bad,
    refusal="(attention_column_sum|masked_attention)",
)


# -------------------------------------------------------------------------------------------------------------------------------- segments, columns


def segment_samples(make: Maker) -> list[Sample]:
    return [
        *common(make, lambda B, Nq, Nk: (indices(make, Nk, low=-1, high=5), 5)),
        Sample("segments of items", (*operands(make, 2, 2, 1, 20, 30, 8), indices(make, 2, 30, low=-1, high=20), 20)),
    ]


def segments_bad(make: Maker) -> list[BadInput]:
    op, (q, k), s = "attention_segment_mass", operands(make, 2, 4, 2, 5, 6, 8), indices(make, 6, high=2)
    return [
        *common_bad(op, make, s, 2),
        BadInput(Sample("int32", (q, k, s.int(), 2)), TypeError, rf"{op}: segments must be an int64 tensor \[Nk\] or \[B, Nk\]"),
        BadInput(Sample("another size", (q, k, s[:5], 2)), ValueError, rf"{op}: segments must have shape \[6\] or \[2, 6\]"),
        BadInput(Sample("beyond", (q, k, s, 1)), ValueError, f"{op}: segments must be from -1 to 0, got 0 to 1"),
        BadInput(Sample("none", (q, k, s, 0)), ValueError, f"{op}: num_segments must be 1 or more, got 0"),
        BadInput(Sample("a fraction", (q, k, s, 2.0)), TypeError, f"{op}: num_segments must be a whole number, got float 2.0"),
    ]


ATTENTION_SEGMENT_MASS = replace(
    COMMON,
    name="attention_segment_mass",
    call=ops.attention_segment_mass,
    reference=reference_attention_segment_mass,
    formula=reference_attention_segment_mass,
    samples=segment_samples,
    tiny=lambda make: common_tiny(make, lambda B, Nq, Nk: (indices(make, B, Nk, low=-1, high=2), 2)),
    sized=lambda make, n: Sample(f"n={n}", (*operands(make, 2, 4, 2, n, n + 3, 16), indices(make, n + 3, high=3), 3), {"mask": make.mask(n, n + 3), "bias": make.randn(2, 1, n + 3)}),
    degenerate=lambda make: common_degenerate(make, lambda B, Nq, Nk: (indices(make, Nk, high=2), 2)),
    empty=lambda make: [
        (Sample("no queries", (*operands(make, 2, 4, 2, 0, 5, 4), indices(make, 5, high=3), 3)), (2, 4, 0, 3)),
        (Sample("no keys", (*operands(make, 2, 4, 2, 5, 0, 4), indices(make, 0, high=3), 3)), (2, 4, 5, 3)),
    ],
    bad_inputs=segments_bad,
    refusal="masked_attention",
)


def columns_bad(make: Maker) -> list[BadInput]:
    op, (q, k), c = "attention_columns", operands(make, 2, 4, 2, 5, 6, 8), indices(make, 3, high=6)
    return [
        *common_bad(op, make, c),
        BadInput(Sample("a list", (q, k, [1])), TypeError, rf"{op}: columns must be an int64 tensor \[C\] or \[B, C\], got list"),
        BadInput(Sample("beyond", (q, k, c + 4)), ValueError, f"{op}: columns must be from 0 to 5, got 4 to 6"),
        BadInput(Sample("none", (q, k, c[:0])), ValueError, rf"{op}: columns must have shape \[C\] or \[2, C\], C of 1 or more"),
        BadInput(Sample("items", (q, k, c.expand(3, 3))), ValueError, rf"{op}: columns must have shape \[C\] or \[2, C\]"),
        BadInput(Sample("elsewhere", (q, k, c.to("meta"))), ValueError, f"{op}: columns must be on query's device"),
    ]


ATTENTION_COLUMNS = replace(
    ATTENTION_SEGMENT_MASS,
    name="attention_columns",
    call=ops.attention_columns,
    reference=reference_attention_columns,
    formula=reference_attention_columns,
    samples=lambda make: common(make, lambda B, Nq, Nk: (indices(make, B, 11, high=Nk),)),
    tiny=lambda make: common_tiny(make, lambda B, Nq, Nk: (indices(make, 2, high=Nk),)),
    sized=lambda make, n: Sample(f"n={n}", (*operands(make, 2, 4, 2, n, n + 3, 16), indices(make, 5, high=n)), {"mask": make.mask(n, n + 3), "bias": make.randn(2, 1, n + 3)}),
    degenerate=lambda make: common_degenerate(make, lambda B, Nq, Nk: (indices(make, 2, high=Nk),)),
    empty=lambda make: [(Sample("no queries", (*operands(make, 2, 4, 2, 0, 5, 4), indices(make, 3, high=5))), (2, 4, 0, 3))],
    bad_inputs=columns_bad,
)


# --------------------------------------------------------------------------------------------------------------------------------------------- rows


def rows_bad(make: Maker) -> list[BadInput]:
    op, (q, k), r = "attention_rows", operands(make, 2, 4, 2, 5, 6, 8), indices(make, 3, high=5)
    return [
        *common_bad(op, make, r),
        BadInput(Sample("an integer", (q, k, 3)), TypeError, rf"{op}: rows must be an int64 tensor \[R\], got int 3"),
        BadInput(Sample("from the end", (q, k, -r)), ValueError, f"{op}: rows must be from 0 to 4, got -"),
        BadInput(Sample("two dimensions", (q, k, r[None])), ValueError, rf"{op}: rows must have one dimension \[R\]"),
    ]


ATTENTION_ROWS = replace(
    COMMON,
    name="attention_rows",
    call=ops.attention_rows,
    reference=reference_attention_rows,
    formula=reference_attention_rows,
    samples=lambda make: common(make, lambda B, Nq, Nk: (indices(make, 4, high=Nq),)),
    tiny=lambda make: common_tiny(make, lambda B, Nq, Nk: (indices(make, 2, high=Nq),)),
    sized=lambda make, n: Sample(f"n={n}", (*operands(make, 2, 4, 2, n, n + 3, 16), indices(make, 5, high=n)), {"mask": make.mask(n, n + 3), "bias": make.randn(2, 1, n + 3)}),
    degenerate=lambda make: common_degenerate(make, lambda B, Nq, Nk: (indices(make, Nq, high=Nq),)),
    empty=lambda make: [
        (Sample("no rows", (*operands(make, 2, 4, 2, 5, 6, 4), indices(make, 0, high=5))), (2, 4, 0, 6)),
        (Sample("no keys", (*operands(make, 2, 4, 2, 5, 0, 4), indices(make, 2, high=5))), (2, 4, 2, 0)),
    ],
    bad_inputs=rows_bad,
    double_backward=True,
    jvp=True,
)


# ---------------------------------------------------------------------------------------------------------------------------------- power iteration


def power_samples(make: Maker) -> list[Sample]:
    q, k = operands(make, 2, 4, 2, 110, 110, 16)
    tokens = masks.layout([("prefix", 10), ("visual", (6, 10)), ("question", 40)]).to(make.device)
    # Five products one after the other, each with an error of its own.
    return [
        Sample("plain", (q, k), slack=3),
        Sample("causal, damping", (q, k), {"causal": True, "damping": 0.15, "iterations": 3}, slack=3),
        Sample("a published mask, start", (q, k), {"mask": masks.modality_mutual(tokens), "start": make.randn(2, 110).abs()}, slack=3),
        Sample("mask and bias", (q, k), {"mask": make.mask(2, 1, 110, 110), "bias": make.randn(2, 1, 1, 110), "start": make.randn(2, 4, 110), "iterations": 2}, slack=3),
    ]


def power_bad(make: Maker) -> list[BadInput]:
    op, (q, k) = "attention_power_iteration", operands(make, 2, 4, 2, 6, 6, 8)
    return [
        BadInput(Sample("heads", (q, make.randn(2, 3, 6, 8))), ValueError, f"{op}: key must have heads that divide the query's 4, got 3"),
        BadInput(Sample("other keys", (q, k[:, :, :5])), ValueError, f"{op}: key must have as many tokens as query, 6, got 5"),
        BadInput(Sample("iterations", (q, k), {"iterations": -1}), ValueError, f"{op}: iterations must be 0 or more, got -1"),
        BadInput(Sample("iterations", (q, k), {"iterations": True}), TypeError, f"{op}: iterations must be a whole number, got bool True"),
        BadInput(Sample("damping", (q, k), {"damping": 1.5}), ValueError, f"{op}: damping must be from 0 to 1, got 1.5"),
        BadInput(Sample("damping", (q, k), {"damping": None}), TypeError, f"{op}: damping must be a number, got NoneType"),
        BadInput(Sample("start", (q, k), {"start": make.randn(2, 5)}), ValueError, rf"{op}: start must have shape \[2, 6\] or \[2, 4, 6\]"),
    ]


ATTENTION_POWER_ITERATION = replace(
    COMMON,
    name="attention_power_iteration",
    call=ops.attention_power_iteration,
    reference=reference_attention_power_iteration,
    formula=reference_attention_power_iteration,
    samples=power_samples,
    tiny=lambda make: [
        Sample("causal", operands(make, 1, 2, 1, 3, 3, 2), {"causal": True, "iterations": 2, "damping": 0.2, "start": make.randn(1, 3)}),
        Sample("bias", operands(make, 2, 2, 2, 3, 3, 2), {"bias": make.randn(3, 3), "iterations": 3}),
    ],
    sized=lambda make, n: Sample(f"n={n}", operands(make, 2, 4, 2, n, n, 16), {"mask": make.mask(n, n), "bias": make.randn(2, 1, n), "start": make.randn(2, n), "iterations": 2}),
    degenerate=lambda make: [Sample("equal tokens", operands(make, 1, 2, 2, 1, 1, 4)), Sample("nothing is kept", operands(make, 1, 2, 1, 5, 5, 4), {"mask": make.mask(5, 5, probability=0.0)})],
    empty=lambda make: [(Sample("no tokens", operands(make, 2, 4, 2, 0, 0, 4)), (2, 4, 0))],
    bad_inputs=power_bad,
    refusal="(attention_column_sum|masked_attention)",
)

ATTENTION_SCORES = [ATTENTION_COLUMN_SUM, ATTENTION_SEGMENT_MASS, ATTENTION_COLUMNS, ATTENTION_ROWS, ATTENTION_POWER_ITERATION]
