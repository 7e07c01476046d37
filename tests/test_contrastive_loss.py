"""The contrastive losses beyond the battery: closed forms, sizes, labels, ranks, memory, degenerate batches."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from contrastive_cases import CONTRASTIVE, options_of, others_of
from modalign import _load, ops
from modalign.ops import clip_loss, gram_contrastive_loss, siglip_loss, triangle_contrastive_loss
from modalign.ops._contrastive import reduce
from modalign.ops.gram_contrastive_loss import reference_gram_contrastive_loss
from modalign.testing import Maker, peak_memory

LOSSES = {case.name: case for case in CONTRASTIVE}
FORMS = {"gram_contrastive_loss": "gram", "triangle_contrastive_loss": "triangle", "clip_loss": "product", "siglip_loss": "product"}
SOFTMAX = [name for name in LOSSES if name != "siglip_loss"]


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def gradients(function, leaves):
    fresh = [leaf.clone().requires_grad_() for leaf in leaves]
    result = function(*fresh)
    return [result, *torch.autograd.grad(result, fresh)]


# ------------------------------------------------------------------------------------------------------------------------------------- closed forms


def test_two_modalities_are_infonce_on_the_sine():
    x, y = unit(37, 20), unit(37, 20)
    logits = -(1 - (x @ y.T) ** 2).sqrt() / 0.1
    expected = (F.cross_entropy(logits, torch.arange(37)) + F.cross_entropy(logits.T, torch.arange(37))) / 2
    assert torch.allclose(gram_contrastive_loss(x, [y], temperature=0.1), expected, rtol=1e-12)
    assert torch.allclose(gram_contrastive_loss(y, [x], temperature=0.1), expected, rtol=1e-12)  # rows and columns change places


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_torch(smoothing):
    a, u, v, at = unit(30, 16), unit(30, 16), unit(30, 16), torch.arange(30)

    def both(logits):
        return (F.cross_entropy(logits, at, label_smoothing=smoothing) + F.cross_entropy(logits.T, at, label_smoothing=smoothing)) / 2

    options = {"label_smoothing": smoothing}
    assert torch.allclose(gram_contrastive_loss(a, [u, v], temperature=0.2, **options), both(-ops.gram_volume(a, [u, v]) / 0.2), rtol=1e-12)
    assert torch.allclose(triangle_contrastive_loss(a, u, v, temperature=0.2, **options), both(-ops.triangle_area(a, u, v) / 0.2), rtol=1e-12)
    assert torch.allclose(clip_loss(a, u, logit_scale=14.0, **options), both(14 * a @ u.T), rtol=1e-12)


def test_one_sample_and_equal_logits():
    for B in (1, 5, 64):
        a = unit(1, 12).expand(B, 12)
        others = [unit(1, 12).expand(B, 12) for _ in range(2)]
        assert gram_contrastive_loss(a, others).item() == pytest.approx(math.log(B), abs=1e-12)
        assert triangle_contrastive_loss(a, *others).item() == pytest.approx(math.log(B), abs=1e-12)
        assert clip_loss(a, others[0], logit_scale=3.0).item() == pytest.approx(math.log(B), abs=1e-12)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "siglip_loss"])
@pytest.mark.parametrize("direction", ["both", "rows", "columns"])
def test_one_sample_has_nothing_to_learn_from(name, direction):
    """The loss is 0 whatever the vectors are, and so is the gradient: not the rounding of two halves that cancel."""
    make = Maker(torch.float32, seed=1)
    leaves = [10 * make.randn(1, 24), *(10 * other for other in others_of("triangle" if FORMS[name] != "product" else "product", make, 1, 24))]
    for smoothing in (0.0, 0.1, 0.3):
        for upstream in (1.0, 0.7):
            given = [leaf.clone().requires_grad_() for leaf in leaves]
            rest = [given[1:]] if FORMS[name] == "gram" else given[1:]
            loss = upstream * LOSSES[name].call(given[0], *rest, label_smoothing=smoothing, direction=direction, **options_of(name, make))
            assert loss.item() == 0 and not any(gradient.any() for gradient in torch.autograd.grad(loss, given))


def test_perfect_alignment_of_orthogonal_samples():
    eye, B, tau = torch.eye(6, dtype=torch.float64), 6, 0.3
    assert gram_contrastive_loss(eye, [eye.clone()], temperature=tau).item() == pytest.approx(math.log(1 + (B - 1) * math.exp(-1 / tau)), rel=1e-12)


def test_random_vectors_give_the_logarithm_of_the_batch():
    for B in (256, 512):
        loss = gram_contrastive_loss(unit(B, 512, dtype=torch.float32), [unit(B, 512, dtype=torch.float32) for _ in range(2)])
        assert loss.item() == pytest.approx(math.log(B), abs=0.05)


def test_a_bias_does_not_move_the_softmax():
    x, y = unit(20, 8), unit(20, 8)
    plain, moved = (gradients(lambda a, b, bias: clip_loss(a, b, logit_scale=5.0, logit_bias=bias), [x, y, torch.tensor(bias, dtype=torch.float64)]) for bias in (0.0, 7.0))
    for ours, theirs in zip(plain, moved, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    assert abs(moved[-1]) < 1e-12


def test_sigmoid_in_its_other_form_and_far_out():
    x, y = unit(21, 10), unit(21, 10)
    z = 4 * x @ y.T - 3
    expected = (F.softplus(z).sum() - z.diagonal().sum()) / 21
    assert torch.allclose(siglip_loss(x, y, logit_scale=4.0, logit_bias=-3.0), expected, rtol=1e-12)
    far = siglip_loss(x, y, logit_scale=4.0, logit_bias=-1e4)
    assert torch.allclose(far, -(4 * (x * y).sum(1) - 1e4).mean(), rtol=1e-12)
    for bias in (1e4, -1e4):
        for value in gradients(lambda a, b, bias=bias: siglip_loss(a.float(), b.float(), logit_scale=1e4, logit_bias=bias), [x, y]):
            assert torch.isfinite(value).all()


def test_sigmoid_shards_add_up():
    x, y = unit(24, 10), unit(24, 10)
    nobody = torch.full((24,), 0)
    whole = siglip_loss(x, y, logit_scale=4.0, logit_bias=-3.0, reduction="none")
    first = siglip_loss(x[:12], y[:12], logit_scale=4.0, logit_bias=-3.0, reduction="none")
    remote = siglip_loss(x[:12], y[12:], logit_scale=4.0, logit_bias=-3.0, target=nobody[:12], reduction="none")
    label = 4 * x[:12] @ y[12] - 3  # target 0 of the second shard is a made-up label: take it out again
    assert torch.allclose(first + remote + label, whole[:12], rtol=1e-12)


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("scale", [10.0, 14.0, 20.0, 24.0])
@pytest.mark.parametrize("shared", [False, True])
def test_a_nearly_solved_batch_keeps_its_digits(name, scale, shared):
    """Losses from 4e-3 to 4e-9: torch's log-softmax in float32 has no digit of the gradient left at 1e-7."""
    m = 1 if FORMS[name] == "product" else 2
    leaves = [F.normalize(torch.eye(64) + 0.02 * torch.randn(64, 64), dim=-1) for _ in range(1 + m)]
    options = {"logit_scale": scale} if m == 1 else {"temperature": 1 / scale}
    options |= {"target": torch.arange(64) // 2 * 2} if shared else {}

    def run(function):
        return lambda a, *rest: function(a, *([list(rest)] if FORMS[name] == "gram" else rest), **options)

    want = gradients(run(LOSSES[name].reference), [leaf.double() for leaf in leaves])
    for ours, right in zip(gradients(run(LOSSES[name].call), leaves), want, strict=True):
        assert (ours - right).abs().max() <= 2e-5 * right.abs().max()


def test_the_mean_of_many_rows_has_the_same_bits_for_any_number_of_threads():
    loss, threads = torch.rand(70_000), torch.get_num_threads()
    try:
        found = set()
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found.add(reduce(loss, torch.tensor(70_000), "mean").item())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("option", [{"gather_grad": "local"}, {"exchange": "ring"}])
def test_options_of_a_group_need_one(option):
    with pytest.raises(ValueError, match="clip_loss: process_group must be given together with gather_grad or exchange, got None"):
        clip_loss(unit(4, 8), unit(4, 8), logit_scale=1.0, **option)


# ------------------------------------------------------------------------------------------------------------------------------------- against float64


@pytest.mark.parametrize("B", [1, 2, 63, 64, 65, 129, 1000])
def test_gram_contrastive_loss_against_float64(B):
    """Loss within 1e-6 max(1, |L|) + what float32 resolves of a logit; gradients within 1e-4 of the tensor and 1e-3 of each row that matters."""
    torch.manual_seed(B)
    for C, factor, m in ((B, 1, 2), (B + 5, 1, 1), (B, 30, 3)):
        target = None if C == B else torch.randperm(C)[:B]
        leaves = [factor * unit(B, 32), *(factor * unit(C, 32) for _ in range(m))]
        for smoothing in (0.0, 0.1):
            for temperature in (0.005, 0.07, 5.0):

                def loss(function, a, *rest, target=target, smoothing=smoothing, temperature=temperature):
                    return function(a, list(rest), temperature=temperature, target=target, label_smoothing=smoothing)

                rounded = [leaf.float() for leaf in leaves]
                actual = gradients(lambda *given: loss(gram_contrastive_loss, *given), rounded)
                exact = gradients(lambda *given: loss(gram_contrastive_loss, *given), [leaf.double() for leaf in rounded])  # against autograd's in the battery
                L = exact[0].item()
                noise = 1.2e-7 * factor ** (m + 1) / temperature  # float32 does not resolve the largest logit any better
                assert abs(actual[0].item() - L) <= 1e-6 * max(1, abs(L)) + noise, (C, factor, smoothing, temperature)
                for ours, theirs in zip(actual[1:], exact[1:], strict=True):
                    ours, size = ours.double(), theirs.norm()
                    assert (ours - theirs).norm() <= (1e-4 + noise) * size + 1e-9, (C, factor, smoothing, temperature)
                    rows = theirs.norm(dim=1)
                    matter = rows > 1e-3 * rows.max()
                    assert ((ours - theirs).norm(dim=1)[matter] <= (1e-3 + noise) * rows[matter] + 1e-9).all(), (C, factor, smoothing, temperature)


@pytest.mark.parametrize("name", list(LOSSES))
def test_threads_and_runs_give_the_same_bits(name):
    make, threads = Maker(seed=3), torch.get_num_threads()
    B, C = 301, 333
    target = torch.arange(C)[-B:]
    leaves = [make.unit(B, 40), *(others_of("triangle", make, C, 40) if FORMS[name] != "product" else others_of("product", make, C, 40))]
    options = options_of(name, make)

    def run():
        return gradients(lambda a, *rest: LOSSES[name].call(a, *([list(rest)] if FORMS[name] == "gram" else rest), target=target, **options), leaves)

    found = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            found.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("instructions", _load.compiled_instruction_sets())
@pytest.mark.parametrize("name", list(LOSSES))
def test_every_instruction_set_computes_the_same(name, instructions):
    make = Maker(torch.float64, seed=5)
    leaves = [make.unit(70, 24), *(others_of("triangle", make, 70, 24) if FORMS[name] != "product" else others_of("product", make, 70, 24))]
    options = options_of(name, make)

    def run():
        return gradients(lambda a, *rest: LOSSES[name].call(a, *([list(rest)] if FORMS[name] == "gram" else rest), **options), leaves)

    expected = run()
    try:
        context = _load.use_instruction_set(instructions)
    except ValueError as error:
        assert "must be one that this machine can run" in str(error)
        return
    with context:
        actual = run()
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-11, atol=1e-13)


# ------------------------------------------------------------------------------------------------------------------- labels, absence, accuracy, NaN


def test_shared_candidates_and_ignored_rows_pair_by_pair():
    a, u, v = unit(7, 12), unit(5, 12), unit(5, 12)
    target = torch.tensor([3, 0, -100, 3, 1, 4, 0])
    z = -ops.gram_volume(a, [u, v]) / 0.2
    rows = [i for i in range(7) if target[i] >= 0]
    expected = torch.zeros(7, dtype=torch.float64)
    for i in rows:
        t = target[i]
        expected[i] = ((z[i].logsumexp(0) - z[i, t]) + (z[rows, t].logsumexp(0) - z[i, t])) / 2
    assert torch.allclose(gram_contrastive_loss(a, [u, v], temperature=0.2, target=target, reduction="none"), expected, rtol=1e-12)
    assert torch.allclose(gram_contrastive_loss(a, [u, v], temperature=0.2, target=target), expected.sum() / len(rows), rtol=1e-12)


def test_what_takes_no_part_is_never_read():
    a, u, v = unit(6, 12), unit(6, 12), unit(6, 12)
    present = torch.ones(6, 2, dtype=torch.bool)
    present[1, 0] = present[4, 0] = present[4, 1] = False
    target = torch.tensor([0, 1, 2, -100, 4, 5])

    def run(a, u, v):
        return gradients(lambda *given: gram_contrastive_loss(given[0], list(given[1:]), present=present, target=target, label_smoothing=0.1), [a, u, v])

    expected = run(a, u, v)
    for bad in (float("nan"), float("inf"), 1e30):
        b, w, x = a.clone(), u.clone(), v.clone()
        b[3] = w[1] = w[4] = x[4] = bad
        for ours, theirs in zip(run(b, w, x), expected, strict=True):
            assert torch.equal(ours, theirs)
        unit_rows = gradients(lambda *given: gram_contrastive_loss(given[0], list(given[1:]), present=present, target=target, normalize=True), [b, w, x])
        assert all(torch.isfinite(value).all() for value in unit_rows) and (unit_rows[1][3] == 0).all()
        pair = gradients(lambda *given: clip_loss(*given, logit_scale=3.0, target=target, normalize=True), [b, v])
        assert all(torch.isfinite(value).all() for value in pair) and (pair[1][3] == 0).all()
    assert (expected[1][3] == 0).all() and (expected[2][[1, 4]] == 0).all() and (expected[3][4] == 0).all()
    rest = [0, 1, 2, 5]  # row 4 has no label and stays among the rows that columns are compared with
    alone = gram_contrastive_loss(a[[0, 1, 2, 4, 5]], [u[[0, 1, 2, 5]], v[[0, 1, 2, 5]]], present=present[rest], target=torch.tensor([0, 1, 2, -100, 3]))
    assert not torch.allclose(alone, gram_contrastive_loss(a, [u, v], present=present, target=target))


@pytest.mark.parametrize("name", list(LOSSES))
def test_nan_and_overflow_stay_visible(name):
    make = Maker(seed=2)
    for bad in (float("nan"), float("inf")):
        for position in (0, 1):
            leaves = [make.unit(20, 12), *(others_of("triangle", make, 20, 12) if FORMS[name] != "product" else others_of("product", make, 20, 12))]
            leaves[position][7, 3] = bad
            loss = LOSSES[name].call(leaves[0], *([leaves[1:]] if FORMS[name] == "gram" else leaves[1:]), **options_of(name, make))
            assert not torch.isfinite(loss), (bad, position)


@pytest.mark.parametrize("name", list(LOSSES))
def test_accuracy(name):
    make = Maker(torch.float64, seed=8)
    B, C = 60, 37
    vectors = [make.unit(B, 4), *(others_of("triangle", make, C, 4) if FORMS[name] != "product" else others_of("product", make, C, 4))]
    for vector in vectors[1:]:
        vector[20] = vector[4]  # two equal candidates
    vectors[0][11] = vectors[0][30]
    z = {"gram": lambda: -ops.gram_volume(vectors[0], vectors[1:]), "triangle": lambda: -ops.triangle_area(*vectors), "product": lambda: vectors[0] @ vectors[1].T}[FORMS[name]]()
    z = z.round(decimals=12)  # equal vectors, equal logits, whatever the order of the sums
    target = torch.where(torch.rand(B) < 0.6, z.argmax(1), torch.arange(B) % C)
    target[5], target[6], target[7] = -100, 20, 4
    rest = [vectors[1:]] if FORMS[name] == "gram" else vectors[1:]
    _, accuracy = LOSSES[name].call(vectors[0], *rest, target=target, return_accuracy=True, **options_of(name, make))
    part = [i for i in range(B) if target[i] >= 0]
    first = [max(range(C), key=lambda j: (z[i, j].item(), -j)) for i in range(B)]
    rows = sum(first[i] == target[i] for i in part) / len(part)
    wanted = sorted({target[i].item() for i in part})
    columns = sum(target[max(part, key=lambda i: (z[i, j].item(), -i))] == j for j in wanted) / len(wanted)
    assert 0.3 < rows < 1 and 0 < columns < 1
    assert accuracy.tolist() == pytest.approx([float(rows), float(columns)])


def test_a_collapsed_batch_does_not_count_as_perfect():
    same = unit(1, 8).expand(10, 8)
    _, accuracy = gram_contrastive_loss(same, [same, same], return_accuracy=True)
    assert accuracy.tolist() == pytest.approx([0.1, 0.1])


# ------------------------------------------------------------------------------------------------------------------- kept products, more modalities


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_that_were_kept_give_the_same_bits(name, dtype):
    make = Maker(dtype, seed=4)
    B, C, m = 211, 233, 5 if FORMS[name] == "gram" else 2
    leaves = [make.unit(B, 24), *(make.unit(C, 24) for _ in range(m if FORMS[name] != "product" else 1))]
    target = torch.randperm(C)[:B]
    found, kept = {}, {}
    for implementation in ("streaming", "dense", "auto"):

        def loss(a, *rest, implementation=implementation):
            return LOSSES[name].call(a, *([list(rest)] if FORMS[name] == "gram" else rest), target=target, implementation=implementation, **options_of(name, make))

        saved = kept.setdefault(implementation, [])
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            found[implementation] = gradients(loss, leaves)
    for implementation in ("dense", "auto"):
        assert max(kept[implementation]) >= B * C > max(kept["streaming"])
        for ours, theirs in zip(found[implementation], found["streaming"], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("m", [8, 10])
def test_more_modalities_than_a_kernel_takes(m):
    a, others = unit(9, 24), [unit(11, 24) for _ in range(m)]
    present, target = torch.rand(11, m) > 0.2, torch.tensor([3, 3, 0, -100, 10, -1, 6, 7, 1])
    present[5] = False

    def run(function, **more):
        tau = torch.tensor(0.3, dtype=torch.float64)
        return gradients(lambda t, *given: function(given[0], list(given[1:]), temperature=t, present=present, target=target, label_smoothing=0.1, **more), [tau, a, *others])

    for ours, theirs in zip(run(gram_contrastive_loss), run(reference_gram_contrastive_loss), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------------------------- memory, training


def memory_problem(name, B, D, backward):
    """What `peak_memory` measures in its own process."""

    def problem(n):
        torch.manual_seed(0)
        vectors = [torch.randn(n, D, requires_grad=backward) for _ in range(3 if FORMS[name] != "product" else 2)]
        rest = [vectors[1:]] if FORMS[name] == "gram" else vectors[1:]
        options = {key: value.item() for key, value in options_of(name, Maker()).items()} | {"workspace_bytes": 0}

        def call():
            loss = LOSSES[name].call(vectors[0], *rest, **options)
            if backward:
                loss.backward()
            return loss, [vector.grad for vector in vectors]

        return call

    return problem(B), problem(64)


@pytest.mark.parametrize("name", list(LOSSES))
def test_training_memory_is_linear_in_the_batch(name):
    D = 64
    peaks = [peak_memory("test_contrastive_loss:memory_problem", name=name, B=B, D=D, backward=True, threads=2).peak for B in (1024, 2048, 4096, 8192)]
    assert peaks[-1] < 20 * 8192 * 3 * D * 4 + 16e6  # one float32 matrix of logits alone would be 268 MB
    assert peaks[-1] - peaks[-2] < 2.6 * max(peaks[-2] - peaks[-3], 3e6)


@pytest.mark.parametrize("name", list(LOSSES))
def test_nothing_square_is_saved(name):
    B, D = 512, 8
    make, kept = Maker(), []
    vectors = [make.unit(B, D).requires_grad_(), *(vector.requires_grad_() for vector in (others_of("triangle", make, B, D) if FORMS[name] != "product" else others_of("product", make, B, D)))]
    rest = [vectors[1:]] if FORMS[name] == "gram" else vectors[1:]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        LOSSES[name].call(vectors[0], *rest, **options_of(name, make), implementation="streaming")
    assert sum(kept) < 8 * B * D * 3


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("how", ["a zero row", "a duplicated row", "video is audio", "everything aligned"])
def test_degenerate_batches_train_on(how, normalize):
    torch.manual_seed(0)
    a, u, v = (unit(16, 8, dtype=torch.float32) for _ in range(3))
    if how == "a zero row":
        a[3] = u[5] = 0
    elif how == "a duplicated row":
        a[3], u[3], v[3] = a[2], u[2], v[2]
    elif how == "video is audio":
        v = u.clone()
    else:
        u, v = a.clone(), a.clone()
    parameters = [t.requires_grad_() for t in (a, u, v, torch.tensor(0.07))]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        loss = gram_contrastive_loss(*parameters[:1], parameters[1:3], temperature=parameters[3], normalize=normalize, label_smoothing=0.1)
        loss.backward()
        assert torch.isfinite(loss) and all(torch.isfinite(parameter.grad).all() for parameter in parameters)
        optimizer.step()
