"""The entries of masked_attention in `cases.py`: the output, and the log-sum-exp as a result of its own. Identities are in test_masked_attention.py."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from modalign import masks, ops
from modalign.ops.masked_attention import reference_masked_attention
from modalign.testing import NOT_FINITE, BadInput, Maker, OpCase, Sample, degenerate_zoo

F = torch.float32


def operands(make: Maker, B: int, H: int, Hkv: int, Nq: int, Nk: int, D: int, Dv: int) -> tuple[Tensor, Tensor, Tensor]:
    return make.randn(B, H, Nq, D), make.randn(B, Hkv, Nk, D), make.randn(B, Hkv, Nk, Dv)


def samples(make: Maker) -> list[Sample]:
    def call(name: str, B: int, H: int, Hkv: int, Nq: int, Nk: int, D: int, Dv: int, **options: object) -> Sample:
        return Sample(name, operands(make, B, H, Hkv, Nq, Nk, D, Dv), options)

    def bias(*shape: int) -> Tensor:
        values = make.randn(*shape)
        return values.masked_fill(make.mask(*shape, probability=0.2), -torch.inf)

    lengths = torch.tensor([70, 0], device=make.device)
    return [
        call("small", 1, 1, 1, 3, 4, 8, 8),
        call("several tiles", 2, 2, 2, 130, 201, 24, 24),
        call("groups, widths", 2, 6, 2, 37, 41, 20, 12),
        call("one key head, causal", 1, 4, 1, 100, 130, 33, 7, causal=True),
        call("more queries than keys, causal", 2, 1, 1, 130, 50, 16, 16, causal="bottom_right"),
        call("top left", 1, 2, 2, 70, 110, 16, 16, causal="top_left"),
        call("lengths", 2, 2, 1, 40, 90, 16, 16, key_lengths=lengths),
        call("mask of pairs", 2, 2, 2, 99, 101, 16, 16, mask=make.mask(2, 2, 99, 101)),
        call("mask of keys, causal", 2, 4, 2, 60, 60, 16, 16, mask=make.mask(2, 1, 1, 60, probability=0.5), causal=True),
        call("mask of key heads", 1, 4, 2, 50, 60, 16, 16, mask=make.mask(1, 2, 50, 60)),
        call("few kept", 1, 2, 2, 100, 200, 16, 16, mask=make.mask(100, 200, probability=0.02)),
        call("bias of pairs", 2, 2, 2, 30, 101, 16, 16, bias=bias(2, 2, 30, 101)),
        call("bias of pairs, shared", 3, 4, 2, 30, 40, 16, 16, bias=bias(30, 40), causal=True),
        call("bias of keys", 2, 4, 2, 30, 110, 16, 16, bias=bias(2, 2, 1, 110)),
        call("bias of keys, shared", 2, 4, 2, 30, 40, 16, 16, bias=bias(40)),
        call("soft-cap", 2, 2, 2, 30, 40, 16, 16, softcap=3.0, scale=1.0, bias=bias(30, 40)),
        # Logits of 40: an error of 1e-6 of such a one is 4e-5 of its probability.
        replace(call("sharp", 1, 2, 2, 50, 60, 32, 8, scale=2.0), slack=20),
    ]


def tiny(make: Maker) -> list[Sample]:
    return [
        Sample("mask", operands(make, 1, 2, 1, 3, 4, 3, 2), {"mask": torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)}),
        Sample("bias of pairs", operands(make, 2, 2, 2, 3, 2, 2, 2), {"bias": make.randn(3, 2)}),
        Sample("bias of keys, soft-cap", operands(make, 2, 2, 1, 3, 4, 2, 3), {"bias": make.randn(1, 1, 4), "softcap": 1.0, "causal": True}),
        Sample("bias of queries", operands(make, 1, 2, 2, 3, 4, 2, 2), {"bias": make.randn(2, 3, 1)}),
        Sample("bias of heads", operands(make, 2, 4, 2, 2, 3, 2, 2), {"bias": make.randn(2, 1, 1), "scale": 0.4}),
    ]


def sized(make: Maker, n: int) -> Sample:
    return Sample(f"n={n}", operands(make, 2, 4, 2, n, n + 3, 16, 8), {"mask": make.mask(n, n + 3), "bias": make.randn(2, 1, n + 3)})


def degenerate(make: Maker) -> list[Sample]:
    found = []
    for name, vectors in degenerate_zoo(make, 3).items():
        if name in NOT_FINITE or name in ("huge", "tiny"):  # a logit of 1e60 is no number
            continue
        q, k, v = (each[None, None] for each in vectors)
        found.append(Sample(name, (q, k, v[:, :, : k.shape[2]] if v.shape[2] >= k.shape[2] else v.expand(1, 1, k.shape[2], -1).contiguous())))
    q, k, v = operands(make, 1, 2, 1, 5, 6, 4, 4)
    found += [
        Sample("nothing is kept", (q, k, v), {"mask": torch.zeros(5, 6, dtype=torch.bool, device=make.device)}),
        Sample("a bias that keeps nothing", (q, k, v), {"bias": torch.full((5, 6), -torch.inf, dtype=make.dtype, device=make.device)}),
        Sample("a row without a key", (q, k, v), {"causal": True, "mask": torch.arange(6, device=make.device) > 3}),
        Sample("large logits", (100 * q, 100 * k, v)),
    ]
    return found


def empty(make: Maker) -> list[tuple[Sample, tuple[int, ...]]]:
    return [
        (Sample("no queries", operands(make, 2, 4, 2, 0, 5, 4, 3)), (2, 4, 0, 3)),
        (Sample("no keys", operands(make, 2, 4, 2, 5, 0, 4, 3)), (2, 4, 5, 3)),
        (Sample("no items", operands(make, 0, 4, 2, 5, 6, 4, 3)), (0, 4, 5, 3)),
    ]


def raw(make: Maker) -> list[tuple[object, tuple[object, ...]]]:
    forward, backward = (getattr(torch.ops.modalign, name).default for name in ("masked_attention", "masked_attention_bwd"))
    q, k, v = operands(make, 1, 2, 1, 5, 6, 4, 3)
    found: list[tuple[object, tuple[object, ...]]] = []
    for mask, bias, lengths, need in (
        (([], []), None, None, False),
        (([make.mask(1, 1, 5, 6)], [3, 0, 0, 0]), make.randn(1, 2, 1, 6), torch.tensor([4], device=make.device), True),
        (([], []), make.randn(1, 1, 5, 6), None, True),
    ):
        rest = (bias, lengths, None, None, 5, 6, 1, 0.5, 0.0, *mask)
        out, lse = forward(q, k, v, *rest)
        found.append((forward, (*(each.clone().requires_grad_() for each in (q, k, v)), *rest)))
        found.append((backward, (torch.ones_like(out), torch.ones_like(lse), out, lse, q, k, v, *rest, need)))
    return found


def bad_inputs(make: Maker) -> list[BadInput]:
    q, k, v = operands(make, 2, 4, 2, 5, 6, 8, 3)

    def bad(name: str, error: type[Exception], message: str, *args: object, **options: object) -> BadInput:
        return BadInput(Sample(name, args, options), error, "masked_attention: " + message)

    return [
        bad("a list", TypeError, r"query must be a tensor \[B, H, N, D\], got list", [1.0], k, v),
        bad("integers", TypeError, "key must be float16, bfloat16, float32 or float64, got a int64 tensor", q, k.long(), v),
        bad("three dimensions", ValueError, r"query must have 4 .*dimensions \[B, H, N, D\]", q[0], k, v),
        bad("mixed dtypes", TypeError, "value must have query's dtype torch.float32, got torch.float64", q, k, v.double()),
        bad("mixed devices", ValueError, "key must be on query's device .*, got meta", q, k.to("meta"), v),
        bad("widths", ValueError, "key must have query's width D = 8", q, k[..., :7], v),
        bad("keys and values", ValueError, r"value must have key's shape but for its width, \[2, 2, 6\]", q, k, v[:, :, :5]),
        bad("items", ValueError, "key must have query's batch B = 2", q, k[:1], v[:1]),
        bad("heads", ValueError, "key must have heads that divide the query's 4, got 3", q, make.randn(2, 3, 6, 8), make.randn(2, 3, 6, 3)),
        bad("mask of numbers", TypeError, "mask must be a bool tensor, True where a pair is kept", q, k, v, torch.ones(5, 6)),
        bad("mask of another size", ValueError, r"mask must broadcast to \[B, H, Nq, Nk\] = \[2, 4, 5, 6\]", q, k, v, make.mask(6, 5)),
        bad("mask elsewhere", ValueError, "mask must be on query's device", q, k, v, make.mask(5, 6).to("meta")),
        bad("integer bias", TypeError, "bias must be a tensor of torch.float32, got a int64", q, k, v, bias=torch.zeros(5, 6, dtype=torch.int64)),
        bad("bias of another size", ValueError, "bias must broadcast to", q, k, v, bias=make.randn(3, 1, 6)),
        bad("causal", ValueError, 'causal must be False, True, "bottom_right" or "top_left", got str', q, k, v, causal="left"),
        bad("causal", ValueError, "causal must be False, True", q, k, v, causal=1),
        bad("scale", TypeError, "scale must be a number, got str", q, k, v, scale="1"),
        bad("scale", ValueError, "scale must be finite, got inf", q, k, v, scale=float("inf")),
        bad("softcap", ValueError, "softcap must be finite and 0 or more, got -1.0", q, k, v, softcap=-1.0),
        bad("lengths", TypeError, r"key_lengths must be an int64 tensor \[2\]", q, k, v, key_lengths=[1, 2]),
        bad("lengths", ValueError, r"key_lengths must have shape \[2\]", q, k, v, key_lengths=torch.tensor([1])),
        bad("return_lse", TypeError, "return_lse must be True or False", q, k, v, return_lse=1),
        bad("deterministic", TypeError, "deterministic must be True or False", q, k, v, deterministic=None),
    ]


MASKED_ATTENTION = OpCase(
    name="masked_attention",
    call=ops.masked_attention,
    reference=reference_masked_attention,
    formula=reference_masked_attention,
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
    autocast=torch.bfloat16,
    compile=True,
    export=True,
    checkpoint=True,
    strided=True,
    deterministic=True,
)


def with_lse(op):  # type: ignore[no-untyped-def]
    """lse beside the output, as one tensor of its dtype; rows that keep nothing, -inf, as 0."""

    @functools.wraps(op)
    def both(*args: Tensor, **options: object) -> Tensor:
        out, lse = op(*args, return_lse=True, **options)
        return torch.cat([out, torch.where(lse == -torch.inf, 0, lse)[..., None].to(out.dtype)], -1)

    return both


MASKED_ATTENTION_LSE = replace(
    MASKED_ATTENTION,
    label="masked_attention_lse",
    call=with_lse(ops.masked_attention),
    reference=with_lse(reference_masked_attention),
    formula=with_lse(reference_masked_attention),
    empty=None,
    raw=None,
    bad_inputs=None,
    dtypes=(torch.float32, torch.float64),
    samples=lambda make: [
        *samples(make),
        Sample("bias of queries", operands(make, 2, 4, 2, 30, 40, 16, 16), {"bias": make.randn(2, 2, 30, 1)}),  # these move lse, and nothing else
        Sample("bias of heads", operands(make, 2, 4, 4, 30, 40, 16, 16), {"bias": make.randn(4, 1, 1), "mask": make.mask(30, 40)}),
    ],
)


# ---------------------------------------------------------------------------------------------------------------------------- other ways to call it


def torch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def torch_samples(make: Maker) -> list[Sample]:
    q, k, v = make.randn(2, 4, 30, 16), make.randn(2, 4, 40, 16), make.randn(2, 4, 40, 8)
    bias = make.randn(4, 30, 40)
    return [
        Sample("plain", (q, k, v)),
        Sample("mask", (q, k, v), {"attn_mask": make.mask(2, 1, 30, 40) | (torch.arange(40, device=make.device) == 0)}),
        Sample("bias", (q, k, v), {"attn_mask": bias, "scale": 0.5}),
        Sample("causal", (q, k, v), {"is_causal": True}),
        Sample("groups", (q, k[:, :2], v[:, :2]), {"enable_gqa": True}),
        Sample("one head", (q[:, 0], k[:, 0], v[:, 0])),
    ]


def torch_sized(make: Maker, n: int) -> Sample:
    return Sample(f"n={n}", (make.randn(2, 4, n, 16), make.randn(2, 4, n + 3, 16), make.randn(2, 4, n + 3, 8)), {"is_causal": True})


SCALED_DOT_PRODUCT_ATTENTION = replace(
    MASKED_ATTENTION,
    name="scaled_dot_product_attention",
    call=ops.scaled_dot_product_attention,
    reference=torch_attention,
    formula=torch_attention,
    samples=torch_samples,
    tiny=lambda make: [Sample("bias", (make.randn(2, 3, 3), make.randn(2, 4, 3), make.randn(2, 4, 2)), {"attn_mask": make.randn(3, 4)})],
    sized=torch_sized,
    degenerate=None,
    empty=None,
    raw=None,
    bad_inputs=None,
    refusal="masked_attention",
)


def packed(make: Maker, lengths: list[int], key_lengths: list[int], **options: object) -> Sample:
    cu_q, cu_k = (torch.tensor([0, *each]).cumsum(0).int().to(make.device) for each in (lengths, key_lengths))
    q, k, v = make.randn(sum(lengths), 4, 16), make.randn(sum(key_lengths), 2, 16), make.randn(sum(key_lengths), 2, 8)
    return Sample(f"{lengths}", (q, k, v, cu_q, cu_k, 200, 200), options)  # the longest, or more: a compiled graph has these numbers in it


def one_by_one(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, mask: masks.Mask | None = None, **options: object) -> Tensor:
    parts = []
    for n in range(len(cu_q) - 1):
        mine, theirs = slice(int(cu_q[n]), int(cu_q[n + 1])), slice(int(cu_k[n]), int(cu_k[n + 1]))
        keep = None if mask is None else mask.dense()[:, :, mine, theirs]
        parts.append(reference_masked_attention(*(each.transpose(0, 1)[None] for each in (query[mine], key[theirs], value[theirs])), keep, **options)[0].transpose(0, 1))
    return torch.cat(parts)


def packed_and_masked(make: Maker) -> Sample:
    tokens = masks.layout([("question", 2), ("visual", (5, 9)), ("answer", 4), ("visual", (3, 3)), ("answer", 30)])
    sample = packed(make, [20, 50, 20], [20, 50, 20], causal=True)
    return replace(sample, kwargs=sample.kwargs | {"mask": masks.image_prefix(tokens).to(make.device)})


MASKED_ATTENTION_VARLEN = replace(
    MASKED_ATTENTION,
    name="masked_attention_varlen",
    call=ops.masked_attention_varlen,
    reference=one_by_one,
    formula=one_by_one,
    samples=lambda make: [packed(make, [5, 1, 120], [7, 3, 100]), packed(make, [40, 0, 97], [40, 9, 97], causal=True), packed(make, [3], [200], softcap=2.0, scale=1.0), packed_and_masked(make)],
    tiny=lambda make: [replace(one, args=(one.args[0][:, :2, :3], one.args[1][:, :1, :3], one.args[2][:, :1, :2], *one.args[3:])) for one in [packed(make, [2, 3], [3, 2])]],
    sized=lambda make, n: packed(make, [n, n + 1], [n + 2, n + 3], causal=True),
    degenerate=None,
    empty=None,
    raw=None,
    bad_inputs=None,
    refusal="masked_attention",
)

ATTENTION = [MASKED_ATTENTION, MASKED_ATTENTION_LSE, MASKED_ATTENTION_VARLEN, SCALED_DOT_PRODUCT_ATTENTION]
