"""The entry of virtual_unmerge_attention in `cases.py`. Identities are in test_virtual_unmerge_attention.py."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attention_cases import MASKED_ATTENTION
from modalign import masks, ops
from modalign.ops.virtual_unmerge_attention import reference_virtual_unmerge_attention
from modalign.testing import NOT_FINITE, BadInput, Maker, Sample, degenerate_zoo


def operands(make: Maker, B: int, H: int, Hkv: int, Nu: int, D: int, Dv: int) -> tuple[Tensor, Tensor, Tensor]:
    return make.randn(B, H, Nu, D), make.randn(B, Hkv, Nu, D), make.randn(B, Hkv, Nu, Dv)


def draw_map(make: Maker, N: int, Nu: int, text: int = 0) -> Tensor:
    """Every merged token once, the rest anywhere; the last `text` virtual tokens are the last merged ones, one each."""
    visual = Nu - text
    groups = torch.cat([torch.arange(visual), (make.randn(N - Nu).double().abs() * 1e6).long().cpu() % max(1, visual)])
    order = make.randn(N - text).double().cpu().argsort()
    return torch.cat([groups[order], torch.arange(visual, Nu)]).to(make.device)


def maps(make: Maker, lengths: list[int], merged: list[int]) -> Tensor:
    """[B, N] of items with other numbers of tokens, padded behind and, in the last item, in front."""
    N = max(lengths) + 3
    found = torch.full((len(lengths), N), -1, device=make.device)
    for b, (length, Nu) in enumerate(zip(lengths, merged, strict=True)):
        first = N - length if b == len(lengths) - 1 else 0
        found[b, first : first + length] = draw_map(make, length, Nu)
    return found


def samples(make: Maker) -> list[Sample]:
    def positions(*shape: int) -> Tensor:
        return (make.randn(*shape).double() * 100).round().long()

    cu = torch.tensor([0, 40, 40, 97, 130], dtype=torch.int32, device=make.device)
    spans = masks.layout([("prefix", 5), ("visual", (8, 12)), ("question", 29)]).to(make.device)
    return [
        Sample("pictures and text", (*operands(make, 2, 2, 2, 60, 16, 8), draw_map(make, 130, 60, 20))),
        Sample("both ways", (*operands(make, 1, 4, 2, 30, 24, 12), draw_map(make, 110, 30)), {"causal": False, "scale": 0.3}),
        Sample("positions", (*operands(make, 2, 2, 1, 40, 16, 16), draw_map(make, 70, 40)), {"positions": positions(2, 70), "theta": 100.0}),
        Sample("items of their own", (*operands(make, 3, 2, 2, 20, 8, 8), maps(make, [60, 25, 40], [20, 17, 20]))),
        Sample("packed", (*operands(make, 2, 2, 2, 50, 8, 8), draw_map(make, 130, 50)), {"cu_seqlens": cu}),
        Sample("a mask of pairs", (*operands(make, 1, 2, 2, 30, 8, 8), draw_map(make, 50, 30)), {"mask": make.mask(2, 50, 50), "causal": False}),
        Sample("a mask by rules", (*operands(make, 2, 2, 2, 90, 8, 8), draw_map(make, 130, 90)), {"mask": masks.modality_mutual(spans), "causal": False, "cu_seqlens": cu}),
        Sample("tables", (*operands(make, 1, 2, 2, 30, 8, 8), draw_map(make, 50, 30)), {"rotary": (make.randn(50, 4), make.randn(50, 4))}),
    ]


def tiny(make: Maker) -> list[Sample]:
    g = torch.tensor([0, 2, 2, 1, 0], device=make.device)
    padded = torch.tensor([[0, 2, 2, 1, 0], [-1, 0, 1, 1, -1]], device=make.device)  # the second names no token 2
    return [
        Sample("causal", (*operands(make, 1, 2, 1, 3, 4, 2), g)),
        Sample("padded", (*operands(make, 2, 2, 2, 3, 2, 2), padded), {"causal": False, "theta": 3.0}),
        Sample("tables", (*operands(make, 1, 1, 1, 3, 4, 2), g), {"rotary": (make.randn(1, 5, 2), make.randn(1, 5, 2))}),
    ]


def sized(make: Maker, n: int) -> Sample:
    return Sample(f"n={n}", (*operands(make, 2, 4, 2, n, 16, 8), draw_map(make, 2 * n + 3, n, 2)))


def degenerate(make: Maker) -> list[Sample]:
    found = []
    for name, (q, k, v) in degenerate_zoo(make, 3).items():
        if name not in NOT_FINITE and name not in ("huge", "tiny"):  # a logit of 1e60 is no number
            found.append(Sample(name, (q[None, None], k[None, None], v[None, None], torch.arange(2 * len(q), device=make.device) % len(q))))
    q, k, v = operands(make, 1, 2, 1, 3, 4, 4)
    g = torch.tensor([0, 1, 2, 2], device=make.device)
    found += [
        Sample("nothing is kept", (q, k, v, g), {"mask": torch.zeros(4, 4, dtype=torch.bool, device=make.device)}),
        Sample("padding alone", (q, k, v, torch.full((1, 4), -1, device=make.device))),
        Sample("far positions", (q, k, v, g), {"positions": torch.tensor([0.0, 1e9, -1e9, 0.5], dtype=torch.float64, device=make.device).long()}),
    ]
    return found


def empty(make: Maker) -> list[tuple[Sample, tuple[int, ...]]]:
    def no(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=make.device)

    return [
        (Sample("no tokens", (*operands(make, 2, 4, 2, 0, 4, 3), no(0))), (2, 4, 0, 3)),
        (Sample("no merged tokens, padding", (*operands(make, 2, 4, 2, 0, 4, 3), no(2, 3) - 1)), (2, 4, 0, 3)),
        (Sample("no virtual tokens", (*operands(make, 2, 4, 2, 5, 4, 3), no(2, 0))), (2, 4, 5, 3)),
        (Sample("no items", (*operands(make, 0, 4, 2, 5, 4, 3), torch.arange(5, device=make.device))), (0, 4, 5, 3)),
    ]


def raw(make: Maker) -> list[tuple[object, tuple[object, ...]]]:
    ops_ = torch.ops.modalign
    x, virtual = make.randn(2, 3, 4, 5), make.randn(2, 3, 6, 5)
    shared, own = torch.tensor([[0, 1, 3, 3, 2, 0]], device=make.device), torch.tensor([[0, 1, 3, 3, 2, 0], [-1, 0, 1, 1, -1, -1]], device=make.device)
    found: list[tuple[object, tuple[object, ...]]] = [(ops_.virtual_tokens.default, (shared, torch.tensor([0, 2, 6], dtype=torch.int32, device=make.device), 4, True))]
    for g in (shared, own):
        found += [
            (ops_.virtual_tokens.default, (g, None, 4, False)),
            (ops_.virtual_unmerge.default, (x.clone().requires_grad_(), g)),
            (ops_.virtual_unmerge_bwd.default, (virtual, g, 4)),
            (ops_.virtual_merge.default, (virtual.clone().requires_grad_(), g, 4)),
            (ops_.virtual_merge_bwd.default, (x, g)),
        ]
    return found


def bad_inputs(make: Maker) -> list[BadInput]:
    q, k, v = operands(make, 2, 4, 2, 3, 8, 5)
    g = torch.tensor([0, 1, 2, 2, 0], device=make.device)
    table = make.randn(5, 4)

    def bad(name: str, error: type[Exception], message: str, *args: object, **options: object) -> BadInput:
        return BadInput(Sample(name, args or (q, k, v, g), options), error, "virtual_unmerge_attention: " + message)

    return [
        bad("a list", TypeError, r"query must be a tensor \[B, H, N, D\], got list", [1.0], k, v, g),
        bad("mixed dtypes", TypeError, "value must have query's dtype torch.float32, got torch.float64", q, k, v.double(), g),
        bad("odd width", ValueError, "query must have an even width D", q[..., :7], k[..., :7], v, g),
        bad("other keys", ValueError, "key must have query's Nu = 3 tokens", q, k[:, :, 1:], v[:, :, 1:], g),
        bad("map as a list", TypeError, r"index_map must be an int64 tensor \[N\] or \[2, N\], got list", q, k, v, [0, 1, 2]),
        bad("int32 map", TypeError, "index_map must be an int64 tensor", q, k, v, g.int()),
        bad("map of other items", ValueError, r"index_map must have shape \[N\] or \[2, N\] on cpu", q, k, v, g.expand(3, 5)),
        bad("map elsewhere", ValueError, "index_map must have shape", q, k, v, g.to("meta")),
        bad("index beyond Nu", RuntimeError, "index_map must be from 0 to Nu - 1 = 2, or -1 for padding in a map .B, N., got 3", q, k, v, g + 1),
        bad("padding in a shared map", RuntimeError, "index_map must be from 0 to Nu - 1 = 2.* got -1", q, k, v, torch.cat([g, g[:1] - 1])),
        bad("an unnamed token", RuntimeError, "index_map must name every merged token, got none for 1", q, k, v, g[[0, 2, 3]]),
        bad("positions of another length", ValueError, r"positions must have shape \[5\] or \[2, 5\]", positions=torch.arange(4)),
        bad("positions as a list", TypeError, "positions must be a tensor of numbers, got list", positions=[0, 1, 2, 3, 4]),
        bad("theta", ValueError, "theta must be finite and above 0, got 0", theta=0),
        bad("theta", TypeError, "theta must be a number, got str", theta="1"),
        bad("angles twice", ValueError, "rotary must not be given together with positions or theta", rotary=(table, table), theta=3.0),
        bad("one table", TypeError, r"rotary must be two tensors \(cos, sin\)", rotary=table),
        bad("tables of width D", ValueError, r"rotary must have shape \[5, 4\] or \[2, 5, 4\]", rotary=(make.randn(5, 8), make.randn(5, 8))),
        bad("whole numbers as tables", TypeError, "rotary must be two floating-point tensors", rotary=(table.long(), table)),
        bad("causal", TypeError, "causal must be True or False", causal="top_left"),
        bad("mask of merged tokens", ValueError, r"mask must broadcast to \[B, H, Nq, Nk\] = \[2, 4, 5, 5\]", mask=make.mask(3, 3)),
        bad("mask by rules of merged tokens", ValueError, "mask must be of 5 queries and 5 keys", mask=masks.causal(3)),
        bad("cu_seqlens", TypeError, "cu_seqlens must be an int32 tensor", cu_seqlens=torch.tensor([0, 5])),
        bad("cu_seqlens", ValueError, r"cu_seqlens must have shape \[sequences \+ 1\]", cu_seqlens=torch.zeros(1, 2, dtype=torch.int32)),
        bad("cu_seqlens that end early", RuntimeError, "cu_seqlens must rise from 0 to N = 5", cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)),
        bad("cu_seqlens that fall", RuntimeError, "cu_seqlens must rise from 0 to N = 5", cu_seqlens=torch.tensor([0, 4, 3, 5], dtype=torch.int32)),
        bad("scale", ValueError, "scale must be finite, got inf", scale=float("inf")),
    ]


VIRTUAL_UNMERGE_ATTENTION = replace(
    MASKED_ATTENTION,
    name="virtual_unmerge_attention",
    call=ops.virtual_unmerge_attention,
    reference=reference_virtual_unmerge_attention,
    formula=reference_virtual_unmerge_attention,
    samples=samples,
    tiny=tiny,
    sized=sized,
    degenerate=degenerate,
    empty=empty,
    raw=raw,
    bad_inputs=bad_inputs,
    refusal="(virtual_unmerge|masked)_attention",  # of a gradient to the tables of angles alone
)
