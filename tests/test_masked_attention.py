"""Identities of masked attention that a wrong kernel breaks, whatever its reference says; hand cases, edges, memory, threads and instruction sets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from modalign import _load, info, masks
from modalign.ops import masked_attention, masked_attention_varlen, scaled_dot_product_attention
from modalign.ops.masked_attention import reference_masked_attention
from modalign.testing import Maker, peak_memory

F64 = torch.float64


def operands(B=2, H=4, Hkv=2, Nq=50, Nk=70, D=16, Dv=12, dtype=torch.float32, seed=0):
    make = Maker(dtype, seed=seed)
    return make.randn(B, H, Nq, D), make.randn(B, Hkv, Nk, D), make.randn(B, Hkv, Nk, Dv)


def random_problem(seed):
    """Sizes, strides, and every option drawn."""
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=draw))

    B, Hkv, group, Nq, Nk, D, Dv = number(1, 3), number(1, 3), number(1, 3), number(1, 210), number(1, 210), number(1, 40), number(1, 40)
    make = Maker(F64, seed=seed)
    q, k, v = operands(B, Hkv * group, Hkv, Nq, Nk, D, Dv, F64, seed)
    shape = [size if number(0, 1) else 1 for size in (B, Hkv * group, Nq, Nk)]
    if shape[1] > 1 and number(0, 1):
        shape[1] = Hkv
    options = {}
    if number(0, 1):
        options["mask"] = make.mask(*[size if number(0, 1) else 1 for size in (B, Hkv * group, Nq, Nk)], probability=[0.05, 0.5, 0.95][number(0, 2)])
    if number(0, 1):
        options["bias"] = make.randn(*shape).masked_fill(make.mask(*shape, probability=0.1), -torch.inf)
    options["causal"] = (False, True, "top_left")[number(0, 2)]
    if number(0, 1):
        options["key_lengths"] = torch.randint(0, Nk + 1, (B,), generator=draw)
    if number(0, 2) == 0:
        options["softcap"] = 2.0
    if number(0, 1):
        q, k, v = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (q, k, v))
    return (q, k, v), options


@pytest.mark.parametrize("seed", range(60))
def test_random_problems_are_those_of_the_dense_formula(seed):
    tensors, options = random_problem(seed)
    leaves = [each.requires_grad_() for each in (*tensors, *([options["bias"]] if "bias" in options else []))]
    results = []
    for op in (masked_attention, reference_masked_attention):
        out, lse = op(*tensors, return_lse=True, **options)
        finite = torch.where(lse == -torch.inf, 0, lse)
        weight = torch.linspace(-1, 1, out.numel(), dtype=F64).view_as(out).sin()
        grads = torch.autograd.grad((out * weight).sum() + (finite * weight[..., 0]).sum(), leaves)
        results.append((out, lse, *(torch.where(each.isfinite() | each.isnan(), each, 0) for each in grads)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_by_hand():
    """Logits 0 and log 3: probabilities 1/4 and 3/4."""
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, 3.0]).log().clamp(min=0).view(1, 1, 2, 1)
    v = torch.tensor([[4.0, 0.0], [8.0, 1.0]])[None, None]
    out, lse = masked_attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out.flatten(), torch.tensor([7.0, 0.75]))
    torch.testing.assert_close(lse.flatten(), torch.tensor([4.0]).log())


@pytest.mark.parametrize("Nk", [1, 95, 96, 97, 193])
@pytest.mark.parametrize("Nq", [1, 95, 96, 97, 193])
def test_over_tile_edges(Nq, Nk):
    tensors = operands(1, 2, 1, Nq, Nk, dtype=F64)
    for causal in (False, True, "top_left"):
        torch.testing.assert_close(masked_attention(*tensors, causal=causal), reference_masked_attention(*tensors, causal=causal), rtol=1e-12, atol=1e-12)


def test_keys_may_come_in_any_order():
    q, k, v = operands(dtype=F64)
    mask, bias, order = Maker(seed=3).mask(2, 1, 50, 70), Maker(F64, seed=4).randn(2, 1, 1, 70), torch.randperm(70)
    one = masked_attention(q, k, v, mask, bias=bias, return_lse=True)
    other = masked_attention(q, k[:, :, order], v[:, :, order], mask[..., order], bias=bias[..., order], return_lse=True)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_parts_merge_by_their_log_sum_exp():
    """Also where one part keeps nothing; and the gradient through the merge is that of the whole."""
    q, k, v = (each.requires_grad_() for each in operands(dtype=F64))
    left = torch.zeros(50, 70, dtype=torch.bool)
    left[:, :33] = True
    left[7] = False
    whole = masked_attention(q, k, v)
    (o1, l1), (o2, l2) = (masked_attention(q, k, v, part, return_lse=True) for part in (left, ~left))
    lse = torch.logaddexp(l1, l2)
    merged = (l1 - lse).exp()[..., None] * o1 + (l2 - lse).exp()[..., None] * o2
    torch.testing.assert_close(merged, whole, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(whole)
    for a, b in zip(torch.autograd.grad(whole, (q, k, v), weight), torch.autograd.grad(merged, (q, k, v), weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_a_constant_of_a_row_moves_lse_alone():
    q, k, v = operands(dtype=F64)
    bias, constant = Maker(F64).randn(50, 70), Maker(F64, seed=9).randn(50, 1)
    (out, lse), (moved, moved_lse) = (masked_attention(q, k, v, bias=each, return_lse=True) for each in (bias, bias + constant))
    torch.testing.assert_close(out, moved, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse + constant[:, 0], moved_lse, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_a_bias_adds_up():
    """Over a row to 0, or to the gradient of lse; and a bias that is broadcast gets the sum of one that is not."""
    q, k, v = operands(dtype=F64)
    full = Maker(F64).randn(2, 4, 50, 70).requires_grad_()
    out, lse = masked_attention(q, k, v, bias=full, return_lse=True)
    weight, weight_lse = torch.randn_like(out), torch.randn_like(lse)
    (grad,) = torch.autograd.grad(out, full, weight, retain_graph=True)
    torch.testing.assert_close(grad.sum(-1), torch.zeros_like(lse), rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad((out, lse), full, (weight, weight_lse))
    torch.testing.assert_close(grad.sum(-1), weight_lse, rtol=1e-10, atol=1e-12)
    for shape in ((50, 70), (2, 1, 1, 70), (4, 1, 70), (1, 2, 50, 70), (2, 2, 1, 70), (50, 1), (4, 1, 1), (1,)):
        part = Maker(F64, seed=1).randn(*shape).requires_grad_()
        expanded = part if part.dim() < 3 or part.shape[-3] != 2 else part.repeat_interleave(2, -3)
        wide = expanded.expand(2, 4, 50, 70).detach().clone().requires_grad_()
        results = [masked_attention(q, k, v, bias=each, return_lse=True) for each in (part, wide)]
        narrow, whole = (torch.autograd.grad(each, bias, (weight, weight_lse))[0] for each, bias in zip(results, (part, wide), strict=True))
        if expanded is not part:
            whole = whole.unflatten(1, (2, 2)).sum(2)
        torch.testing.assert_close(narrow, whole.sum_to_size(shape), rtol=1e-10, atol=1e-11)


def test_equal_values_come_out_as_they_are():
    q, k, v = operands()
    out = masked_attention(q, k, v[:, :, :1].expand_as(v), Maker(seed=2).mask(50, 70, probability=0.1).index_fill(0, torch.tensor([3]), False))
    want = v[:, :, :1].repeat_interleave(2, 1).expand(2, 4, 50, 12).clone()
    want[:, :, 3] = 0
    torch.testing.assert_close(out, want)


def test_a_mask_that_keeps_all_is_none_and_groups_are_repeated_heads():
    q, k, v = operands()
    whole = masked_attention(q, k, v)
    torch.testing.assert_close(masked_attention(q, k, v, torch.ones(50, 70, dtype=torch.bool)), whole, rtol=0, atol=0)
    torch.testing.assert_close(masked_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)), whole, rtol=0, atol=0)


def test_later_keys_do_not_reach_earlier_queries():
    q, k, v = (each.requires_grad_() for each in operands(Nq=200, Nk=200))
    before = masked_attention(q, k, v, causal=True)
    for at in (0, 95, 96, 150):
        k2, v2 = k.detach().clone(), v.detach().clone()
        k2[:, :, at + 1 :], v2[:, :, at + 1 :] = 1e4, torch.nan
        assert torch.equal(masked_attention(q, k2, v2, causal=True)[:, :, : at + 1], before[:, :, : at + 1])
        grads = torch.autograd.grad(before[:, :, : at + 1].sum(), (k, v), retain_graph=True)
        assert all(not each[:, :, at + 1 :].any() for each in grads) and grads[1][:, :, at].any()


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_kept_does_not_reach_a_result(number, softcap):
    """NaN and infinity in keys and values, behind the length, where a bias is -inf, and where some queries keep them: those alone see them."""
    q, k, v = operands(Nk=120)
    lengths, bias = torch.tensor([100, 90]), torch.zeros(120)
    bias[5] = -torch.inf
    mask = torch.ones(50, 120, dtype=torch.bool)
    mask[:, 10] = mask[:20, 11] = mask[:30, 12] = False
    leaves = [each.clone().requires_grad_() for each in (q, k, v)]
    clean = masked_attention(*leaves, mask, bias=bias, key_lengths=lengths, softcap=softcap)
    clean_grads = torch.autograd.grad(clean[:, :, :20].sum(), leaves)
    for bad in (k, v):
        bad[:, :, 100:] = bad[:, :, 5] = bad[:, :, 10] = number
    v[:, :, 11, 3], k[:, :, 12] = number, torch.nan
    dirty = [each.clone().requires_grad_() for each in (q, k, v)]
    out, lse = masked_attention(*dirty, mask, bias=bias, key_lengths=lengths, softcap=softcap, return_lse=True)
    assert torch.equal(out[:, :, :20], clean[:, :, :20]) and lse[:, :, :30].isfinite().all()
    assert not out[:, :, 20:, 3].isfinite().any() and out[:, :, 20:30, 4:].isfinite().all() and out[:, :, 30:].isnan().all() and lse[:, :, 30:].isnan().all()
    grads = torch.autograd.grad(out[:, :, :20], dirty, torch.ones_like(out[:, :, :20]))
    assert grads[0][:, :, :20].isfinite().all()
    torch.testing.assert_close(grads[0][:, :, :20], clean_grads[0][:, :, :20])
    for grad, want in zip(grads[1:], clean_grads[1:], strict=True):  # keys that queries 20 ... see meet a NaN there
        assert not grad[:, :, 100:].any() and not grad[:, :, 5].any() and not grad[:, :, 10].any()


def test_queries_that_keep_nothing():
    q, k, v = operands(Nq=100, Nk=30)
    q[:, :, 98] = torch.nan
    leaves = [each.requires_grad_() for each in (q, k, v)]
    mask = torch.ones(100, 30, dtype=torch.bool)
    mask[97:99] = False
    out, lse = masked_attention(*leaves, mask, return_lse=True)
    assert not out[:, :, 97:99].any() and (lse[:, :, 97:99] == -torch.inf).all() and lse[:, :, :97].isfinite().all()
    upstream = torch.ones_like(out)
    upstream[:, :, 97:99] = torch.nan
    grads = torch.autograd.grad((out, lse), leaves, (upstream, torch.ones_like(lse)))
    assert all(each.isfinite().all() for each in grads) and not grads[0][:, :, 97:99].any()


@pytest.mark.parametrize("causal", [False, True, "top_left"])
def test_packed_sequences_are_sequences_alone(causal):
    lengths_q, lengths_k = [3, 0, 120, 97, 1], [5, 4, 120, 30, 0]
    q, k, v = (each.requires_grad_() for each in (torch.randn(221, 4, 16), torch.randn(159, 2, 16), torch.randn(159, 2, 12)))
    cu_q, cu_k = (torch.tensor([0, *each]).cumsum(0).int() for each in (lengths_q, lengths_k))
    out, lse = masked_attention_varlen(q, k, v, cu_q, cu_k, 120, 130, causal=causal, return_lse=True)
    parts = []
    for n in range(5):
        qs, ks = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        parts.append(masked_attention(*(each.transpose(0, 1)[None] for each in (q[qs], k[ks], v[ks])), causal=causal, return_lse=True))
    want, want_lse = torch.cat([o[0].transpose(0, 1) for o, _ in parts]), torch.cat([each[0] for _, each in parts], 1)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    weight = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), weight), torch.autograd.grad(want, (q, k, v), weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_packed_sequences_under_a_mask():
    lengths_q, lengths_k = [3, 0, 120, 97, 1], [5, 4, 120, 30, 0]
    q, k, v = (each.requires_grad_() for each in (torch.randn(221, 4, 16), torch.randn(159, 2, 16), torch.randn(159, 2, 12)))
    cu_q, cu_k = (torch.tensor([0, *each]).cumsum(0).int() for each in (lengths_q, lengths_k))
    keep = torch.rand(1, 4, 221, 159) < 0.5
    for causal in (False, True, "top_left"):
        out, lse = masked_attention_varlen(q, k, v, cu_q, cu_k, 120, 130, masks.from_dense(keep), causal=causal, return_lse=True)
        parts = []
        for n in range(5):
            qs, ks = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
            parts.append(masked_attention(*(each.transpose(0, 1)[None] for each in (q[qs], k[ks], v[ks])), keep[:, :, qs, ks], causal=causal, return_lse=True))
        want, want_lse = torch.cat([o[0].transpose(0, 1) for o, _ in parts]), torch.cat([each[0] for _, each in parts], 1)
        weight = torch.randn_like(out)
        for a, b in zip((out, lse, *torch.autograd.grad(out, (q, k, v), weight)), (want, want_lse, *torch.autograd.grad(want, (q, k, v), weight)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
    with pytest.raises(TypeError, match=r"masked_attention_varlen: mask must be of modalign.masks, got"):
        masked_attention_varlen(q, k, v, cu_q, cu_k, 120, 130, keep)
    with pytest.raises(ValueError, match=r"masked_attention_varlen: mask must be of 221 queries and 159 keys, got one of 3 and 159"):
        masked_attention_varlen(q, k, v, cu_q, cu_k, 120, 130, masks.full(3, 159))
    for cu, longest in ((cu_q - 1, 120), (cu_q, 119)):
        with pytest.raises(RuntimeError, match=r"masked_attention_varlen: cu_seqlens_q must rise from 0 to the number of rows 221, by at most"):
            masked_attention_varlen(q, k, v, cu, cu_k, longest, 130, masks.full(221, 159))
    many = masks.full(221, 159)
    for _ in range(7):
        many = many & masks.full(221, 159)
    with pytest.raises(ValueError, match=r"masked_attention_varlen: mask must have at most 14 terms and signs, .* got 15"):
        masked_attention_varlen(q, k, v, cu_q, cu_k, 120, 130, many)


def test_rows_behind_the_last_sequence_keep_nothing_in_a_compiled_graph():
    x, cu = torch.arange(1.0, 5.0).view(4, 1, 1), torch.tensor([0, 2]).int()
    torch._dynamo.reset()
    call = torch.compile(lambda x, cu: masked_attention_varlen(x, x, x, cu, cu, 4, 4, masks.full(4, 4), scale=0.0), fullgraph=True, backend="aot_eager")
    assert call(x, cu).flatten().tolist() == [1.5, 1.5, 0.0, 0.0]
    with pytest.raises(RuntimeError, match="masked_attention_varlen: cu_seqlens_q must rise from 0 to the number of rows 4"):
        masked_attention_varlen(x, x, x, cu, cu, 4, 4, masks.full(4, 4))


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "message"),
    [([0, 3, 5], [0, 3, 4], "end with the number of rows"), ([1, 3, 5], [0, 3, 5], "begin with 0"), ([0, 6, 5], [0, 3, 5], "rise by at most"), ([0, 5, 5], [0, 1, 5], "max_queries = 4")],
)
def test_packed_sequences_that_are_none_are_refused(cu_q, cu_k, message):
    q, k = torch.randn(5, 1, 4), torch.randn(5, 1, 4)
    with pytest.raises(RuntimeError, match=message):
        masked_attention_varlen(q, k, k, torch.tensor(cu_q).int(), torch.tensor(cu_k).int(), 4, 4)


def test_the_signature_of_torch():
    make = Maker(seed=5)
    q, k, v, grouped = make.randn(2, 4, 33, 16), make.randn(2, 4, 50, 16), make.randn(2, 4, 50, 8), make.randn(2, 2, 50, 16)
    mask, bias = make.mask(2, 1, 33, 50), make.randn(4, 33, 50)
    mask[..., 0] = True
    for options in ({}, {"attn_mask": mask}, {"attn_mask": bias}, {"is_causal": True}, {"scale": 0.3}):
        torch.testing.assert_close(scaled_dot_product_attention(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options), rtol=1e-5, atol=1e-5)
    both = [op(q, grouped, grouped, enable_gqa=True) for op in (scaled_dot_product_attention, F.scaled_dot_product_attention)]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5)
    for lead in ((), (3,), (2, 3, 4)):  # [N, D], [B, N, D], more
        x = make.randn(*lead, 9, 8)
        torch.testing.assert_close(scaled_dot_product_attention(x, x, x), F.scaled_dot_product_attention(x, x, x), rtol=1e-5, atol=1e-5)
    five, part = make.randn(2, 3, 4, 9, 8), make.mask(2, 1, 4, 9, 9) | torch.eye(9, dtype=torch.bool)
    torch.testing.assert_close(scaled_dot_product_attention(five, five, five, part), F.scaled_dot_product_attention(five, five, five, part), rtol=1e-5, atol=1e-5)
    for wrong, message in (({"dropout_p": 0.1}, "dropout_p must be 0"), ({"attn_mask": mask, "is_causal": True}, "together with is_causal"), ({"attn_mask": [1]}, "attn_mask must be a bool")):
        with pytest.raises((TypeError, ValueError), match=message):
            scaled_dot_product_attention(q, k, v, **wrong)
    with pytest.raises(ValueError, match="enable_gqa must be True"):
        scaled_dot_product_attention(q, grouped, grouped)


@pytest.mark.parametrize("instructions", info.collect()["instruction_sets"]["ran_here"])
def test_every_instruction_set_and_number_of_threads(instructions):
    q, k, v = (each.requires_grad_() for each in operands(1, 4, 2, 210, 300, 40, 24))
    bias = Maker(seed=7).randn(210, 300).requires_grad_()
    expected = [each.double().detach().requires_grad_() for each in (q, k, v, bias)]
    want = reference_masked_attention(*expected[:3], bias=expected[3], causal=True)
    weight = torch.randn(want.shape)
    want_grads = torch.autograd.grad(want, expected, weight.double())
    results = []
    with _load.use_instruction_set(instructions):
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                out = masked_attention(q, k, v, bias=bias, causal=True)
                results.append([out, *torch.autograd.grad(out, (q, k, v, bias), weight)])
        finally:
            torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    for ours, theirs in zip(results[0], (want, *want_grads), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-5)


def test_nothing_of_queries_times_keys_is_stored():
    """In the backward eight times the gradient of the queries: far from N x N."""
    small, large = (peak_memory("test_masked_attention:probe", N=N).peak for N in (8192, 16384))
    assert large < 2.5 * small and large < 16384 * 16384 / 2  # one matrix of bytes would be twice that, one of floats for either head sixteen times


def probe(N, D=32):
    q, k, v = (torch.randn(1, 2, N, D, requires_grad=True) for _ in range(3))
    bias = torch.randn(N, requires_grad=True)
    tokens = masks.layout([("prefix", N // 4), ("visual", (N // 8, 4)), ("question", N // 4)])

    def call(n):
        mask = masks.modality_mutual(tokens.select(0, n))
        out = masked_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], mask, bias=bias[:n], causal=True)
        return out, torch.autograd.grad(out.sum(), (q, k, v, bias))

    return (lambda: call(N)), (lambda: call(64))


def test_one_query_of_many_keys():
    q, k, v = operands(1, 8, 2, 1, 1000, 64, 64)
    torch.testing.assert_close(masked_attention(q, k, v, causal=True), reference_masked_attention(q, k, v))
