"""Identities of what is read off attention without its matrix: against softmax in float64, the oracles of each, edges, memory, threads and instruction sets; the loss and the
selection that are made of it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from modalign import _load, info, masks, ops
from modalign.nn import functional as L
from modalign.ops.attention_column_sum import reference_attention_column_sum
from modalign.testing import Maker, peak_memory
from test_masked_attention import random_problem
from test_masks import draw, random_table, random_tokens

F64 = torch.float64


def operands(B=2, H=4, Hkv=2, Nq=50, Nk=70, D=16, dtype=F64, seed=0):
    make = Maker(dtype, seed=seed)
    return make.randn(B, H, Nq, D), make.randn(B, Hkv, Nk, D)


def softmax(q, k, mask=None, *, bias=None, causal=False, key_lengths=None, scale=None, softcap=0.0):
    """The matrix of probabilities, by torch's softmax; rows that keep nothing are 0."""
    (B, H, Nq, D), (Hkv, Nk) = q.shape, k.shape[1:3]
    whole = lambda pairs: pairs.repeat_interleave(H // Hkv, 1) if pairs.dim() == 4 and pairs.shape[1] == Hkv and H != Hkv else pairs  # noqa: E731
    z = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(H // Hkv, 1)) * (D**-0.5 if scale is None else scale)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    z = z if bias is None else z + whole(bias)
    keep = torch.ones(B, H, Nq, Nk, dtype=torch.bool)
    if mask is not None:
        keep &= whole(mask if isinstance(mask, torch.Tensor) else mask.dense())
    if causal:
        keep &= torch.ones(Nq, Nk, dtype=torch.bool).tril(0 if causal == "top_left" else Nk - Nq)
    if key_lengths is not None:
        keep &= torch.arange(Nk) < key_lengths[:, None, None, None]
    keep &= z != -torch.inf
    empty = ~keep.any(-1, keepdim=True)
    return z.masked_fill(~keep, -torch.inf).masked_fill(empty, 0).softmax(-1) * ~empty


def random_scores(seed):
    """A problem of test_masked_attention, every second one under a mask of random rules."""
    (q, k, _), options = random_problem(seed)
    if seed % 2:
        tokens = [random_tokens(n, seed + n, 1) for n in (q.shape[2], k.shape[2])]
        mask = masks.relation(random_table(seed), *tokens)
        ends = torch.randint(0, q.shape[2] + 1, (k.shape[2], 2), generator=draw(seed)).sort(1).values
        options["mask"] = mask | masks.intervals(ends, q.shape[2]) if seed % 4 == 1 else mask
    return q, k, options


def close(ours, theirs, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


# ----------------------------------------------------------------------------------------------------------------------------------- random problems


@pytest.mark.parametrize("seed", range(40))
def test_random_problems_are_those_of_softmax(seed):
    q, k, options = random_scores(seed)
    (B, H, Nq, _), Nk, g = q.shape, k.shape[2], draw(seed)
    p = softmax(q, k, **options)
    kept = ops.attention_column_sum(q, k, reduction="visible_mean", **options)
    close(kept, (p.sum(2) / (p != 0).sum(2)).nan_to_num(0))
    sparse = torch.randn(B, H, Nq, generator=g, dtype=F64) * (torch.rand(B, H, Nq, generator=g) < 0.6)
    for weights, w in ((None, torch.ones(B, H, Nq, dtype=F64)), (sparse, sparse), (sparse[:, 0], sparse[:, :1].expand(B, H, Nq))):
        wanted = {
            "sum": torch.einsum("bhi,bhij->bhj", w, p),
            "mean": torch.einsum("bhi,bhij->bhj", w, p) / w.sum(2, keepdim=True),
            "square": torch.einsum("bhi,bhij->bhj", w, p * p),
            "max": (w[..., None] * p).amax(2).clamp(min=0),
        }
        for reduction, want in wanted.items():
            close(ops.attention_column_sum(q, k, weights=weights, reduction=reduction, **options), want.nan_to_num(0, 0, 0), rtol=1e-8)
    found = ops.attention_row_statistics(q, k, **options)
    close(found.entropy, torch.special.entr(p).sum(-1))
    close(found.maximum, p.amax(-1))
    segments, columns = torch.randint(-1, 4, (B, Nk), generator=g), torch.randint(0, Nk, (B, 9), generator=g)
    close(ops.attention_segment_mass(q, k, segments, 4, **options), torch.einsum("bhij,bjs->bhis", p, (segments[..., None] == torch.arange(4)).double()))
    close(ops.attention_columns(q, k, columns, **options), torch.stack([p[b][..., columns[b]] for b in range(B)]))
    rows = torch.randint(0, Nq, (5,), generator=g)
    close(ops.attention_rows(q, k, rows, **options), p[:, :, rows])


@pytest.mark.parametrize("seed", range(20))
def test_gradients_are_those_of_softmax(seed):
    """Also of weights that are 0, and of a bias that is shared."""
    q, k, options = random_scores(seed)
    (B, H, Nq, _), Nk, g = q.shape, k.shape[2], draw(seed)
    weights = torch.randn(B, H, Nq, generator=g, dtype=F64) * (torch.rand(B, H, Nq, generator=g) < 0.6)
    columns = torch.randint(0, Nk, (B, 9), generator=g)
    leaves = [each.requires_grad_() for each in (q, k, weights, *([options["bias"]] if "bias" in options else []))]
    p = softmax(q, k, **options)
    for ours, theirs in (
        (ops.attention_column_sum(q, k, weights=weights, **options), torch.einsum("bhi,bhij->bhj", weights, p)),
        (ops.attention_columns(q, k, columns, **options), p.gather(3, columns[:, None, None].expand(B, H, Nq, 9))),
    ):
        upstream = torch.randn(ours.shape, generator=g, dtype=F64) + 0.5
        for a, b in zip(*(torch.autograd.grad(each, leaves, upstream, allow_unused=True, retain_graph=True) for each in (ours, theirs)), strict=True):
            if a is not None or b is not None:
                close(a, b, rtol=1e-8)


# --------------------------------------------------------------------------------------------------------------------------------------- column sums


def test_column_sums_add_up_to_the_weights_of_queries_that_keep_something():
    q, k = operands()
    mask, weights = Maker(seed=1).mask(2, 1, 50, 70, probability=0.1), Maker(F64, seed=2).randn(2, 50)
    mask[:, :, ::7] = False
    something = mask.any(-1)[:, 0]
    for w, counted in ((None, something.double()), (weights, weights * something)):
        total = ops.attention_column_sum(q, k, mask, weights=w).sum(-1)
        close(total, counted.sum(1)[:, None].expand(2, 4))


def test_one_query_of_weight_1_gives_its_row():
    q, k = operands(Nq=200)
    for at in (0, 95, 96, 199):
        one = torch.zeros(2, 200, dtype=F64).index_fill_(1, torch.tensor([at]), 1)
        row = ops.attention_rows(q, k, torch.tensor([at]), causal=True)[:, :, 0]
        for reduction in ("sum", "mean", "max"):
            close(ops.attention_column_sum(q, k, weights=one, reduction=reduction, causal=True), row)
        close(ops.attention_column_sum(q, k, weights=one, reduction="square", causal=True), row.square())


def test_the_last_key_of_causal_attention_is_seen_by_the_last_query_alone():
    q, k = operands(Nq=120, Nk=120)
    close(ops.attention_column_sum(q, k, causal=True)[..., -1], softmax(q, k, causal=True)[:, :, -1, -1])


def test_equal_keys_share_what_there_is():
    q, k = operands()
    mask, weights = Maker(seed=4).mask(50, 70, probability=0.3), Maker(F64, seed=5).randn(2, 4, 50)
    shares = mask.double() / mask.sum(1, keepdim=True).clamp(min=1)
    close(ops.attention_column_sum(q, k[:, :, :1].expand_as(k), mask, weights=weights), weights @ shares)
    statistics = ops.attention_row_statistics(q, k[:, :, :1].expand_as(k), mask)
    close(statistics.entropy, mask.sum(1).clamp(min=1).double().log().expand(2, 4, 50))
    close(statistics.maximum, (1 / mask.sum(1).double()).nan_to_num(0, 0, 0).expand(2, 4, 50))


def test_heads_are_joined():
    q, k = operands()
    whole = ops.attention_column_sum(q, k)
    for heads, want in (("sum", whole.sum(1)), ("mean", whole.mean(1)), ("max", whole.amax(1))):
        close(ops.attention_column_sum(q, k, heads=heads), want)


def test_a_given_log_sum_exp_gives_the_same_bits():
    """Whatever its strides, and a constant, though it has a gradient of its own."""
    q, k = (each.requires_grad_() for each in operands(dtype=torch.float32))
    lse = ops.masked_attention(q, k, k, causal=True, return_lse=True)[1]
    made, given = (ops.attention_column_sum(q, k, lse=each, causal=True) for each in (None, lse.transpose(1, 2).contiguous().transpose(1, 2)))
    upstream = torch.randn_like(made)
    assert torch.equal(made, given) and torch.equal(*(torch.autograd.grad(each, q, upstream)[0] for each in (made, given)))
    statistics = [ops.attention_row_statistics(q, k, lse=each, causal=True) for each in (None, lse)]
    assert all(torch.equal(a, b) for a, b in zip(*statistics, strict=True))


def test_what_has_no_gradient_says_so():
    q, k = (each.requires_grad_() for each in operands())
    for made in (ops.attention_column_sum(q, k, reduction="max"), ops.attention_column_sum(q, k, reduction="square")):
        with pytest.raises(RuntimeError, match='attention_column_sum: reduction must be "sum" or "mean" for this gradient'):
            made.sum().backward()
    with pytest.raises(RuntimeError, match="attention_row_statistics: there is no gradient"):
        ops.attention_row_statistics(q, k).entropy.sum().backward()
    with torch.no_grad():
        assert not ops.attention_column_sum(q, k, reduction="max").requires_grad


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_kept_and_queries_of_weight_0_do_not_reach_a_result(number):
    """Forward and backward: NaN and infinity in keys behind the length, in keys that some queries keep, and in queries."""
    q, k = operands(Nq=100, Nk=120)
    lengths, mask, weights = torch.tensor([100, 90]), torch.ones(100, 120, dtype=torch.bool), torch.ones(2, 100, dtype=F64)
    mask[:50, 11] = False
    weights[:, 50:] = 0
    results = []
    for dirty in (False, True):
        q, k = (each.detach().clone() for each in (q, k))
        if dirty:
            k[:, :, 100:] = k[:, :, 11, 3] = q[:, :, 60] = number
        leaves = [q.requires_grad_(), k.requires_grad_(), weights.clone().requires_grad_()]
        columns = ops.attention_column_sum(q, k, mask, weights=leaves[2], key_lengths=lengths)
        parts = ops.attention_rows(q, k, torch.tensor([3, 40]), mask, key_lengths=lengths)
        grads = torch.autograd.grad(columns.square().sum() + parts.square().sum(), leaves)
        square = ops.attention_column_sum(q.detach(), k.detach(), mask, weights=weights, reduction="square", key_lengths=lengths)
        results.append((columns, parts, square, grads[0], grads[1], grads[2][:, :50]))
    for clean, dirty in zip(*results, strict=True):
        close(clean, dirty)
    statistics = ops.attention_row_statistics(q, k, mask, key_lengths=lengths)
    assert statistics.entropy[:, :, :50].isfinite().all()
    if math.isnan(number):
        assert ops.attention_column_sum(q, k, mask, key_lengths=lengths)[..., :90].isnan().all() and statistics.entropy[:, :, 60].isnan().all() and statistics.maximum[:, :, 60].isnan().all()


def test_edges():
    q, k = operands()
    nothing = torch.zeros(50, 70, dtype=torch.bool)
    for reduction in ("sum", "mean", "visible_mean", "square", "max"):
        assert not ops.attention_column_sum(q, k, nothing, reduction=reduction).any()
        assert not ops.attention_column_sum(q[:, :, :0], k, reduction=reduction).any()
        assert not ops.attention_column_sum(q, k, weights=torch.zeros(2, 50, dtype=F64), reduction=reduction).any()
    assert not any(each.any() for each in ops.attention_row_statistics(q, k, nothing))
    assert not any(each.any() for each in ops.attention_row_statistics(q, k[:, :, :0]))
    one = ops.attention_row_statistics(q, k[:, :, :1])
    assert not one.entropy.any() and (one.maximum == 1).all() and one.to("cpu").entropy is one.entropy
    assert ops.attention_row_statistics(q[:, :, :0], k).entropy.shape == (2, 4, 0)


# ------------------------------------------------------------------------------------------------------------------------------- segments and columns


def test_segments_share_the_mass():
    """All segments together: 1; joined segments: the sum; a segment for each key: the matrix."""
    q, k = operands()
    segments = torch.randint(0, 6, (2, 70), generator=draw(0))
    mass = ops.attention_segment_mass(q, k, segments, 6, causal=True)
    close(mass.sum(-1), torch.ones(2, 4, 50, dtype=F64))
    close(ops.attention_segment_mass(q, k, segments // 2, 3, causal=True), mass.unflatten(-1, (3, 2)).sum(-1))
    close(ops.attention_segment_mass(q, k, torch.arange(70), 70, causal=True), softmax(q, k, causal=True))


def test_side_outputs_get_the_gradient_that_a_dense_matrix_gives_them():
    """dp_ij = dm_i,segment(j) + [j is chosen] dc_ij and ds = p (dp - sum_g m_ig dm_ig - sum_c c_ic dc_ic), written out."""
    q, k = (each.requires_grad_() for each in operands())
    segments, columns = torch.randint(-1, 3, (70,), generator=draw(1)), torch.tensor([3, 50, 3])
    mass, chosen = ops.attention_segment_mass(q, k, segments, 3), ops.attention_columns(q, k, columns)
    dm, dc = (Maker(F64, seed=n).randn(*each.shape) for n, each in enumerate((mass, chosen)))
    grads = torch.autograd.grad((mass, chosen), (q, k), (dm, dc))
    with torch.no_grad():
        p = softmax(q, k)
        dp = torch.where(segments >= 0, dm[..., segments.clamp(min=0)], 0)
        for n, column in enumerate(columns.tolist()):
            dp[..., column] += dc[..., n]
        ds = p * (dp - (mass * dm).sum(-1, keepdim=True) - (chosen * dc).sum(-1, keepdim=True)) / 4
        close(grads[0], ds @ k.repeat_interleave(2, 1))
        close(grads[1], (ds.mT @ q).unflatten(1, (2, 2)).sum(2))


# ---------------------------------------------------------------------------------------------------------------------------------- power iteration


def test_a_walk_along_attention():
    q, k = operands(Nq=110, Nk=110)
    p = softmax(q, k, causal=True)
    start = torch.rand(2, 4, 110, generator=draw(3), dtype=F64)
    start = start / start.sum(-1, keepdim=True)
    for damping in (0, 0.15):
        found = ops.attention_power_iteration(q, k, causal=True, damping=damping, start=start)
        want = start
        for _ in range(5):
            want = (1 - damping) * torch.einsum("bhi,bhij->bhj", want, p) + damping * start
        close(found, want)
        close(found.sum(-1), torch.ones(2, 4, dtype=F64))
    assert torch.equal(ops.attention_power_iteration(q, k, iterations=0, start=start), start)
    close(ops.attention_power_iteration(q, k, damping=1), torch.full((2, 4, 110), 1 / 110, dtype=F64))
    even = ops.attention_power_iteration(q, k[:, :, :1].expand_as(k))
    close(even, torch.full((2, 4, 110), 1 / 110, dtype=F64))


def test_a_causal_walk_ends_at_the_first_token_and_a_chain_at_its_stationary_distribution():
    q, k = operands(Nq=20, Nk=20)
    ends = ops.attention_power_iteration(q, k, causal=True, iterations=300)
    close(ends[..., 0], torch.ones(2, 4, dtype=F64), atol=1e-6)
    # from (a, b): stay at a with 0.9, go from b to a with 0.5: five sixths of the time at a
    bias = torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=F64).log()
    found = ops.attention_power_iteration(torch.zeros(1, 1, 2, 1, dtype=F64), torch.zeros(1, 1, 2, 1, dtype=F64), bias=bias, iterations=60)
    close(found, torch.tensor([[[5 / 6, 1 / 6]]], dtype=F64))


def test_what_stands_on_a_token_that_keeps_nothing_is_lost():
    q, k = operands(Nq=5, Nk=5)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    close(ops.attention_power_iteration(q, k, mask, iterations=1).sum(-1), torch.full((2, 4), 0.8, dtype=F64))


# -------------------------------------------------------------------------------------------------------------------------- memory, threads, devices


@pytest.mark.parametrize("instructions", info.collect()["instruction_sets"]["ran_here"])
def test_every_instruction_set_and_number_of_threads(instructions):
    q, k = (each.requires_grad_() for each in operands(1, 4, 2, 210, 300, 40, torch.float32))
    bias, weights = Maker(seed=7).randn(210, 300).requires_grad_(), Maker(seed=8).randn(1, 210).requires_grad_()
    p = softmax(q.double(), k.double(), bias=bias.double(), causal=True).detach()
    results = []
    with _load.use_instruction_set(instructions):
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                columns = ops.attention_column_sum(q, k, weights=weights, bias=bias, causal=True)
                grads = torch.autograd.grad(columns.square().sum(), (q, k, bias, weights))
                with torch.no_grad():
                    others = [ops.attention_column_sum(q, k, weights=weights, reduction=each, bias=bias, causal=True) for each in ("square", "max", "visible_mean")]
                    results.append([columns, *grads, *others, *ops.attention_row_statistics(q, k, bias=bias, causal=True)])
        finally:
            torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    close(results[0][0].double(), torch.einsum("bi,bhij->bhj", weights.double(), p).detach(), rtol=1e-4, atol=2e-5)
    close(results[0][-2].double(), torch.special.entr(p).sum(-1), rtol=1e-4, atol=2e-5)
    close(results[0][-1].double(), p.amax(-1), rtol=1e-4, atol=2e-5)


def test_nothing_of_queries_times_keys_is_stored():
    small, large = (peak_memory("test_attention_scores:probe", N=N).peak for N in (4096, 8192))
    assert large < 2.6 * small and large < 8192 * 8192  # one matrix of bytes


def probe(N, D=32):
    """All ops one after the other, forward and backward."""
    q, k = (torch.randn(1, 2, N, D, requires_grad=True) for _ in range(2))
    tokens = masks.layout([("prefix", N // 4), ("visual", (N // 8, 4)), ("question", N // 4)])

    def call(n):
        mask, query, key, few = masks.modality_mutual(tokens.select(0, n)), q[:, :, :n], k[:, :, :n], torch.arange(8)
        for made in (
            lambda: ops.attention_column_sum(query, key, mask, weights=torch.ones(1, n)),
            lambda: ops.attention_power_iteration(query, key, mask, iterations=1),
            lambda: ops.attention_segment_mass(query, key, torch.arange(n) % 8, 8, mask),
            lambda: ops.attention_columns(query, key, few, mask),
            lambda: ops.attention_rows(query, key, few, mask),
        ):
            torch.autograd.grad(made().square().sum(), (q, k))
        with torch.no_grad():
            ops.attention_row_statistics(query, key, mask)

    return (lambda: call(N)), (lambda: call(64))


def test_statistics_of_rows_refuse_what_they_cannot_use():
    q, k = operands()
    with pytest.raises(ValueError, match=r"attention_row_statistics: lse must have shape \[2, 4, 50\]"):
        ops.attention_row_statistics(q, k, lse=torch.zeros(2, 4, 51, dtype=F64))
    with pytest.raises(RuntimeError, match=r"attention_row_statistics: lse must have shape \[2, 4, 50\]"):
        torch.ops.modalign.attention_row_statistics(q, k, torch.zeros(2, 4, 51, dtype=F64), None, None, 0, 1.0, 0.0, [], [])
    with pytest.raises(RuntimeError, match="attention_column_sum: reduction must be 0 to 3, got 4"):
        torch.ops.modalign.attention_column_sum(q, k, torch.zeros(2, 4, 50, dtype=F64), torch.zeros(2, 4, 50, dtype=F64), None, None, 0, 1.0, 0.0, [], [], 4)
    torch.library.opcheck(torch.ops.modalign.attention_row_statistics.default, (q, k, ops.masked_attention(q, k, k, return_lse=True)[1], None, None, 0, 0.25, 0.0, [], []))


# --------------------------------------------------------------------------------------------------------------------------- attention_refocusing_loss


def refocusing_by_hand(q, k, samples, spans, parts, size, scale=None):
    """A sample, a group and a map at a time."""
    p, totals = softmax(q, k, scale=scale), []
    for b in sorted(set(samples.tolist())):
        errors = []
        for g in (samples == b).nonzero()[:, 0].tolist():
            start, stop = spans[g].tolist()
            part = F.interpolate(parts[g].to(q.dtype)[None, None], size=size, mode="bilinear").flatten()
            maps = [p[b, :, :, j] for j in range(start, stop)]
            errors += [(each - part).square().mean() for each in (*maps, sum(maps) / len(maps))]
        totals.append(sum(errors) / len(errors))
    return sum(totals) / len(totals)


def test_refocusing_is_its_formula():
    q, k = (each.requires_grad_() for each in operands(3, 4, 2, 6 * 5, 11))
    samples, spans = torch.tensor([0, 2, 0, 2, 2]), torch.tensor([[0, 1], [3, 7], [1, 11], [3, 5], [10, 11]])
    for parts in (torch.rand(5, 12, 20, generator=draw(0)) < 0.4, torch.rand(5, 3, 3, generator=draw(1), dtype=F64)):
        ours, theirs = L.attention_refocusing_loss(q, k, samples, spans, parts, (6, 5), scale=1.0), refocusing_by_hand(q, k, samples, spans, parts, (6, 5), 1.0)
        close(ours, theirs)
        for a, b in zip(*(torch.autograd.grad(each, (q, k), retain_graph=True) for each in (ours, theirs)), strict=True):
            close(a, b)
    order = torch.tensor([4, 2, 0, 3, 1])
    close(L.attention_refocusing_loss(q, k, samples[order], spans[order], parts[order], (6, 5), scale=1.0), ours)


def test_refocusing_without_groups_is_0_and_so_is_a_map_that_is_its_mask():
    q, k = (each.requires_grad_() for each in operands(2, 2, 1, 4, 3, dtype=torch.float32))
    none = L.attention_refocusing_loss(q, k, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, 2), (2, 2))
    assert none == 0 and all(not each.any() for each in torch.autograd.grad(none, (q, k)))
    # one word takes the left half, the other the right one
    left = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    pixels = torch.where(left.flatten()[:, None].bool(), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    loss = L.attention_refocusing_loss(200 * pixels[None, None], torch.eye(2)[None, None], torch.tensor([0, 0]), torch.tensor([[0, 1], [1, 2]]), torch.stack([left, 1 - left]), (2, 2))
    assert loss == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"spans": torch.tensor([[2, 2]])}, ValueError, "spans must hold a token or more of 3"),
        ({"spans": torch.tensor([[1, 4]])}, ValueError, "spans must hold a token or more of 3"),
        ({"spans": torch.tensor([[-1, 1]])}, ValueError, "spans must hold a token or more of 3"),
        ({"spans": torch.tensor([0, 1])}, ValueError, r"spans must be \[G, 2\]"),
        ({"samples": torch.tensor([2])}, ValueError, "samples must be from 0 to 1, got"),
        ({"samples": torch.tensor([0.0])}, TypeError, "samples must be an int64 tensor"),
        ({"masks": torch.zeros(1, 2, 2, dtype=torch.int64)}, TypeError, "masks must be a bool or floating-point tensor"),
        ({"masks": torch.zeros(2, 2, 2)}, ValueError, r"masks must have shape \[1, height, width\]"),
        ({"size": (2, 3)}, ValueError, r"size must be \(h, w\) with h w = 4 pixels, got \(2, 3\)"),
        ({"query": torch.zeros(2, 4, 2)}, ValueError, "query must have 4 dimensions"),
    ],
)
def test_refocusing_refuses(change, error, message):
    q, k = operands(2, 2, 1, 4, 3, dtype=torch.float32)
    given = {"query": q, "key": k, "samples": torch.tensor([0]), "spans": torch.tensor([[0, 2]]), "masks": torch.zeros(1, 2, 2), "size": (2, 2), **change}
    with pytest.raises(error, match=f"attention_refocusing_loss: {message}"):
        L.attention_refocusing_loss(**given)


# --------------------------------------------------------------------------------------------------------------------------- select_by_attention_ratio


def test_the_ratio_of_attention():
    q, k = operands(2, 4, 2, 6, 40)
    segments = torch.tensor([-1] * 4 + [0] * 9 + [1] * 12 + [2] * 10 + [-1] * 5)
    p = softmax(q, k, causal=True).mean((1, 2))
    means = torch.stack([p[:, segments == n].mean(1) for n in range(3)], 1)
    ratio = L.attention_ratio(q, k, segments, 3)
    close(ratio, means / means.sum(1, keepdim=True))
    close(ratio.sum(1), torch.ones(2, dtype=F64))
    sums = torch.stack([p[:, segments == n].sum(1) for n in range(3)], 1)
    close(L.attention_ratio(q, k, segments.expand(2, 40), 3, per_key=False), sums / sums.sum(1, keepdim=True))
    close(L.attention_ratio(q, torch.zeros_like(k), segments, 3, causal=False), torch.full((2, 3), 1 / 3, dtype=F64))
    assert not L.attention_ratio(q, k, torch.full((40,), -1), 3).any() and not L.attention_ratio(q[:, :, :0], k, segments, 3).any()


def test_answers_that_looked_elsewhere_and_were_not_sure_are_selected():
    ratio, differs = torch.tensor([0.5, 0.5, 0.5, 0.7, torch.nan, 0.5]), torch.tensor([True, False, True, True, True, True])
    log_probabilities = torch.tensor([[-0.2, -0.3, torch.nan], [-0.2, -0.3, 0], [-0.05, -0.06, 0], [-0.2, -0.3, 0], [-0.2, -0.3, 0], [0, 0, 0]])
    there = torch.tensor([[True, True, False]] * 5 + [[False, False, False]])
    chosen = L.select_by_attention_ratio(ratio, differs, log_probabilities, 0.7, answer_mask=there)
    assert chosen.tolist() == [True, False, False, False, False, False]
    assert L.select_by_attention_ratio(ratio, differs, log_probabilities, torch.full((6,), 0.8), answer_mask=there).tolist() == [True, False, False, True, False, False]
    assert L.select_by_attention_ratio(ratio, differs, log_probabilities, 0.7, answer_mask=there, least_perplexity=1.05).tolist() == [True, False, True, False, False, False]
    for change, error, message in (
        ({"differs": ratio}, TypeError, "differs must be a bool tensor"), ({"ratio": ratio[:5]}, ValueError, "log_probabilities must be"), ({"threshold": "low"}, TypeError, "threshold must be a number or a tensor"),
    ):  # fmt: skip
        with pytest.raises(error, match=f"select_by_attention_ratio: {message}"):
            L.select_by_attention_ratio(**{"ratio": ratio, "differs": differs, "log_probabilities": log_probabilities, "threshold": 0.5, **change})


def test_lse_goes_with_its_probabilities_under_autocast():
    q, k = 6 * torch.randn(1, 2, 200, 64, generator=draw(0)), 6 * torch.randn(1, 2, 200, 64, generator=draw(1))
    with torch.autocast("cpu", torch.bfloat16):
        lse = ops.masked_attention(q, k, k, return_lse=True)[1]
        columns, statistics = ops.attention_column_sum(q, k, lse=lse), ops.attention_row_statistics(q, k, lse=lse)
    torch.testing.assert_close(columns.sum(-1), torch.full((1, 2), 200.0), rtol=1e-4, atol=1e-3)
    assert columns.dtype is torch.float32 and float(statistics.maximum.max()) < 1 + 1e-5


def test_pairs_that_underflow_are_seen():
    q, k = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1), torch.tensor([0.0, 200.0]).view(1, 1, 2, 1)
    for op in (ops.attention_column_sum, reference_attention_column_sum):
        torch.testing.assert_close(op(q, k, reduction="visible_mean", scale=1.0), torch.tensor([[[0.25, 0.75]]]))


def test_weights_of_a_visible_mean_have_no_gradient():
    q, k = torch.randn(1, 1, 3, 4, requires_grad=True), torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match='attention_column_sum: weights must not require a gradient with reduction "visible_mean"'):
        ops.attention_column_sum(q, k, weights=torch.ones(1, 3, requires_grad=True), reduction="visible_mean")
    ops.attention_column_sum(q, k, weights=torch.ones(1, 3), reduction="visible_mean").sum().backward()


@pytest.mark.parametrize("op", ["masked_attention", "attention_column_sum", "attention_row_statistics"])
def test_shapes_on_the_meta_device(op):
    x = torch.empty(1, 2, 5, 8, device="meta")
    result = getattr(ops, op)(x, x, x) if op == "masked_attention" else getattr(ops, op)(x, x)
    assert (result if isinstance(result, torch.Tensor) else result[0]).device.type == "meta"
