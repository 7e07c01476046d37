"""Search by volume: the order is that of a stable sort of all volumes, to the last tie, whatever the panels; and no matrix is stored."""

from __future__ import annotations

import itertools

import pytest
import torch

from modalign import _load, ops
from modalign.ops import Neighbors, _volume_panels, gram_target_rank, gram_topk, gram_volume, paired_gram_volume
from modalign.ops.gram_target_rank import reference_gram_target_rank
from modalign.ops.gram_topk import reference_gram_topk
from modalign.testing import Maker, devices, peak_memory

on_each_device = pytest.mark.parametrize("device", devices())
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
F64 = torch.float64
WORKSPACES = [0, 200_000, None]


def problem(B, C, D, m, dtype=torch.float32, device="cpu", seed=0, copies=True):
    """Anchors and candidates; the last third of the candidates repeats the first in another order, and candidates 1 and 2 are equal."""
    make = Maker(dtype, device, seed)
    anchor, others = make.randn(B, D), [make.randn(C, D) for _ in range(m)]
    if copies and C > 8:
        third = C // 3
        order = torch.randperm(third, generator=torch.Generator().manual_seed(seed))
        for other in others:
            other[C - third :] = other[:third][order]
            other[2] = other[1]
    return anchor, others


def matrix(anchor, others, **options):
    """All volumes as they are ranked."""
    real = F64 if anchor.dtype is F64 else torch.float32
    return gram_volume(anchor.to(real), [other.to(real) for other in others], **options)


def same(found: Neighbors, volume, k):
    """`found` is what a stable sort of the whole matrix begins with, bit for bit."""
    values, indices = volume.sort(dim=1, stable=True)
    assert found.indices.dtype is torch.int64 and torch.equal(found.indices, indices[:, :k])
    assert found.values.dtype is volume.dtype
    torch.testing.assert_close(found.values, values[:, :k], rtol=0, atol=0, equal_nan=True)


def places(volume, target):
    return (volume.argsort(dim=1, stable=True) == target[:, None]).int().argmax(1)


# ------------------------------------------------------------------------------------------------------------------------------- the definition


@on_each_device
@pytest.mark.parametrize("m", [1, 2, 3])
def test_brute_force(m, device):
    """One determinant per pair in float64 and a sort by (volume, index)."""
    B, C, D = 7, 41, 9
    anchor, others = problem(B, C, D, m, F64, device)
    first = {}  # of equal candidates
    owner = [first.setdefault(tuple(float(x) for other in others for x in other[j]), j) for j in range(C)]
    volume = [[0.0] * C for _ in range(B)]
    for i, j in itertools.product(range(B), range(C)):
        vectors = torch.stack([anchor[i], *(other[owner[j]] for other in others)]).cpu()
        volume[i][j] = torch.linalg.det(vectors @ vectors.T).sqrt().item()
    order = [sorted(range(C), key=lambda j, i=i: (volume[i][j], j)) for i in range(B)]
    assert len(set(owner)) < C
    for k in (1, 5, C):
        found = gram_topk(anchor, others, k)
        assert found.indices.tolist() == [row[:k] for row in order]
        expected = torch.tensor([[volume[i][j] for j in order[i][:k]] for i in range(B)], dtype=F64, device=device)
        torch.testing.assert_close(found.values, expected, rtol=1e-9, atol=1e-12)
    for target in torch.randint(C, (5, B), device=device):
        assert gram_target_rank(anchor, others, target).tolist() == [order[i].index(j) for i, j in enumerate(target.tolist())]


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 4, 7])
def test_the_order_of_all_volumes(m, dtype, device):
    """k through ties, k = C, panels of all sizes: the same bits as the whole matrix."""
    for B, C, D in ((1, 1, 8), (1, 300, 17), (70, 65, 12), (133, 517, 20)):
        anchor, others = problem(B, C, D, m, dtype, device, seed=C)
        volume = matrix(anchor, others)
        target = torch.randint(C, (B,), device=device)
        for workspace in WORKSPACES:
            for k in {1, min(2, C), min(10, C), min(200, C), C}:
                same(gram_topk(anchor, others, k, workspace_bytes=workspace), volume, k)
            assert torch.equal(gram_target_rank(anchor, others, target, workspace_bytes=workspace), places(volume, target)), (B, C, workspace)


@on_each_device
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_every_tie_goes_to_the_lowest_index(workspace, device):
    anchor = Maker(device=device).randn(3, 8)
    others = [Maker(device=device, seed=p).randn(1, 8).expand(150, 8) for p in (1, 2)]  # one candidate, 150 times
    for k in (1, 64, 65, 150):
        assert torch.equal(gram_topk(anchor, others, k, workspace_bytes=workspace).indices, torch.arange(k, device=device).expand(3, k))
    target = torch.tensor([0, 70, 149], device=device)
    assert torch.equal(gram_target_rank(anchor, others, target, workspace_bytes=workspace), target)


@on_each_device
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_nan_is_last_and_stays_in_its_row_and_column(workspace, m, device):
    anchor, others = problem(6, 150, 10, m, F64, device)
    clean = gram_topk(anchor, others, 150)
    anchor[2], others[-1][[4, 80]], others[0][100, 3] = float("nan"), float("nan"), float("inf")
    volume = matrix(anchor, others)
    bad = torch.tensor([4, 80, 100], device=device)
    assert volume[0].isnan().nonzero()[:, 0].tolist() == bad.tolist()
    for k in (1, 146, 147, 148, 150):
        same(gram_topk(anchor, others, k, workspace_bytes=workspace), volume, k)
    found = gram_topk(anchor, others, 150, workspace_bytes=workspace)
    assert torch.equal(found.indices[2], torch.arange(150, device=device))
    for i in (0, 1, 3, 4, 5):
        assert torch.equal(found.indices[i, -3:], bad)
        assert torch.equal(found.indices[i, :-3], clean.indices[i][~torch.isin(clean.indices[i], bad)])
    for target in (torch.full((6,), 80, device=device), torch.full((6,), 100, device=device), torch.arange(6, device=device)):
        assert torch.equal(gram_target_rank(anchor, others, target, workspace_bytes=workspace), places(volume, target))


@on_each_device
@pytest.mark.parametrize("normalize", [False, True, "root"])
def test_missing_modalities(normalize, device):
    anchor, others = problem(9, 140, 16, 3, device=device)
    present = Maker(device=device, seed=4).mask(140, 3)
    present[7] = False
    volume = matrix(anchor, others, present=present, normalize=normalize)
    assert not torch.equal(volume, matrix(anchor, others, normalize=normalize))
    target = torch.randint(140, (9,), device=device)
    holes = [torch.where(present[:, p, None], other, float("nan")) for p, other in enumerate(others)]
    for workspace in (0, None):
        for given in (others, holes):
            options = {"present": present, "normalize": normalize, "workspace_bytes": workspace}
            same(gram_topk(anchor, given, 30, **options), volume, 30)
            assert torch.equal(gram_target_rank(anchor, given, target, **options), places(volume, target))


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_plain_torch_in_float64(dtype):
    anchor, others = problem(40, 120, 24, 2, dtype, copies=False)
    present = Maker(seed=9).mask(120, 2)
    exact = reference_gram_topk(anchor.double(), [other.double() for other in others], 120, present=present)
    volume = torch.empty_like(exact.values).scatter_(1, exact.indices, exact.values)
    found = gram_topk(anchor, others, 11, present=present)
    tolerance = 1e-5 * volume.square().mean().sqrt()
    assert (found.values - exact.values[:, :11]).abs().max() <= tolerance
    assert (volume.gather(1, found.indices) - exact.values[:, :11]).abs().max() <= tolerance  # at most near ties change places
    target = torch.randint(120, (40,))
    rank = gram_target_rank(anchor, others, target, present=present)
    own = volume.gather(1, target[:, None])
    assert (rank >= (volume < own - tolerance).sum(1)).all() and (rank <= (volume <= own + tolerance).sum(1)).all()
    if dtype is F64:
        assert torch.equal(rank, reference_gram_target_rank(anchor, others, target, present=present))
        assert torch.equal(found.indices, exact.indices[:, :11])


@on_each_device
def test_more_than_eight_vectors(device):
    anchor, others = problem(20, 90, 30, 9, F64, device, copies=False)
    expected = reference_gram_topk(anchor, others, 90)
    target = torch.randint(90, (20,), device=device)
    for workspace in WORKSPACES:
        found = gram_topk(anchor, others, 7, workspace_bytes=workspace)
        assert torch.equal(found.indices, expected.indices[:, :7])
        torch.testing.assert_close(found.values, expected.values[:, :7], rtol=1e-9, atol=1e-12)
        assert torch.equal(gram_target_rank(anchor, others, target, workspace_bytes=workspace), reference_gram_target_rank(anchor, others, target))


# ------------------------------------------------------------------------------------------------------------------------------- edges, ranks


@on_each_device
def test_the_rank_is_the_place_in_the_list(device):
    anchor, others = problem(30, 90, 12, 2, device=device)
    order = gram_topk(anchor, others, 90).indices
    for place in (0, 1, 44, 89):
        assert (gram_target_rank(anchor, others, order[:, place].contiguous()) == place).all()
    target = order[:, 3].clone()
    target[[0, 5]], target[6] = -100, -1
    rank = gram_target_rank(anchor, others, target)
    assert rank.dtype is torch.int64
    assert (rank[[0, 5, 6]] == -1).all() and (rank.sum() == 27 * 3 - 3)


@on_each_device
def test_nothing_to_search(device):
    make = Maker(torch.bfloat16, device)
    for B, C, k in ((0, 5, 3), (0, 0, 0), (4, 0, 0), (4, 5, 0)):
        anchor, others = make.randn(B, 8), [make.randn(C, 8), make.randn(C, 8)]
        found = gram_topk(anchor, others, k)
        assert found.values.shape == found.indices.shape == (B, k)
        assert (found.values.dtype, found.indices.dtype) == (torch.float32, torch.int64)
    assert gram_target_rank(make.randn(0, 8), [make.randn(3, 8)], torch.empty(0, dtype=torch.int64, device=device)).shape == (0,)
    assert gram_target_rank(make.randn(2, 8), [make.randn(0, 8)], torch.tensor([-100, -1], device=device)).tolist() == [-1, -1]


def test_half_types_are_ranked_before_rounding():
    """Volumes that a half type cannot tell apart keep their order and their values."""
    anchor, others = problem(20, 400, 64, 2, torch.bfloat16, copies=False)
    found, wide = gram_topk(anchor, others, 400), gram_topk(anchor.float(), [other.float() for other in others], 400)
    assert torch.equal(found.values, wide.values) and torch.equal(found.indices, wide.indices)
    assert len(found.values[0].unique()) == 400 > len(found.values[0].bfloat16().unique())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = gram_topk(anchor.float(), [other.float() for other in others], 400)
        mixed = gram_topk(anchor.float(), others, 400)
    assert torch.equal(under.indices, wide.indices) and torch.equal(mixed.indices, wide.indices) and torch.equal(mixed.values, wide.values)


def test_views_are_read_where_they_are():
    anchor, others = problem(20, 300, 16, 2)
    target = torch.randint(300, (20,))
    expected, rank = gram_topk(anchor, others, 9, workspace_bytes=0), gram_target_rank(anchor, others, target, workspace_bytes=0)
    layouts = {
        "columns": lambda x: x.mT.contiguous().mT,
        "every other row": lambda x: torch.stack([x, -x], 1).flatten(0, 1)[::2],
        "an offset in a wider matrix": lambda x: torch.cat([x, x, x], 1)[:, 16:32],
    }
    for name, layout in layouts.items():
        a, rest = layout(anchor), [layout(other) for other in others]
        found = gram_topk(a, rest, 9, workspace_bytes=0)
        assert torch.equal(found.values, expected.values) and torch.equal(found.indices, expected.indices), name
        assert torch.equal(gram_target_rank(a, rest, target.repeat_interleave(2)[::2], workspace_bytes=0), rank), name
        assert torch.equal(a, anchor) and all(torch.equal(x, y) for x, y in zip(rest, others, strict=True)), name


def test_threads_give_the_same_bits():
    anchor, others = problem(150, 333, 40, 2)
    target, threads, found = torch.randint(333, (150,)), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for workspace in WORKSPACES:
                found.append([*gram_topk(anchor, others, 40, workspace_bytes=workspace), gram_target_rank(anchor, others, target, workspace_bytes=workspace)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, found[0], strict=True))


@pytest.mark.parametrize("instructions", _load.compiled_instruction_sets())
def test_a_pair_has_the_same_bits_in_any_panel(instructions):
    """Half of the pairs are recomputed from their vectors because they lie near zero, beside others that are not; on every path of the kernel."""
    try:
        context = _load.use_instruction_set(instructions)
    except ValueError as error:
        assert "must be one that this machine can run" in str(error)
        return
    make, B, C = Maker(seed=6), 141, 523
    centre, drawn = make.unit(40, 20), torch.randint(80, (C,), generator=torch.Generator().manual_seed(6))

    def rows(count):
        near = centre[drawn[:count] % 40] + 0.02 * make.unit(count, 20)
        return torch.where(drawn[:count, None] < 40, near, make.unit(count, 20))

    anchor, others = centre[torch.arange(B) % 40] + 0.02 * make.unit(B, 20), [rows(C) for _ in range(2)]
    for other in others:
        other[300:] = other[: C - 300]
    target = torch.arange(B)
    with context:
        volume = gram_volume(anchor, others)
        assert 0.2 < (volume < 0.05).double().mean() < 0.8
        for workspace in (0, 70_001, 333_333, None):
            same(gram_topk(anchor, others, 50, workspace_bytes=workspace), volume, 50)
            assert torch.equal(gram_target_rank(anchor, others, target, workspace_bytes=workspace), places(volume, target))


# ------------------------------------------------------------------------------------------------------------------------------- the rest of torch


def test_the_result_is_a_pytree():
    anchor, others = problem(4, 20, 8, 2)
    found = gram_topk(anchor, others, 3)
    leaves, spec = torch.utils._pytree.tree_flatten(found)
    assert len(leaves) == 2 and isinstance(torch.utils._pytree.tree_unflatten(leaves, spec), Neighbors)
    moved = found.to("meta")
    assert isinstance(moved, Neighbors) and moved.values.device.type == moved.indices.device.type == "meta"
    assert ops.Neighbors is Neighbors


def test_no_gradient_and_where_to_get_one():
    anchor, others = problem(5, 20, 8, 2, F64)
    leaves = [anchor.requires_grad_(), *(other.requires_grad_() for other in others)]
    found = gram_topk(anchor, others, 4)
    assert not found.values.requires_grad
    again = paired_gram_volume([anchor[:, None], *(other[found.indices] for other in others)])
    torch.testing.assert_close(again, found.values, rtol=1e-9, atol=1e-12)
    gradients = torch.autograd.grad(again.sum(), leaves)
    whole = torch.autograd.grad(gram_volume(anchor, others).gather(1, found.indices).sum(), leaves)
    for ours, theirs in zip(gradients, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    target = torch.arange(5)
    for op, call in (("gram_topk", lambda a: gram_topk(a, others, 3).values), ("gram_target_rank", lambda a: gram_target_rank(a, others, target))):
        with pytest.raises(RuntimeError, match=f"^{op}: forward-mode differentiation is not supported"):
            torch.func.jvp(call, (anchor.detach(),), (anchor.detach(),))


def test_compile_and_vmap():
    torch._dynamo.reset()
    compiled = torch.compile(gram_topk, backend="aot_eager", fullgraph=True)
    rank = torch.compile(gram_target_rank, backend="aot_eager")
    for C in (90, 170, 300):
        anchor, others = problem(12, C, 10, 2)
        target = torch.randint(C, (12,))
        found, expected = compiled(anchor, others, 5, workspace_bytes=0), gram_topk(anchor, others, 5)
        assert torch.equal(found.values, expected.values) and torch.equal(found.indices, expected.indices)
        assert torch.equal(rank(anchor, others, target, workspace_bytes=0), gram_target_rank(anchor, others, target))
    several = torch.stack([anchor, anchor.flip(0), -2 * anchor])
    found = torch.vmap(lambda each: gram_topk(each, others, 5, workspace_bytes=0))(several)
    for index, each in enumerate(several):
        expected = gram_topk(each, others, 5)
        assert torch.equal(found.values[index], expected.values) and torch.equal(found.indices[index], expected.indices)


A, R, T = torch.randn(4, 8), torch.randn(5, 8), torch.zeros(4, dtype=torch.int64)
SHARED = [
    (TypeError, r"anchor must be a tensor \[B, D\], got list", [1.0], [R], {}),
    (TypeError, "anchor must be float16, bfloat16, float32 or float64, got a int64 tensor", A.long(), [R], {}),
    (ValueError, r"anchor must have 2 dimensions \[B, D\], got a float32 tensor of shape \(1, 4, 8\)", A[None], [R], {}),
    (TypeError, r"others must be a sequence of tensors \[C, D\], got a float32 tensor", A, R, {}),
    (ValueError, "others must hold at least one tensor, got an empty sequence", A, [], {}),
    (TypeError, r"others\[0\] must have anchor's dtype torch.float32, got torch.float64", A, [R.double()], {}),
    (ValueError, r"others\[1\] must be on anchor's device cpu, got meta", A, [R, R.to("meta")], {}),
    (ValueError, r"others\[1\] must have anchor's width D = 8, got", A, [R, R[:, :7]], {}),
    (ValueError, r"others\[1\] must have as many candidates C as others\[0\] = 5, got", A, [R, R[:4]], {}),
    (TypeError, "present must be a bool tensor", A, [R], {"present": torch.ones(5, 1)}),
    (ValueError, r"present must have shape \[C, m\] = \[.*5, 1\], got a bool tensor of shape \(4, 5\)", A, [R], {"present": torch.ones(4, 5).bool()}),
    (ValueError, 'normalize must be False, True or "root", got str', A, [R], {"normalize": "unit"}),
    (TypeError, "workspace_bytes must be None or a whole number, got float 1000000.0", A, [R], {"workspace_bytes": 1e6}),
    (ValueError, "workspace_bytes must be at least 0, got -1", A, [R], {"workspace_bytes": -1}),
]


@pytest.mark.parametrize(("error", "message", "anchor", "others", "options"), SHARED)
@pytest.mark.parametrize(("op", "last"), [(gram_topk, 2), (gram_target_rank, T)])
def test_bad_input(op, last, error, message, anchor, others, options):
    with pytest.raises(error, match=f"^{op.__name__}: {message}"):
        op(anchor, others, last, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gram_topk(A, [R], 6), ValueError, "^gram_topk: k must be from 0 to the number of candidates C = 5, got 6"),
        (lambda: gram_topk(A, [R[:0]], 1), ValueError, "^gram_topk: k must be from 0 to the number of candidates C = 0, got 1"),
        (lambda: gram_topk(A, [R], -1), ValueError, "^gram_topk: k must be from 0 .* got -1"),
        (lambda: gram_topk(A, [R], 2.0), TypeError, "^gram_topk: k must be a whole number, got float 2.0"),
        (lambda: gram_topk(A, [R], True), TypeError, "^gram_topk: k must be a whole number, got bool True"),
        (lambda: gram_target_rank(A, [R], None), TypeError, r"^gram_target_rank: target must be an int64 tensor \[B\], got None"),
        (lambda: gram_target_rank(A, [R], T.int()), TypeError, "^gram_target_rank: target must be .* got a int32 tensor"),
        (lambda: gram_target_rank(A, [R], T[:3]), ValueError, r"^gram_target_rank: target must have shape \[B\] = \[4\], got"),
        (lambda: gram_target_rank(A, [R], T.to("meta")), ValueError, "^gram_target_rank: target must be on the device .* got meta"),
        (lambda: gram_target_rank(A, [R], T + 5), RuntimeError, "^gram_target_rank: target must be -100, -1 or from 0 to C - 1 = 4, got 5"),
        (lambda: gram_target_rank(A, [R], T - 2), RuntimeError, "^gram_target_rank: target must be .* got -2"),
    ],
)
def test_bad_numbers(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------------------------------------------------------- memory


def test_panels_fit_into_their_workspace():
    for B, C, k, workspace in itertools.product((1, 100, 5000), (1, 300, 100_000), (1, 10, 5000), (0, 1 << 16, 64 << 20)):
        if k <= C:
            rows, columns = _volume_panels.panel_sizes(B, C, k, torch.float32, workspace)
            rows, columns = min(rows, B), min(columns, C)
            least = min(64, B) * min(max(64, k), C)
            assert rows >= 1 and columns >= k
            assert 16 * rows * columns <= max(workspace, 16 * least), (B, C, k, workspace)
            if rows < B or columns < C:
                assert 16 * rows * columns >= workspace / 4, "panels may be larger"


def memory_problem(op, B, C, workspace):
    """What `peak_memory` measures in its own process."""

    def search(B, C):
        anchor, others = torch.randn(B, 16), [torch.randn(C, 16) for _ in range(2)]
        target = torch.zeros(B, dtype=torch.int64)
        if op == "gram_topk":
            return lambda: gram_topk(anchor, others, 10, workspace_bytes=workspace)
        return lambda: gram_target_rank(anchor, others, target, workspace_bytes=workspace)

    return search(B, C), search(70, 80)


@pytest.mark.parametrize("op", ["gram_topk", "gram_target_rank"])
def test_memory_is_the_workspace(op):
    """The matrix would take 134 MB."""
    small, large = (peak_memory("test_volume_search:memory_problem", op=op, B=2048, C=16384, workspace=size << 20, threads=1).peak for size in (4, 32))
    assert small < 12e6, small
    assert small < large < 48e6, large
