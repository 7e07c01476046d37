"""Virtual unmerging against a formula of its own, in relative angles; what it becomes where nothing is merged or nothing is turned; its gradient by the formulas; packing, padding, decoding; memory, threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from modalign import masks
from modalign.ops import VirtualUnmergeCache, masked_attention, virtual_unmerge_attention
from modalign.testing import Maker, peak_memory
from virtual_unmerge_cases import draw_map, maps, operands

F64 = torch.float64


def frequencies(D, theta=10000.0):
    return torch.tensor([theta ** (-2 * f / D) for f in range(D // 2)], dtype=F64)


def by_pairs(q, k, v, g, position, keep, theta=10000.0):
    """One item, from the scores of the paper: angles are those of differences of positions, nothing is turned by itself. keep [N, N]."""
    H, Nu, D = q.shape
    k, v = (each.repeat_interleave(H // len(each), 0) for each in (k, v))
    there = g >= 0
    gq, angle = g.clamp(min=0), (position.double()[:, None] - position)[..., None] * frequencies(D, theta)  # [N, N, D / 2]
    (q1, q2), (k1, k2) = (each[:, gq].chunk(2, -1) for each in (q, k))
    even = q1[:, :, None] * k1[:, None] + q2[:, :, None] * k2[:, None]
    odd = q1[:, :, None] * k2[:, None] - q2[:, :, None] * k1[:, None]
    logits = (even * angle.cos() + odd * angle.sin()).sum(-1) * D**-0.5
    keep = keep & there & there[:, None]
    weight = logits.exp() * keep  # logits of some units
    f = weight / weight.sum(-1, keepdim=True).clamp(min=1e-300) @ v[:, gq]
    groups = [(g == u).nonzero()[:, 0] for u in range(Nu)]
    return torch.stack([f[:, group].mean(1) if len(group) else 0 * v[:, 0] for group in groups], 1)


def problem(B=2, H=4, Hkv=2, Nu=20, N=45, D=8, Dv=6, text=5, dtype=F64, seed=0):
    make = Maker(dtype, seed=seed)
    return (*operands(make, B, H, Hkv, Nu, D, Dv), draw_map(make, N, Nu, text))


def causal(N):
    return torch.ones(N, N, dtype=torch.bool).tril()


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_formula_in_relative_angles(seed):
    """Output and gradients in float64: one map or one for each item, causal or both ways, packed, under a mask, with positions of one's own."""
    q, k, v, g = problem(seed=seed)
    make = Maker(F64, seed=seed + 10)
    cu, mask, position = torch.tensor([0, 13, 13, 45]).int(), make.mask(45, 45, probability=0.6), (make.randn(2, 45) * 50).round().long()
    sequence = torch.bucketize(torch.arange(45), cu[1:].long(), right=True)
    own, packed = torch.stack([g, g.roll(3).masked_fill(torch.arange(45) > 40, -1)]), sequence[:, None] == sequence
    start = torch.tensor([0] * 13 + [13] * 32)
    token, all_ = torch.arange(45), torch.ones(45, 45, dtype=torch.bool)
    for given, options, positions, keep in (
        (g, {}, token, causal(45)),
        (g, {"causal": False, "theta": 50.0}, token, all_),
        (own, {"positions": position}, position, causal(45)),
        (g, {"cu_seqlens": cu}, token - start, causal(45) & packed),  # positions from 0 in every sequence
        (own, {"cu_seqlens": cu, "mask": mask, "causal": False, "positions": position[0]}, position[0], mask & packed),
        (g, {"mask": masks.from_dense(mask)}, token, causal(45) & mask),
        (g, {"positions": token / 3}, token / 3, causal(45)),
    ):
        leaves = [each.clone().requires_grad_() for each in (q, k, v)]
        out = virtual_unmerge_attention(*leaves, given, **options)
        each_map, each_position = given.expand(2, 45), positions.expand(2, 45)
        want = torch.stack([by_pairs(*(each[b] for each in leaves), each_map[b], each_position[b], keep, options.get("theta", 10000.0)) for b in range(2)])
        torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
        weight = make.randn(*out.shape)
        for ours, theirs in zip(torch.autograd.grad(out, leaves, weight), torch.autograd.grad(want, leaves, weight), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_without_merging_it_is_rotary_attention():
    """Turned as complex numbers."""
    q, k, v, _ = problem(Nu=30, N=30, Hkv=4, D=12)
    turn = torch.polar(torch.ones(30, 6, dtype=F64), torch.arange(30)[:, None] * frequencies(12))

    def rotated(x):
        x = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat([x.real, x.imag], -1)

    out = virtual_unmerge_attention(q, k, v, torch.arange(30))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True), rtol=1e-11, atol=1e-12)


def test_without_angles_it_is_proportional_attention():
    """Merged tokens among themselves, with the logarithm of their sizes added to the logits."""
    q, k, v, g = problem()
    out = virtual_unmerge_attention(q, k, v, g, positions=torch.zeros(45), causal=False)
    torch.testing.assert_close(out, masked_attention(q, k, v, bias=g.bincount().double().log()), rtol=1e-11, atol=1e-12)


def test_angles_are_relative():
    q, k, v, g = problem()
    out = virtual_unmerge_attention(q, k, v, g)
    torch.testing.assert_close(virtual_unmerge_attention(q, k, v, g, positions=torch.arange(45) + 1000), out, rtol=1e-9, atol=1e-11)
    turned = torch.arange(45)[:, None] * frequencies(8)
    torch.testing.assert_close(virtual_unmerge_attention(q, k, v, g, rotary=(turned.cos(), turned.sin())), out, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(virtual_unmerge_attention(q, k, v, g, positions=torch.arange(45) * 2), out, rtol=1e-3)


def test_tokens_of_a_group_at_one_position_get_the_same():
    """Splitting such a group in two equal ones gives two equal outputs, the one of the group."""
    q, k, v, g = problem(text=0)
    pair = (g == 7).nonzero()[:, 0]
    g = torch.cat([g[g != 7], g.new_tensor([7, 7])])
    position = torch.arange(len(g)).clamp(max=len(g) - 2)
    assert len(pair)
    out = virtual_unmerge_attention(q, k, v, g, positions=position, causal=False)
    split = [torch.cat([each, each[:, :, 7:8]], 2) for each in (q, k, v)]
    apart = virtual_unmerge_attention(*split, torch.cat([g[:-1], g.new_tensor([20])]), positions=position, causal=False)
    assert torch.equal(apart[:, :, 7], apart[:, :, 20])
    torch.testing.assert_close(apart[:, :, :20], out, rtol=1e-12, atol=1e-13)


def test_one_group_of_all_gets_its_value():
    q, k, v = operands(Maker(F64), 1, 2, 1, 1, 8, 6)
    out = virtual_unmerge_attention(q, k, v.requires_grad_(), torch.zeros(99, dtype=torch.int64))
    torch.testing.assert_close(out, v.expand(1, 2, 1, 6))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), v)[0], torch.full_like(v, 2))


def test_gradients_by_their_formulas():
    """df_i = dO_g(i) / n_g(i); dq_u, dk_u = sums of what is turned back; dv_u = sums."""
    q, k, v, g = (each.requires_grad_() if each.is_floating_point() else each for each in problem(Hkv=4))
    out = virtual_unmerge_attention(q, k, v, g)
    upstream = Maker(F64, seed=3).randn(*out.shape)
    angle = torch.arange(45)[:, None] * frequencies(8)

    def turned(x, sign):
        x1, x2 = x.chunk(2, -1)
        return torch.cat([x1 * angle.cos() - sign * x2 * angle.sin(), x2 * angle.cos() + sign * x1 * angle.sin()], -1)

    virtual = [turned(each[:, :, g].detach(), 1).requires_grad_() for each in (q, k)] + [v[:, :, g].detach().requires_grad_()]
    df = (upstream / g.bincount()[:, None])[:, :, g]
    grads = torch.autograd.grad(masked_attention(*virtual, causal=True), virtual, df)
    member = F.one_hot(g).double()
    wanted = [member.T @ turned(grads[0], -1), member.T @ turned(grads[1], -1), member.T @ grads[2]]
    for ours, theirs in zip(torch.autograd.grad(out, (q, k, v), upstream), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_packed_sequences_are_sequences_alone():
    make = Maker(F64, seed=4)
    maps_, sizes = [draw_map(make, N, Nu) for N, Nu in ((30, 9), (5, 5), (120, 40))], (9, 5, 40)
    q, k, v = (each.requires_grad_() for each in operands(make, 2, 4, 2, 54, 8, 6))
    g = torch.cat([one + first for one, first in zip(maps_, (0, 9, 14), strict=True)])
    out = virtual_unmerge_attention(q, k, v, g, cu_seqlens=torch.tensor([0, 30, 35, 155]).int())
    parts = [virtual_unmerge_attention(*each, one) for *each, one in zip(*(x.split(sizes, 2) for x in (q, k, v)), maps_, strict=True)]
    torch.testing.assert_close(out, torch.cat(parts, 2), rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(torch.cat(parts, 2).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_padded_items_are_items_alone(number):
    """Padding in front, behind and between; merged tokens that nothing names may hold anything."""
    make, lengths, merged = Maker(seed=5), [60, 100, 31], [20, 30, 31]
    q, k, v = operands(make, 3, 4, 2, 31, 8, 6)
    g = maps(make, lengths, merged)
    g = torch.cat([g[:, :10], torch.full((3, 2), -1), g[:, 10:]], 1)
    for each in (q, k, v):
        for b, Nu in enumerate(merged):
            each[b, :, Nu:] = number
    leaves = [each.requires_grad_() for each in (q, k, v)]
    position = (g >= 0).cumsum(1)  # padding between tokens would count
    out = virtual_unmerge_attention(*leaves, g, positions=position)
    grads = torch.autograd.grad(out[:, :, :20].sum() + torch.where(out.isfinite(), out, 0).sum(), leaves)
    for b, Nu in enumerate(merged):
        item = [each[b : b + 1, :, :Nu].detach().requires_grad_() for each in leaves]
        alone = virtual_unmerge_attention(*item, g[b][g[b] >= 0])
        torch.testing.assert_close(out[b : b + 1, :, :Nu], alone, rtol=1e-5, atol=1e-6)
        assert not out[b, :, Nu:].any()
        for ours, theirs in zip(grads, torch.autograd.grad(alone[:, :, :20].sum() + alone.sum(), item), strict=True):
            torch.testing.assert_close(ours[b : b + 1, :, :Nu], theirs, rtol=1e-4, atol=1e-5)
            assert not ours[b, :, Nu:].any()


# -------------------------------------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("steps", [[1] * 6, [4, 2], [6]])
@pytest.mark.parametrize("kind", ["plain", "positions", "items of their own", "tables"])
def test_step_by_step_is_the_prefill(kind, steps):
    """What a longer prefill gives to its last tokens, which are text."""
    make = Maker(F64, seed=6)
    q, k, v = operands(make, 2, 4, 2, 26, 8, 6)
    g, new = draw_map(make, 50, 20, 3), 6
    if kind == "items of their own":
        g = torch.stack([g, draw_map(make, 50, 20).masked_fill(torch.arange(50) > 45, -1)])
        g[1, :20] = torch.arange(20)  # so that all are named
    whole = torch.cat([g, torch.arange(20, 26).expand(*g.shape[:-1], 6)], -1)
    position = (g >= 0).long().cumsum(-1) * 3
    angle = torch.arange(56)[:, None] * frequencies(8, 7.0)
    options = {"plain": {"theta": 77.0}, "positions": {"positions": position}, "items of their own": {"positions": position}, "tables": {"rotary": (angle[:50].cos(), angle[:50].sin())}}[kind]
    longer = options
    if "positions" in options:
        longer = {"positions": torch.cat([position, position.amax(-1, keepdim=True) + 1 + torch.arange(6)], -1)}
    elif kind == "tables":
        longer = {"rotary": (angle.cos(), angle.sin())}
    want = virtual_unmerge_attention(q, k, v, whole, scale=0.4, **longer)
    cache = VirtualUnmergeCache(k[:, :, :20], v[:, :, :20], g, **options)
    at, found = 20, []
    for n in steps:
        rotary = (angle[at + 30 : at + 30 + n].cos(), angle[at + 30 : at + 30 + n].sin()) if kind == "tables" else None
        found.append(cache.attend(*(each[:, :, at : at + n] for each in (q, k, v)), rotary=rotary, scale=0.4))
        at += n
    torch.testing.assert_close(torch.cat(found, 2), want[:, :, 20:], rtol=1e-11, atol=1e-12)
    assert cache.key.shape[2] == 20 + new and cache.index_map.shape[1] == 50 + new


def test_decoding_from_nothing_and_of_nothing():
    q, k, v = operands(Maker(F64), 2, 4, 2, 5, 8, 6)
    cache = VirtualUnmergeCache(k[:, :, :0], v[:, :, :0], torch.zeros(0, dtype=torch.int64))
    assert cache.attend(q[:, :, :0], k[:, :, :0], v[:, :, :0]).shape == (2, 4, 0, 6)
    parts = [cache.attend(*(each[:, :, n : n + 1] for each in (q, k, v))) for n in range(5)]
    torch.testing.assert_close(torch.cat(parts, 2), virtual_unmerge_attention(q, k, v, torch.arange(5)), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("places", [torch.arange(45) - 1000, torch.arange(45).double() - 99.5, (torch.arange(45) % 7).to(torch.uint8)])
def test_the_next_position_is_behind_the_highest(places):
    """Also where all are negative; items without any go on from 0."""
    q, k, v, g = problem()
    one = q[:, :, :1], k[:, :, :1], v[:, :, :1]
    ours, told = (VirtualUnmergeCache(k, v, g, positions=places) for _ in range(2))
    assert torch.equal(ours.attend(*one), told.attend(*one, positions=places.double().max()[None] + 1))
    padded = torch.stack([g, torch.full_like(g, -1)])
    assert VirtualUnmergeCache(k, v, padded, positions=places).next.flatten().tolist() == [float(places.max()) + 1, 0]
    nothing = VirtualUnmergeCache(k[:, :, :0], v[:, :, :0], g[:0])
    nothing.attend(q[:, :, :2], k[:, :, :2], v[:, :, :2], positions=torch.tensor([-9, -5]))
    assert nothing.next.item() == -4


@pytest.mark.parametrize("number", range(6))
def test_decoding_loses_no_tangent(number):
    """Of a new query, key and value, of what the cache holds, and of tables."""
    q, k, v, g = problem()
    step, table = [q[:, :, :1], k[:, :, :1], v[:, :, :1]], torch.ones(46, 4, dtype=F64)
    with torch.autograd.forward_ad.dual_level():

        def dual(x):
            return torch.autograd.forward_ad.make_dual(x.contiguous(), torch.ones_like(x))

        if number < 3:
            step[number] = dual(step[number])
        held = [dual(each) if number - 3 == n else each for n, each in enumerate((k, v, table))]
        cache = VirtualUnmergeCache(*held[:2], g, rotary=(held[2][:45], table[:45]))
        with pytest.raises(RuntimeError, match="VirtualUnmergeCache.attend: forward-mode differentiation is not supported"):
            cache.attend(*step, rotary=(table[45:], table[45:]))


def test_wrong_steps_are_refused():
    q, k, v, g = problem()
    cache, one = VirtualUnmergeCache(k, v, g), (q[:, :, :1], k[:, :, :1], v[:, :, :1])
    table = torch.ones(1, 4, dtype=F64)
    for arguments, options, message in (
        ((one[0].float(), one[1].float(), one[2].float()), {}, "key must be like the cache's but for its tokens"),
        ((one[0][:1], one[1][:1], one[2][:1]), {}, "key must be like the cache's but for its tokens"),
        ((q[:, :, :2], *one[1:]), {}, "query must have key's 1 tokens"),
        (one, {"positions": torch.arange(2)}, r"positions must have shape \[1\] or \[2, 1\]"),
        (one, {"scale": float("nan")}, "scale must be finite"),
        (one, {"rotary": (table, table)}, "rotary must be given if the cache was made with it"),
    ):
        with pytest.raises(ValueError, match="VirtualUnmergeCache.attend: " + message):
            cache.attend(*arguments, **options)
    assert cache.key.shape[2] == 20  # nothing of these stayed
    with pytest.raises(ValueError, match="VirtualUnmergeCache: index_map must have shape"):
        VirtualUnmergeCache(k, v, g.expand(3, 45))


# -------------------------------------------------------------------------------------------------------------------- precision, threads, memory, devices


def test_far_positions_keep_their_digits():
    q, k, v, g = problem(dtype=torch.float32)
    position = torch.arange(45) + 1_000_000
    out = virtual_unmerge_attention(q, k, v, g, positions=position)
    torch.testing.assert_close(out.double(), virtual_unmerge_attention(q.double(), k.double(), v.double(), g, positions=position), rtol=1e-5, atol=1e-6)


def test_sums_of_large_groups_keep_their_digits():
    x, g = torch.rand(2, 2, 40_000, 3, generator=torch.Generator().manual_seed(0)) + 1, torch.arange(40_000)[None] % 2
    for out, want in (
        (torch.ops.modalign.virtual_merge(x, g, 2), torch.stack([x[:, :, n::2].double().mean(2) for n in range(2)], 2)),
        (torch.ops.modalign.virtual_unmerge_bwd(x, g, 2), torch.stack([x[:, :, n::2].double().sum(2) for n in range(2)], 2)),
    ):
        assert out.dtype is torch.float32 and ((out - want) / want).abs().max() < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_bits_for_any_number_of_threads(dtype):
    """Groups of many tokens, whose sums have an order."""
    q, k, v, g = problem(Nu=17, N=700, D=32, Dv=32, dtype=dtype)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaves = [each.clone().requires_grad_() for each in (q, k, v)]
            out = virtual_unmerge_attention(*leaves, g)
            results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_nothing_of_virtual_tokens_squared_is_stored():
    small, large = (peak_memory("test_virtual_unmerge_attention:probe", N=N).peak for N in (8192, 16384))
    assert large < 2.5 * small and large < 16384 * 16384 / 2


def probe(N, D=32):
    q, k, v = (torch.randn(1, 2, N // 4, D, requires_grad=True) for _ in range(3))

    def call(N):
        out = virtual_unmerge_attention(*(each[:, :, : N // 4] for each in (q, k, v)), torch.arange(N) // 4)
        return out, torch.autograd.grad(out.sum(), (q, k, v))

    return (lambda: call(N)), (lambda: call(64))