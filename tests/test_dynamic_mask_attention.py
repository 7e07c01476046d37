"""Dynamic masks against brute force over queries and keys, the intervals that they are, gathered keys against the same mask as a matrix, the identities of the paper."""

from __future__ import annotations

import itertools

import pytest
import torch

from modalign import masks
from modalign.ops import dynamic_mask_attention, masked_attention
from modalign.ops.dynamic_mask_attention import _best, _by_end, _intervals, reference_dynamic_mask_attention
from modalign.testing import peak_memory

F64 = torch.float64


def draw(seed):
    return torch.Generator().manual_seed(seed)


def random_scores(shape, kind, g):
    scores = torch.randn(shape, generator=g, dtype=F64)
    if kind == "ties":
        return scores.mul(1.5).round()
    if kind == "equal":
        return scores.mul(0)
    if kind == "rising":
        return scores.sort(-1).values
    if kind == "padded":
        return scores.masked_fill(torch.rand(shape, generator=g) < 0.4, -torch.inf)
    return scores


def by_hand(scores, keep, reach, causal, scope):
    """[Nq, Nk] of one head, query by query: the keys sorted by score and age."""
    Nq, Nk = scores.shape
    kept = torch.zeros(Nq, Nk, dtype=torch.bool)
    for i in range(Nq):
        row = scores[i].tolist()
        seen = [j for j in range(Nk) if not causal or j <= i + reach]
        among = seen if scope == "causal" else range(Nk)
        best = sorted(among, key=lambda j: (row[j], j), reverse=True)[:keep]
        kept[i, [j for j in best if j in set(seen)]] = True
    return kept


KINDS = ("any", "ties", "equal", "rising", "padded")


@pytest.mark.parametrize("seed", range(300))
def test_the_choice_is_that_of_brute_force(seed):
    g = draw(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=g))

    Nq, Nk, heads = number(1, 40), number(1, 40), number(1, 3)
    keep, kind, causal, scope = number(1, Nk + 3), KINDS[seed % 5], seed % 7 != 0, "global" if seed % 4 == 0 else "causal"
    own = seed % 3 == 0  # scores of its own for every query
    scores = random_scores((1, heads, Nq if own else 1, Nk), kind, g)
    q, k, v = torch.randn(1, heads, Nq, 3, generator=g, dtype=F64), torch.randn(1, heads, Nk, 3, generator=g, dtype=F64), torch.randn(1, heads, Nk, 2, generator=g, dtype=F64)
    kept = torch.stack([by_hand(scores[0, h].expand(Nq, Nk), keep, Nk - Nq, causal, scope) for h in range(heads)])[None]
    if not own:
        dense = masks.intervals(_intervals(scores[:, :, 0], Nq, keep, causal, scope), Nq).dense()
        assert torch.equal(dense.expand_as(kept), kept)
    out, lse = dynamic_mask_attention(q, k, v, scores, keep, causal=causal, scope=scope, return_lse=True)
    want, want_lse = masked_attention(q, k, v, kept, bias=scores, return_lse=True)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reference_dynamic_mask_attention(q, k, v, scores, keep, causal=causal, scope=scope), out, rtol=1e-12, atol=1e-12)


def problem(seed, B, H, Hkv, N, D, Dv, heads, dtype=F64, kind="any"):
    g = draw(seed)
    shapes = ((B, H, N, D), (B, Hkv, N, D), (B, Hkv, N, Dv))
    return [torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for shape in shapes] + [random_scores((B, heads, 1, N), kind, g).to(dtype).requires_grad_()]


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 1, 700, 8, 8, 1, 20), (2, 4, 2, 500, 33, 20, 2, 11), (1, 4, 1, 390, 16, 7, 4, 1), (2, 2, 2, 97, 5, 64, 1, 3), (3, 2, 1, 600, 8, 8, 1, 96)])
def test_gathered_keys_are_the_keys(shape, dtype):
    """Forward and backward where few keys are kept in nearly every tile, against the same mask as a matrix, which is not gathered."""
    *sizes, heads, keep = shape
    q, k, v, bias = problem(1, *sizes, heads, dtype)
    N = sizes[3]
    dense = masks.intervals(_intervals(bias.detach()[:, :, 0], N, keep, True, "causal"), N).dense()
    out, lse = dynamic_mask_attention(q, k, v, bias, keep, return_lse=True)
    want, want_lse = masked_attention(q, k, v, dense, bias=bias, return_lse=True)
    tolerance = dict(rtol=1e-11, atol=1e-11) if dtype is F64 else dict(rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(out, want, **tolerance)
    torch.testing.assert_close(lse, want_lse, **tolerance)
    up, up_lse = torch.randn(out.shape, generator=draw(2), dtype=dtype), torch.randn(lse.shape, generator=draw(3), dtype=dtype)
    for ours, theirs in zip(*(torch.autograd.grad((each * up).sum() + (sums * up_lse).sum(), (q, k, v, bias)) for each, sums in ((out, lse), (want, want_lse))), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance["rtol"], atol=tolerance["atol"] * float(theirs.abs().max()))


def test_gathered_intervals_with_any_bias_lengths_and_causal():
    """The gathered walk belongs to `masked_attention`: intervals that are not dynamic masks, a bias of pairs, key lengths, both alignments, soft-cap."""
    g = draw(4)
    B, H, Nq, Nk = 2, 2, 300, 410
    low = torch.randint(0, Nq, (B, H, Nk), generator=g)
    ends = torch.stack([low, (low + torch.randint(-3, 9, (B, H, Nk), generator=g)).clamp(low, torch.tensor(Nq))], -1).int()
    mask = masks.intervals(ends, Nq)
    q, k, v = (torch.randn(B, H, n, 16, generator=g, dtype=F64, requires_grad=True) for n in (Nq, Nk, Nk))
    biases = (None, torch.randn(Nq, Nk, generator=g, dtype=F64), torch.randn(2, 2, 1, Nk, generator=g, dtype=F64))
    for bias, causal, lengths in itertools.product(biases, (False, "bottom_right", "top_left"), (None, torch.tensor([400, 7]))):
        bias = None if bias is None else bias.clone().requires_grad_()
        options = dict(bias=bias, causal=causal, key_lengths=lengths, softcap=5.0)
        inputs = (q, k, v) if bias is None else (q, k, v, bias)
        ours, theirs = (torch.autograd.grad(masked_attention(q, k, v, each, **options).sin().sum(), inputs) for each in (mask, mask.dense()))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(1, 1, 1, 300, 8, 8, 1, 20), (2, 4, 2, 210, 9, 5, 2, 11), (1, 4, 2, 190, 8, 7, 4, 1), (2, 2, 2, 97, 5, 6, 1, 3)])
@pytest.mark.parametrize(("causal", "scope"), [(True, "causal"), (True, "global"), (False, "causal")])
def test_keys_in_another_order_are_the_same_keys(shape, causal, scope):
    """What CUDA computes, here on the CPU: one order for each score head, also where several key heads share it or it is finer than they are."""
    *sizes, heads, keep = shape
    inputs, N = problem(3, *sizes, heads, kind="padded"), sizes[3]
    want = dynamic_mask_attention(*inputs, keep, causal=causal, scope=scope)
    q, k, v, bias = inputs
    key, value, moved, runs = _by_end(k, v, bias, _intervals(bias.detach()[:, :, 0], N, keep, causal, scope), keep)
    out = masked_attention(q, key, value, masks.intervals(runs, N), bias=moved)
    torch.testing.assert_close(out, want, rtol=1e-11, atol=1e-11)
    up = torch.randn(out.shape, generator=draw(2), dtype=F64)
    for ours, theirs in zip(*(torch.autograd.grad(each, inputs, up) for each in (out, want)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    shared = _by_end(k, v, bias[:1], _intervals(bias.detach()[:1, :, 0], N, keep, causal, scope), keep)  # scores that items share
    assert shared[0].shape[0] == shared[1].shape[0] == len(k) and len(shared[3]) == 1


@pytest.mark.parametrize("kind", ["random", "rising", "falling"])
def test_tiles_hold_few_pairs_beside_those_that_are_kept(kind):
    """Kept tiles of 128 x 128 as keys come, and in the order of `_by_end`."""
    N, keep = 8192, 512
    scores = torch.randn(1, 1, N, generator=draw(1)) + {"random": 0, "rising": 3, "falling": -3}[kind] * torch.arange(N) / N
    runs = _intervals(scores, N, keep, True, "causal")

    def share(runs):
        first, last = runs[0, 0].view(-1, 128, 2).unbind(-1)
        block, none = torch.arange(N // 128), first >= last
        kept = (first[..., None] < 128 * (block + 1)) & (last[..., None] > 128 * block) & ~none[..., None]
        return float(kept.any(1).sum() * 128**2 / (last - first).sum())

    x = torch.zeros(1, 1, N, 1)
    assert share(_by_end(x, x, x.mT, runs, keep)[3]) < 3 < 7 < share(runs)


def test_a_score_that_is_none_is_the_least_where_nothing_looks_for_it():
    scores = torch.tensor([[[[0.0, torch.nan, 1.0, 2.0]]]])
    assert _best(scores, 1, 1, True).flatten().tolist() == [False, False, False, True]
    assert _best(scores, 1, 3, True).flatten().tolist() == [True, False, True, True]


def test_what_nobody_keeps_may_be_anything():
    q, k, v, bias = problem(5, 1, 2, 1, 400, 16, 16, 1, torch.float32)
    N, keep = 400, 4
    kept = masks.intervals(_intervals(bias.detach()[:, :, 0], N, keep, True, "causal"), N).dense()[0, 0].any(0)
    assert 0 < int(kept.sum()) < 100
    up = torch.randn(1, 2, N, 16, generator=draw(6))

    def results():
        out = dynamic_mask_attention(q, k, v, bias, keep)
        return (out, *torch.autograd.grad(out, (q, k, v, bias), up))

    clean = results()
    with torch.no_grad():
        k[:, :, ~kept], v[:, :, ~kept] = torch.nan, torch.inf
    for before, now in zip(clean, results(), strict=True):
        assert torch.equal(before, now)


def test_identities():
    q, k, v, bias = problem(7, 1, 2, 2, 200, 8, 8, 2)
    with torch.no_grad():
        torch.testing.assert_close(dynamic_mask_attention(q, k, v, bias, 200), masked_attention(q, k, v, bias=bias, causal=True))  # keep >= N
        best = torch.tensor([[int(bias[0, h, 0, : i + 1].argmax()) for i in range(200)] for h in range(2)])
        torch.testing.assert_close(dynamic_mask_attention(q, k, v, bias, 1), v.gather(2, best[None, :, :, None].expand(1, 2, 200, 8)))  # keep = 1
        torch.testing.assert_close(dynamic_mask_attention(q, k, v, bias * 0, 30), masked_attention(q, k, v, masks.causal(200, window=30)))  # equal scores
    kept = masks.intervals(_intervals(bias.detach()[:, :, 0], 200, 30, True, "causal"), 200).dense()
    assert torch.equal(kept.sum(-1), torch.arange(1, 201).clamp(max=30).expand(1, 2, 200))
    grad = torch.autograd.grad(dynamic_mask_attention(q, k, v, bias, 30).sin().sum(), bias)[0]
    torch.testing.assert_close(grad.sum(-1), torch.zeros(1, 2, 1, dtype=F64))  # rows of ds sum to 0
    early = masks.intervals(_intervals(bias.detach()[:, :, 0], 200, 30, True, "global"), 200).dense()
    assert int(early[0, 0, 20].sum()) < 21  # early queries keep fewer


def test_step_by_step_is_the_whole():
    """Decoding: the last queries alone choose as they do among all."""
    q, k, v, bias = problem(8, 2, 4, 2, 150, 8, 8, 2)
    with torch.no_grad():
        whole = dynamic_mask_attention(q, k, v, bias, 17)
        for n in (1, 2, 17, 18, 90, 149, 150):
            one = dynamic_mask_attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], bias[..., :n], 17)
            torch.testing.assert_close(one, whole[:, :, n - 1 : n], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dynamic_mask_attention(q[:, :, 40:90], k[:, :, :90], v[:, :, :90], bias[..., :90], 17), whole[:, :, 40:90], rtol=1e-12, atol=1e-12)


def test_gradients():
    q, k, v, bias = problem(9, 1, 2, 1, 9, 3, 2, 1)
    torch.autograd.gradcheck(lambda *x: dynamic_mask_attention(*x, 3, return_lse=True), (q, k, v, bias))
    own = torch.randn(1, 2, 9, 9, generator=draw(10), dtype=F64, requires_grad=True)
    torch.autograd.gradcheck(lambda *x: dynamic_mask_attention(*x, 3), (q, k, v, own))


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_equal_bits_for_any_number_of_threads(threads):
    q, k, v, bias = problem(11, 2, 4, 2, 500, 16, 16, 2, torch.float32)

    def results():
        out = dynamic_mask_attention(q, k, v, bias, 20)
        return (out, *torch.autograd.grad(out.sin().sum(), (q, k, v, bias)))

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(alone, results(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_nothing_of_queries_times_keys_is_stored():
    small, large = (peak_memory("test_dynamic_mask_attention:probe", N=N).peak for N in (8192, 16384))
    assert large < 2.6 * small and large < 16384 * 16384 // 2  # half a matrix of bytes


def probe(N, D=32):
    q, k, v, bias = problem(12, 1, 2, 1, N, D, D, 1, torch.float32)

    def call(n):
        x = [each[:, :, :n] for each in (q, k, v)] + [bias[..., :n]]
        return torch.autograd.grad(dynamic_mask_attention(*x, 64).sum(), x)

    return (lambda: call(N)), (lambda: call(64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(keep=0), "dynamic_mask_attention: keep must be a whole number of 1 or more, got int 0"),
        (dict(keep=True), "dynamic_mask_attention: keep must be a whole number of 1 or more, got bool True"),
        (dict(scope="row"), 'dynamic_mask_attention: scope must be "causal" or "global", got'),
        (dict(causal=1), "dynamic_mask_attention: causal must be"),
        (dict(bias=torch.zeros(1, 1, 1, 4, dtype=torch.int64)), "dynamic_mask_attention: bias must be a floating-point tensor"),
        (dict(bias=torch.zeros(1, 1, 1, 3)), "dynamic_mask_attention: bias must broadcast to"),
        (dict(bias=torch.zeros(1, 1, 1, 1)), "dynamic_mask_attention: bias must have as many columns as there are keys, 4"),
        (dict(bias=torch.tensor([0.0, 1.0, torch.nan, 2.0]).view(1, 1, 1, 4)), "dynamic_mask_attention: bias must not hold NaN, got one for key 2"),
        (dict(query=torch.zeros(2, 4, 3)), "dynamic_mask_attention: query must have 4 dimensions"),
        (dict(value=None), "dynamic_mask_attention: value must be"),
        (dict(value=torch.zeros(1, 1, 3, 3), bias=torch.full((1, 1, 1, 4), torch.nan)), "dynamic_mask_attention: value must have key's shape"),
        (dict(return_lse=1), "dynamic_mask_attention: return_lse must be"),
        (dict(scale="x"), "dynamic_mask_attention: scale must be"),
    ],
)
def test_bad_input(change, message):
    x = torch.zeros(1, 1, 4, 3)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        dynamic_mask_attention(**(dict(query=x, key=x, value=x, bias=torch.zeros(1, 1, 1, 4), keep=2) | change))
