"""Windows of neighbourhood attention against pairs looked at one by one; what they become at their limits; the order of tokens, and how many tiles it leaves; NATTEN's calls; memory."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch._subclasses import FakeTensorMode

from modalign import masks
from modalign.compat import natten
from modalign.ops import masked_attention, neighborhood_attention
from modalign.testing import Maker, peak_memory
from test_masks import neighborhood as by_hand  # one pair along one dimension, from the definition

F64 = torch.float64


def operands(grid, B=1, H=2, Hkv=2, D=8, Dv=6, dtype=F64, seed=0):
    make, N = Maker(dtype, seed=seed), math.prod(grid)
    return make.randn(B, H, N, D), make.randn(B, Hkv, N, D), make.randn(B, Hkv, N, Dv)


def kept(grid, kernel_size, dilation=None, stride=None, is_causal=None):
    """[N, N] by hand, tokens along the last dimension first."""
    ones = [1] * len(grid)
    numbers = list(zip(grid, kernel_size, dilation or ones, stride or ones, is_causal or [False] * len(grid), strict=True))
    tokens = list(itertools.product(*map(range, grid)))
    return torch.tensor([[all(by_hand(a, b, *n) for a, b, n in zip(i, j, numbers, strict=True)) for j in tokens] for i in tokens])


def attention(q, k, v, keep):
    """Softmax over what is kept, all at once; every row keeps something."""
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
    logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, -torch.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def drawn(seed):
    """A grid of one to three dimensions and everything about its windows."""
    draw = random.Random(seed)
    rank = 1 + seed % 3
    grid = [draw.randint(1, (150, 14, 6)[rank - 1]) for _ in range(rank)]
    dilation = [draw.choice([1, 1, draw.randint(1, size)]) for size in grid]
    kernel = [draw.randint(1, size // d) for size, d in zip(grid, dilation, strict=True)]
    return grid, {
        "kernel_size": kernel,
        "dilation": dilation,
        "stride": [draw.choice([1, draw.randint(1, k)]) for k in kernel],
        "is_causal": [draw.random() < 0.3 for _ in grid],
    }


@pytest.mark.parametrize("seed", range(24))
def test_windows_are_what_the_definition_says(seed):
    """Output, lse and gradients in float64."""
    grid, options = drawn(seed)
    leaves = [each.requires_grad_() for each in operands(grid, 1 + seed % 2, 4, 2, seed=seed)]
    results = []
    for out, lse in (neighborhood_attention(*leaves, grid=grid, return_lse=True, **options), attention(*leaves, kept(grid, **options))):
        total = (out * Maker(F64, seed=1).randn(*out.shape)).sum() + (lse * Maker(F64, seed=2).randn(*lse.shape)).sum()
        results.append((out, lse, *torch.autograd.grad(total, leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def tokens_of(grid):
    N, inner, along = math.prod(grid), math.prod(grid), []
    for size in grid:
        inner //= size
        along.append(torch.arange(N) // inner % size)
    return masks.tokens([0] * N, segment=0, **dict(zip("xyt", reversed(along), strict=False)))


@pytest.mark.parametrize("seed", range(30))
def test_the_mask_is_that_of_the_rule_in_another_order(seed):
    grid, options = drawn(seed)
    rule = masks.grid_shift(grid, options["kernel_size"], dilation=options["dilation"], stride=options["stride"], is_causal=options["is_causal"])
    hood = masks.neighborhood(grid, **options)
    assert torch.equal(hood.restore(hood.restore(hood.mask.dense()[0, 0], 0), 1), masks.relation({(0, 0): rule}, tokens_of(grid)).dense()[0, 0])
    x = torch.randn(2, math.prod(grid), 3)
    assert torch.equal(hood.restore(hood.arrange(x)), x)


def test_a_window_as_large_as_the_grid_is_attention():
    for grid in ((97,), (9, 12), (3, 5, 7)):
        q, k, v = operands(grid)
        torch.testing.assert_close(neighborhood_attention(q, k, v, grid=grid, kernel_size=grid), masked_attention(q, k, v), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kernel", [4, 5])
def test_a_stride_as_large_as_the_window_is_attention_in_blocks(kernel):
    """Whose last one, where the grid ends within it, is the last window that fits."""
    for L in (4 * kernel, 4 * kernel + 3):
        q, k, v = operands((L,))
        out = neighborhood_attention(q, k, v, grid=(L,), kernel_size=kernel, stride=kernel)
        for first in range(0, L, kernel):
            mine, start = slice(first, min(first + kernel, L)), min(first, L - kernel)
            theirs = slice(start, start + kernel)
            torch.testing.assert_close(out[:, :, mine], masked_attention(q[:, :, mine], k[:, :, theirs], v[:, :, theirs]), rtol=1e-12, atol=1e-13)


def test_every_query_keeps_as_many_keys():
    for seed in range(30):
        grid, options = drawn(seed)
        count = masks.neighborhood(grid, **options | {"is_causal": False}).mask.dense().sum(-1)
        assert (count == math.prod(options["kernel_size"])).all()
    hood = masks.neighborhood((9, 11), (4, 5), is_causal=True)
    rows, columns = torch.arange(9) + 1, torch.arange(11) + 1
    assert torch.equal(hood.restore(hood.mask.dense()[0, 0].sum(-1), 0), (rows.clamp(max=4)[:, None] * columns.clamp(max=5)).flatten())


def test_windows_by_hand():
    """An even one has one more on the left; at the border it is shifted, not cut; a causal one is cut."""
    zero, v = torch.zeros(1, 1, 6, 2), torch.tensor([1.0, 10, 100, 1000, 10000, 100000]).view(1, 1, 6, 1)

    def sums(**options):
        out, lse = neighborhood_attention(zero, zero, v, grid=(6,), return_lse=True, **options)
        return (out.flatten() * lse.exp().flatten()).round().int().tolist()

    assert sums(kernel_size=3) == [111, 111, 1110, 11100, 111000, 111000]
    assert sums(kernel_size=4) == [1111, 1111, 1111, 11110, 111100, 111100]
    assert sums(kernel_size=3, is_causal=True) == [1, 11, 111, 1110, 11100, 111000]
    assert sums(kernel_size=2, dilation=3) == [1001, 10010, 100100, 1001, 10010, 100100]
    assert sums(kernel_size=3, stride=3, is_causal=True) == [1, 11, 111, 1000, 11000, 111000]
    assert sums(kernel_size=3, stride=2) == [111, 111, 11100, 11100, 111000, 111000]


@pytest.mark.parametrize(("grid", "dilation"), [((103,), (4,)), ((13, 16), (3, 2)), ((4, 7, 9), (1, 2, 4))])
def test_dilation_is_attention_within_every_residue(grid, dilation):
    """Also where these have unequal sizes."""
    q, k, v = operands(grid)
    options = {"kernel_size": [min(3, size // d) for size, d in zip(grid, dilation, strict=True)], "stride": 1, "is_causal": [True] + [False] * (len(grid) - 1)}
    out = neighborhood_attention(q, k, v, grid=grid, dilation=dilation, **options).view(1, 2, *grid, -1)
    sizes = set()
    for residue in itertools.product(*map(range, dilation)):
        part = (slice(None), slice(None), *(slice(r, None, d) for r, d in zip(residue, dilation, strict=True)))
        mine = out[part]
        size = tuple(mine.shape[2:-1])
        sizes.add(size)
        alone = neighborhood_attention(*(each.view(1, 2, *grid, -1)[part].flatten(2, -2) for each in (q, k, v)), grid=size, **options)
        torch.testing.assert_close(mine.flatten(2, -2), alone, rtol=1e-12, atol=1e-13)
    assert len(sizes) > 1


def test_what_lies_outside_windows_does_not_reach_a_result():
    grid = (20, 20)
    leaves = [each.requires_grad_() for each in operands(grid, dtype=torch.float32)]
    out = neighborhood_attention(*leaves, grid=grid, kernel_size=5)
    bad = [each.detach().clone() for each in leaves]
    bad[1][:, :, 210], bad[2][:, :, 211] = torch.nan, torch.inf  # at (10, 10) and (10, 11)
    dirty = neighborhood_attention(*bad, grid=grid, kernel_size=5)
    near = torch.zeros(grid, dtype=torch.bool)
    near[8:13, 8:14] = True
    assert torch.equal(dirty[:, :, ~near.flatten()], out[:, :, ~near.flatten()]) and not dirty[:, :, near.flatten()].isfinite().all(-1).any()
    grads = torch.autograd.grad(out.view(1, 2, 20, 20, -1)[:, :, 10, 10].sum(), leaves)
    near[:], near[8:13, 8:13] = False, True
    assert not grads[2][:, :, ~near.flatten()].any() and grads[2][:, :, near.flatten()].all()


# ------------------------------------------------------------------------------------------------------------------------------------------ tiles


def tiles(mask, size=96):
    """Tiles that the kernel computes, by the rule that csrc/ops/attention_mask.h has for the ranges of a relation's tokens, and how many of them it keeps whole."""
    at = {name: n for n, name in enumerate(masks.FIELDS)}

    def ranges(fields):
        parts = [fields[0, :, first : first + size] for first in range(0, fields.shape[2], size)]
        return torch.stack([part.amin(1) for part in parts]), torch.stack([part.amax(1) for part in parts])

    computed, whole = True, True
    for first in range(0, len(mask.tensors), 4):
        (q_low, q_high), (k_low, k_high), rule = *map(ranges, mask.tensors[first : first + 2]), mask.tensors[first + 3][1].tolist()
        below, above = (a[None] - b[:, None] for a, b in ((k_low, q_high), (k_high, q_low)))  # of key - query
        name, segment = masks.NAMES[rule[0]], at["segment"]
        computed = computed & (below[..., segment] <= 0) & (above[..., segment] >= 0)
        whole = whole & (below[..., segment] == 0) & (above[..., segment] == 0)
        for n, c in enumerate("tyx"):
            p = rule[1 + 5 * n :]
            reach = rule[1 + n] if name == "grid_clip" else (p[1] + p[3]) * p[2]
            computed = computed & (below[..., at[c]] <= reach) & (above[..., at[c]] >= -reach)
            whole = whole & (below[..., at[c]] >= -reach) & (above[..., at[c]] <= reach) & (name == "grid_clip")
    return int(computed.sum()), int((computed & whole).sum())


def in_raster_order(hood):
    """The same windows for tokens as they lie."""
    return masks.Mask(
        hood.mask.queries,
        hood.mask.keys,
        tuple(hood.restore(each, 2).contiguous() if n % 4 < 2 else each for n, each in enumerate(hood.mask.tensors)),
        hood.mask.steps,
    )


@pytest.mark.parametrize(
    ("grid", "options", "ours", "raster", "shift", "of"),
    [
        ((64, 64), {"kernel_size": (7, 7)}, 253, 253, 517, 1849),  # a tile is a row and a half: as wide as the grid
        ((56, 56), {"kernel_size": (13, 13)}, 241, 289, 537, 1089),
        ((64, 64), {"kernel_size": (20, 20)}, 444, 616, 1065, 1849),
        ((128, 128), {"kernel_size": (13, 13)}, 1411, 3155, 6441, 29241),
        ((64, 64), {"kernel_size": (7, 7), "dilation": (4, 4)}, 167, 731, 1429, 1849),
        ((64, 64), {"kernel_size": (16, 16), "stride": (16, 16)}, 207, 505, 1429, 1849),
        ((16, 16, 16), {"kernel_size": (5, 5, 5)}, 353, 555, 1219, 1849),
        ((8192,), {"kernel_size": (257,), "dilation": (8,)}, 569, 1967, 3364, 7396),
        ((8192,), {"kernel_size": (513,)}, 599, 599, 1076, 7396),
    ],
    ids=str,
)
def test_fewer_tiles_are_computed(grid, options, ours, raster, shift, of):
    """Than for tokens as they lie, under these windows and under the rule grid_shift."""
    hood = masks.neighborhood(grid, **options)
    by_rule = masks.relation({(0, 0): masks.grid_shift(grid, options["kernel_size"], **{n: each for n, each in options.items() if n != "kernel_size"})}, tokens_of(grid))
    found = tiles(hood.mask)[0], tiles(in_raster_order(hood))[0], tiles(by_rule)[0], (-(-math.prod(grid) // 96)) ** 2
    assert found == (ours, raster, shift, of)


def test_blocks_that_are_tiles_are_taken_whole():
    computed, whole = tiles(masks.neighborhood((96 * 40,), 96 * 5, stride=96).mask)
    assert computed == whole == 40 * 5


def test_no_pair_is_lost_with_a_tile():
    for seed in range(20):
        grid, options = drawn(seed)
        hood = masks.neighborhood([3 * size for size in grid], **options)
        keep, N = hood.mask.dense()[0, 0], hood.mask.queries
        padded = torch.nn.functional.pad(keep, (0, -N % 96, 0, -N % 96)).unflatten(1, (-1, 96)).unflatten(0, (-1, 96))
        assert int(padded.any(3).any(1).sum()) <= tiles(hood.mask)[0]


# --------------------------------------------------------------------------------------------------------------------------------- ways to call it


def test_windows_that_are_made_once():
    """A network that arranges its tokens before its first layer, and the copies of a mask."""
    grid = (12, 15)
    q, k, v = operands(grid, Dv=8)
    first = neighborhood_attention(q, k, v, grid=grid, kernel_size=5, stride=2)
    second = neighborhood_attention(first, first, first, grid=grid, kernel_size=5, stride=2)
    hood = masks.neighborhood(grid, 5, stride=2)
    leaves, spec = torch.utils._pytree.tree_flatten(hood)
    for each in (hood, hood.to("cpu"), torch.utils._pytree.tree_unflatten(leaves, spec)):
        x = masked_attention(*(each.arrange(one) for one in (q, k, v)), each.mask)
        assert torch.equal(each.restore(masked_attention(x, x, x, each.mask)), second)
    line = masks.neighborhood((50,), 7)
    assert line.order is None and line.arrange(q) is q


def test_other_tokens_are_merged_in():
    """As the page shows it: some keys that every query sees."""
    grid = (9, 10)
    (q, k, v), (_, more_k, more_v) = operands(grid), operands((5,), seed=1)
    one, one_lse = neighborhood_attention(q, k, v, grid=grid, kernel_size=3, return_lse=True)
    two, two_lse = masked_attention(q, more_k, more_v, return_lse=True)
    weight = (one_lse - torch.logaddexp(one_lse, two_lse)).exp()[..., None]
    keep = torch.cat([kept(grid, (3, 3)), torch.ones(90, 5, dtype=torch.bool)], 1)
    want, _ = attention(q, torch.cat([k, more_k], 2), torch.cat([v, more_v], 2), keep)
    torch.testing.assert_close(weight * one + (1 - weight) * two, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_calls_of_natten(rank):
    """Heads lie last, and the stride comes before the dilation."""
    grid = (31, 9, 8)[:rank] if rank < 3 else (4, 7, 8)
    q, k, v = operands(grid, 2, 4, 2)
    theirs = [each.transpose(1, 2).unflatten(1, grid) for each in (q, k, v)]
    call = getattr(natten, f"na{rank}d")
    out, lse = call(*theirs, 3, 2, 1, (True,) + (False,) * (rank - 1), 0.2, return_lse=True)
    want, want_lse = neighborhood_attention(q, k, v, grid=grid, kernel_size=3, stride=2, is_causal=(True,) + (False,) * (rank - 1), scale=0.2, return_lse=True)
    assert out.shape == (2, *grid, 4, 6) and torch.equal(out.flatten(1, rank).transpose(1, 2), want) and torch.equal(lse.flatten(1, rank).transpose(1, 2), want_lse)
    assert torch.equal(call(*theirs, kernel_size=2, dilation=2).flatten(1, rank).transpose(1, 2), neighborhood_attention(q, k, v, grid=grid, kernel_size=2, dilation=2))
    with pytest.raises(ValueError, match=rf"natten.na{rank}d: key must have {rank + 3} dimensions \[B, grid, H, D\]"):
        call(theirs[0], theirs[1][:, 1:], theirs[2], 3)
    with pytest.raises(TypeError, match=rf"natten.na{rank}d: query must be a tensor \[B, grid, H, D\], got NoneType"):
        call(None, theirs[1], theirs[2], 3)
    with pytest.raises(TypeError, match=rf"natten.na{rank}d: return_lse must be True or False"):
        call(*theirs, 3, return_lse=1)


def test_nothing_of_queries_times_keys_is_stored():
    small, large = (peak_memory("test_neighborhood_attention:probe", side=side).peak for side in (90, 127))  # 8100 and 16129 tokens
    assert large < 2.5 * small and large < 127**4 / 2


def probe(side, D=32):
    q, k, v = (torch.randn(1, 2, side * side, D, requires_grad=True) for _ in range(3))

    def call(side):
        out = neighborhood_attention(*(each[:, :, : side * side] for each in (q, k, v)), grid=(side, side), kernel_size=9, stride=2)
        return out, torch.autograd.grad(out.sum(), (q, k, v))

    return (lambda: call(side)), (lambda: call(16))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (((4, 4), 5), {}, r"neighborhood: kernel_size \* dilation must be at most the size of the grid, got 5 \* 1 for 4"),
        (((4, 4), 2), {"stride": 3}, "neighborhood: stride must be at most kernel_size, got 3 for 2"),
        ((16, 2), {}, "neighborhood: grid must have the sizes of one to three dimensions, got 16"),
        (((4, 4), (2, 2, 2)), {}, "neighborhood: kernel_size must be one for each of 2 dimensions"),
    ],
)
def test_windows_that_are_none_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        masks.neighborhood(*arguments, **options)
