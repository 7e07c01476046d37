"""clip_loss and siglip_loss with several positives and with negatives on both sides, against the definition written out pair by pair."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from modalign.nn import ClipLoss, SigLipLoss
from modalign.ops import clip_loss, siglip_loss
from modalign.testing import assert_bitwise_deterministic, compare_gradients, peak_memory

B, C, D = 13, 17, 8
IDS = {
    "several": (torch.arange(B) % 4, torch.arange(C) % 6),
    "one each": (torch.arange(B), torch.arange(C)),
    "all the same": (torch.full((B,), 9), torch.full((C,), 9)),
    "some left out": (
        torch.tensor([3, -100, 3, 5, -1, 7, 2**62, -(2**62), -100, 0, 5, -2, 3]),
        torch.tensor([3, 3, -100, -100, 5, -1, -1, 2**62, 8, 8, 0, -2, -(2**62), 5, 5, -100, 11]),
    ),
    "nothing in common": (torch.arange(B), torch.arange(C) + 100),
    "candidates all left out": (torch.arange(B), torch.full((C,), -100)),
}


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def problem(rows=B, columns=C):
    return [leaf(rows, D), leaf(columns, D), torch.tensor(0.7, dtype=torch.float64).requires_grad_(), torch.tensor(-0.4, dtype=torch.float64).requires_grad_()]


def is_positive(i, j, ids):
    return ids[0][i] == ids[1][j] and ids[0][i] not in (-1, -100)


def cross_entropies(z, ids, smoothing):
    """Of every row with a positive, and of every candidate with one: by the definition, one at a time."""
    rows, columns = ([i for i in range(len(each)) if each[i] != -100] for each in ids)

    def side(logits, ours, theirs, right):
        found = {}
        for i in ours:
            share = torch.tensor([float(right(i, j)) for j in theirs], dtype=z.dtype)
            if share.sum() > 0:
                label = (1 - smoothing) * share / share.sum() + smoothing / len(theirs)
                found[i] = -(label * logits[i, theirs].log_softmax(0)).sum()
        return found

    return side(z, rows, columns, lambda i, j: is_positive(i, j, ids)), side(z.T, columns, rows, lambda j, i: is_positive(i, j, ids))


def mean(values):
    return sum(values) / max(len(values), 1)


def softplus_sum(z, ids, i):
    """All that row i asks of the candidates of the sigmoid loss."""
    return sum(F.softplus(z[i, j]) - (z[i, j] if is_positive(i, j, ids) else 0) for j in range(z.shape[1]) if ids[1][j] != -100)


def assert_same(ours, theirs, leaves, tolerance=1e-10):
    assert torch.allclose(ours, torch.as_tensor(theirs, dtype=ours.dtype), rtol=tolerance, atol=tolerance)
    depends = isinstance(theirs, torch.Tensor) and theirs.requires_grad
    expected = torch.autograd.grad(theirs, leaves, allow_unused=True, retain_graph=True) if depends else [None] * len(leaves)
    for a, e in zip(torch.autograd.grad(ours, leaves, retain_graph=True), expected, strict=True):
        assert torch.allclose(a, torch.zeros_like(a) if e is None else e, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------------------------------- definition


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("which", IDS)
def test_softmax_by_the_definition(which, smoothing):
    x, y, s, b = leaves = problem()
    z = s * x @ y.T + b
    rows, columns = cross_entropies(z, IDS[which], smoothing)
    for direction, expected in (
        ("rows", mean(rows.values())),
        ("columns", mean(columns.values())),
        ("both", mean(rows.values()) / 2 + mean(columns.values()) / 2),
    ):
        options = {"logit_scale": s, "logit_bias": b, "positive_ids": IDS[which], "label_smoothing": smoothing, "direction": direction}
        assert_same(clip_loss(x, y, **options), expected, leaves)
        parts = {"rows": sum(rows.values()), "columns": sum(columns.values()), "both": (sum(rows.values()) + sum(columns.values())) / 2}
        assert_same(clip_loss(x, y, reduction="sum", **options), parts[direction], leaves)
        if direction != "both":
            each, found = clip_loss(x, y, reduction="none", **options), rows if direction == "rows" else columns
            assert each.shape == (B if direction == "rows" else C,)
            assert torch.allclose(each, torch.stack([found.get(i, z.new_zeros(())) for i in range(len(each))]))


@pytest.mark.parametrize("which", IDS)
def test_sigmoid_by_the_definition(which):
    x, y, s, b = leaves = problem()
    ids, z = IDS[which], s * x @ y.T + b
    each = torch.stack([z.new_zeros(()) + softplus_sum(z, ids, i) if ids[0][i] != -100 else z.new_zeros(()) for i in range(B)])
    options = {"logit_scale": s, "logit_bias": b, "positive_ids": ids}
    assert_same(siglip_loss(x, y, **options), each.sum() / (ids[0] != -100).sum(), leaves)
    assert_same(siglip_loss(x, y, reduction="sum", **options), each.sum(), leaves)
    assert torch.allclose(siglip_loss(x, y, reduction="none", **options), each, atol=1e-12)


@pytest.mark.parametrize("which", ["several", "some left out"])
@pytest.mark.parametrize("sides", [(5, 0), (0, 6), (5, 6)])
def test_negatives_of_both_sides_by_the_definition(which, sides):
    x, y, s, b = leaves = problem()
    more = [leaf(size, D) if size else None for size in sides]
    leaves += [each for each in more if each is not None]
    everyone = [torch.cat([side, extra]) if extra is not None else side for side, extra in zip((x, y), more, strict=True)]
    ids = [torch.cat([each, torch.full((size,), -1)]) for each, size in zip(IDS[which], sides, strict=True)]
    z = s * everyone[0] @ everyone[1].T + b
    rows, columns = cross_entropies(z, ids, 0.1)
    options = {"logit_scale": s, "logit_bias": b, "positive_ids": IDS[which], "negatives": tuple(more)}
    assert_same(clip_loss(x, y, label_smoothing=0.1, **options), mean(rows.values()) / 2 + mean(columns.values()) / 2, leaves)
    of_x = sum(softplus_sum(z[:B], ids, i) for i in range(B) if ids[0][i] != -100)
    of_more = sum((F.softplus(z[i, j]) for i in range(B, len(z)) for j in range(C) if ids[1][j] != -100), torch.zeros(()))
    assert_same(siglip_loss(x, y, **options), (of_x + of_more) / (IDS[which][0] != -100).sum(), leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_negatives_of_both_sides_beside_a_target(reduction):
    x, y, s, b = leaves = problem()
    more_x, more_y = leaf(4, D), leaf(6, D)
    leaves += [more_x, more_y]
    target = torch.tensor([0, 16, 2, 2, -100, 5, 6, -1, 8, 9, 10, 11, 12])
    labelled = [i for i in range(B) if target[i] >= 0]
    z = s * torch.cat([x, more_x]) @ torch.cat([y, more_y]).T + b
    inside = [i for i in range(B + 4) if i != 4]
    each = [(z[i].logsumexp(0) + z[inside, target[i]].logsumexp(0)) / 2 - z[i, target[i]] for i in labelled]
    options = {"logit_scale": s, "logit_bias": b, "target": target, "negatives": (more_x, more_y), "reduction": reduction}
    assert_same(clip_loss(x, y, **options), sum(each) / (len(each) if reduction == "mean" else 1), leaves)
    options["reduction"] = "none"
    assert torch.allclose(clip_loss(x, y, **options)[labelled], torch.stack(each)) and clip_loss(x, y, **options).shape == (B,)
    options["reduction"] = reduction
    pairs = F.softplus(z[[i for i in range(B) if i != 4]]).sum() - sum(z[i, target[i]] for i in labelled) + F.softplus(z[B:, :C]).sum()
    assert_same(siglip_loss(x, y, **options), pairs / (B - 1 if reduction == "mean" else 1), leaves)


# --------------------------------------------------------------------------------------------------------------------------- what is equal to what


def test_one_positive_each_is_the_target():
    x, y, s, b = leaves = problem(B, B)
    order = torch.randperm(B)
    ids = torch.arange(B) * 7 - 30
    for options in ({}, {"label_smoothing": 0.1}, {"direction": "rows"}, {"direction": "columns", "reduction": "sum"}):
        options |= {"logit_scale": s, "logit_bias": b}
        expected = clip_loss(x, y, target=order, **options)
        assert_same(clip_loss(x, y, positive_ids=(ids[order], ids), **options), expected, leaves)
    assert_same(siglip_loss(x, y, logit_scale=s, logit_bias=b, positive_ids=(ids[order], ids)), siglip_loss(x, y, logit_scale=s, logit_bias=b, target=order), leaves)


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_the_sides_can_change_places(loss):
    x, y, s, b = leaves = problem(B, B)
    more, ids = (leaf(4, D), leaf(6, D)), (IDS["several"][0], torch.arange(B) % 6)
    here = loss(x, y, logit_scale=s, logit_bias=b, positive_ids=ids, negatives=more)
    there = loss(y, x, logit_scale=s, logit_bias=b, positive_ids=ids[::-1], negatives=more[::-1])
    assert_same(here, there, [*leaves, *more])


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_what_takes_no_part_is_as_if_it_were_not_there(loss):
    x, y, s, b = leaves = problem()
    ids = IDS["some left out"]
    here = [each != -100 for each in ids]
    more = (leaf(3, D), leaf(4, D))
    options = {"logit_scale": s, "logit_bias": b, "negatives": more, "normalize": True}
    expected = loss(x[here[0]], y[here[1]], positive_ids=(ids[0][here[0]], ids[1][here[1]]), **options)
    assert_same(loss(x, y, positive_ids=ids, **options), expected, [*leaves, *more])
    for bad in (torch.nan, torch.inf, 1e30):
        dirty = [torch.where(part[:, None], side, bad).detach().requires_grad_() for part, side in zip(here, (x, y), strict=True)]
        value = loss(*dirty, positive_ids=ids, **options)
        assert torch.allclose(value, expected)
        for gradient, part in zip(torch.autograd.grad(value, dirty), here, strict=True):
            assert torch.isfinite(gradient).all() and (gradient[~part] == 0).all() and (gradient[part] != 0).any()


def test_nobody_has_a_positive():
    x, y, s, b = leaves = problem()
    for ids in (IDS["nothing in common"], (torch.full((B,), -100), IDS["several"][1]), (torch.full((B,), -1), torch.full((C,), -1))):
        loss = clip_loss(x, y, logit_scale=s, logit_bias=b, positive_ids=ids, label_smoothing=0.1)
        assert loss == 0 and all((gradient == 0).all() for gradient in torch.autograd.grad(loss, leaves))
    for rows, columns in ((0, 5), (5, 0), (0, 0)):
        x, y, s, b = leaves = problem(rows, columns)
        ids = torch.arange(rows), torch.arange(columns)
        for loss in (clip_loss, siglip_loss):
            value = loss(x, y, logit_scale=s, logit_bias=b, positive_ids=ids)
            assert value == 0 and all((gradient == 0).all() for gradient in torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
@pytest.mark.parametrize("side", [0, 1])
def test_a_nan_that_takes_part_stays_visible(loss, side):
    given = [torch.randn(B, D), torch.randn(C, D)]
    given[side][6, 2] = torch.nan
    assert loss(*given, logit_scale=1.0, logit_bias=0.0, positive_ids=IDS["several"]).isnan()


def test_accuracy_counts_negatives_of_both_sides():
    x, y = torch.eye(4), torch.eye(4)
    loss, accuracy = clip_loss(x, y, logit_scale=9.0, negatives=(2 * x[:1], 2 * y[1:3]), return_accuracy=True)
    assert accuracy.tolist() == [0.5, 0.75]
    loss, accuracy = clip_loss(x, y, logit_scale=9.0, negatives=(2 * x[:1], 2 * y[1:3]), return_accuracy=True, reduction="none")
    assert accuracy.tolist() == [0.5, 0.75] and loss.shape == (4,)


# ----------------------------------------------------------------------------------------------------------------------------- digits, bits, memory


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_and_strides(loss, dtype):
    whole = [F.normalize(torch.randn(rows, 2 * 24), dim=1).to(dtype) for rows in (60, 45)]
    ids = torch.randint(0, 12, (60,)), torch.randint(0, 12, (90,))[::2]
    ids[0][::9] = -100
    ours, exact = [], []
    for found, make in ((ours, lambda t: t), (exact, torch.Tensor.double)):
        x, y, s, b = (make(t).detach().requires_grad_() for t in (*whole, torch.tensor(12.0), torch.tensor(-3.0)))
        value = loss(x[:, ::2], y[:, ::2], logit_scale=s, logit_bias=b, positive_ids=ids)
        found += [value, *torch.autograd.grad(value, [x, y, s, b])]
    assert ours[0].dtype is torch.float32 and ours[1].dtype is dtype
    assert abs(ours[0] - exact[0]) <= 1e-5 * abs(exact[0])
    for a, e in zip(ours[1:3], exact[1:3], strict=True):
        compare_gradients(a, e, dtype=dtype)
    bound = 1e-4 if loss is siglip_loss else 1e-5
    assert abs(ours[3] - exact[3]) <= bound * abs(exact[3]) and abs(ours[4] - exact[4]) <= 1e-5 * max(abs(exact[4]), 1)


def test_many_equal_ids_keep_their_digits():
    """A group of 20 000 candidates, and one of 2: sums of many numbers of one sign."""
    x, y = F.normalize(torch.rand(16, 24), dim=1), F.normalize(torch.rand(20_002, 24), dim=1)
    ids = torch.arange(16) % 2, torch.zeros(20_002, dtype=torch.int64)
    ids[1][[77, 15_000]] = 1
    ours, exact = (clip_loss(each, other, logit_scale=10.0, positive_ids=ids, direction="rows", reduction="none") for each, other in ((x, y), (x.double(), y.double())))
    assert (ours - exact).abs().max() < 1e-5


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_threads_and_runs_give_the_same_bits(loss):
    x, y, more = (torch.randn(rows, 40).requires_grad_() for rows in (301, 333, 120))
    s, b, ids = torch.tensor(0.5).requires_grad_(), torch.tensor(-1.0).requires_grad_(), (torch.randint(-1, 50, (301,)), torch.randint(0, 60, (333,)))

    def run():
        value = loss(x, y, logit_scale=s, logit_bias=b, positive_ids=ids, negatives=(more, more), **({"label_smoothing": 0.1} if loss is clip_loss else {}))
        return [value, *torch.autograd.grad(value, [x, y, more, s, b])]

    assert_bitwise_deterministic(run)


def memory_problem(name, rows, width):
    """What `peak_memory` measures in its own process."""

    def problem(n):
        torch.manual_seed(0)
        x, y = torch.randn(n, width, requires_grad=True), torch.randn(n, width, requires_grad=True)
        ids, options = torch.arange(n) // 5, {"label_smoothing": 0.1} if name == "clip_loss" else {"workspace_bytes": 0}

        def call():
            loss = {"clip_loss": clip_loss, "siglip_loss": siglip_loss}[name](x, y, logit_scale=0.1, logit_bias=0.0, positive_ids=ids, **options)
            loss.backward()
            return loss, x.grad, y.grad

        return call

    return problem(rows), problem(64)


@pytest.mark.parametrize("name", ["clip_loss", "siglip_loss"])
def test_training_memory_is_linear(name):
    width = 64
    peaks = [peak_memory("test_positives:memory_problem", name=name, rows=rows, width=width, threads=2).peak for rows in (1024, 2048, 4096, 8192)]
    assert peaks[-1] < 30 * 8192 * 2 * width * 4 + 16e6  # one float32 matrix of logits, or of pairs with one id, alone would be 268 MB
    assert peaks[-1] - peaks[-2] < 2.6 * max(peaks[-2] - peaks[-3], 3e6)


# ------------------------------------------------------------------------------------------------------------------------------------- around them


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
@pytest.mark.parametrize("by", ["ids", "place"])
def test_one_graph_for_all_sizes(loss, by):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for n in (17, 20, 23):  # no size is D, which the first trace would take for more than chance
        candidates = n + 4 if by == "ids" else n
        x, y, more_x, more_y = leaves = [torch.randn(rows, D, requires_grad=True) for rows in (n, candidates, n + 1, n + 2)]
        options = {"logit_scale": torch.tensor(2.0), "logit_bias": torch.tensor(-1.0), "negatives": (more_x, more_y)}
        if by == "ids":
            options["positive_ids"] = torch.arange(n) % 4, torch.where(torch.arange(candidates) == 2, -100, torch.arange(candidates) % 5)
        ours, expected = compiled(x, y, **options), loss(x, y, **options)
        assert torch.allclose(ours, expected)
        for a, e in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves), strict=True):
            assert torch.allclose(a, e, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_torch_func(loss):
    xs, ys, ids = torch.randn(3, B, D), torch.randn(3, C, D), torch.randint(-1, 5, (3, B))
    others = IDS["some left out"][1]

    def value(x, y, rows):
        return loss(x, y, logit_scale=0.5, logit_bias=-1.0, positive_ids=(rows, others))

    assert torch.allclose(torch.vmap(value)(xs, ys, ids), torch.stack([value(*given) for given in zip(xs, ys, ids, strict=True)]))
    for sample in zip(torch.vmap(torch.func.grad(value, argnums=(0, 1)))(xs, ys, ids), (xs, ys), strict=True):
        found, given = sample
        for k in range(3):
            fresh = [t[k].clone().requires_grad_() for t in (xs, ys)]
            expected = torch.autograd.grad(value(*fresh, ids[k]), fresh)[0 if given is xs else 1]
            assert torch.allclose(found[k], expected, atol=1e-6)


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_a_second_derivative_is_refused(loss):
    x, y, s, b = leaves = problem()
    for position in range(2):
        (first,) = torch.autograd.grad(loss(x, y, logit_scale=s, logit_bias=b, positive_ids=IDS["several"]), leaves[position], create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            torch.autograd.grad(first.sum(), leaves, allow_unused=True)


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_mixed_dtypes_under_autocast(loss):
    x, y, more = torch.randn(B, D, dtype=torch.bfloat16), torch.randn(C, D), torch.randn(5, D)
    options = {"logit_scale": 1.0, "logit_bias": -1.0, "positive_ids": IDS["several"]}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = loss(x, y, negatives=(more, more.bfloat16()), **options)
    assert torch.equal(ours, loss(x.float(), y, negatives=(more, more.bfloat16().float()), **options))


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_several_processes_are_refused(loss):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = torch.randn(4, D)
        options = {"logit_scale": 1.0, "logit_bias": 0.0, "process_group": dist.group.WORLD}
        for name, value in (("process_group must be left out together with positive_ids", {"positive_ids": torch.arange(4)}), ("negatives must be None", {"negatives": (x, None)})):
            with pytest.raises(ValueError, match=name):
                loss(x, x, **options, **value)
    finally:
        dist.destroy_process_group()


def test_modules_take_them_too():
    x, y, more = torch.randn(B, D), torch.randn(C, D), torch.randn(5, D)
    options = {"positive_ids": IDS["several"], "negatives": (more, None)}
    clip, siglip = ClipLoss(), SigLipLoss()
    assert torch.equal(clip(x, y, **options), clip_loss(x, y, logit_scale=clip.log_scale.exp(), normalize=True, **options))
    assert torch.equal(siglip(x, y, **options), siglip_loss(x, y, logit_scale=siglip.log_scale.exp(), logit_bias=siglip.bias, normalize=True, **options))


def test_streaming_is_what_positives_do():
    x, y = torch.randn(B, D), torch.randn(C, D)
    options = {"logit_scale": 1.0, "positive_ids": IDS["several"]}
    values = [clip_loss(x, y, **options, **more) for more in ({}, {"implementation": "streaming"}, {"workspace_bytes": 0})]
    assert all(torch.equal(*pair) for pair in itertools.pairwise(values))
