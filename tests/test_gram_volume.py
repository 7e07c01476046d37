"""Oracles of the Gramian volume family: what the definition implies, by hand or by identity, and the accuracy that the ops promise."""

import itertools
import math
import warnings

import pytest
import torch

from modalign import _load, ops
from modalign.ops import gram_volume, paired_gram_volume, triangle_area
from modalign.ops.gram_volume import formula_gram_volume, reference_gram_volume
from modalign.ops.paired_gram_volume import reference_paired_gram_volume
from modalign.ops.triangle_area import formula_triangle_area, reference_triangle_area
from modalign.testing import NOT_FINITE, ZERO_VOLUME, Maker, degenerate_zoo, devices, peak_memory

DEVICES = devices()
on_each_device = pytest.mark.parametrize("device", DEVICES)
F64 = torch.float64


def tuples(k, rows=6, width=24, dtype=F64, device="cpu", seed=0):
    return [Maker(dtype, device, seed + p).randn(rows, width) for p in range(k)]


def both_forms(vectors, **options):
    """The paired volume, and the diagonal of the all-pairs one (k >= 2): two kernels, one truth."""
    found = [paired_gram_volume(vectors, **options)]
    if len(vectors) > 1:
        found.append(gram_volume(vectors[0], vectors[1:], **options).diagonal())
    return found


def gradients(value, inputs, upstream=None):
    return torch.autograd.grad(value, inputs, torch.ones_like(value) if upstream is None else upstream)


def close(actual, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype, device=actual.device).expand_as(actual), rtol=rtol, atol=atol)


def random_rotation(width, device="cpu"):
    return torch.linalg.qr(torch.randn(width, width, dtype=F64)).Q.to(device)


# --------------------------------------------------------------------------------------------------------------------------------- hand-made values


@on_each_device
@pytest.mark.parametrize("k", [2, 3, 4, 5, 6, 7, 8, 9, 11])
def test_orthonormal_vectors_span_volume_one(k, device):
    axes = torch.eye(12, dtype=F64, device=device)[:k]
    for value in both_forms([axis.unsqueeze(0) for axis in axes]):
        close(value, 1.0)


def test_one_vector_spans_its_length():
    vectors = tuples(1)
    close(paired_gram_volume(vectors), vectors[0].norm(dim=-1))


@pytest.mark.parametrize("angle", [0.01, 0.3, 1.0, math.pi / 2, 3.0])
def test_two_vectors_span_the_sine(angle):
    a = torch.tensor([[2.0, 0.0, 0.0]], dtype=F64)
    b = 3 * torch.tensor([[math.cos(angle), 0.0, math.sin(angle)]], dtype=F64)
    for value in both_forms([a, b]):
        close(value, 6 * math.sin(angle))


@on_each_device
@pytest.mark.parametrize("k", range(2, 11))
@pytest.mark.parametrize("c", [-0.1, 0.0, 0.5, 0.9])
def test_equicorrelated_vectors(k, c, device):
    gram = torch.full((k, k), c, dtype=F64) + (1 - c) * torch.eye(k, dtype=F64)
    vectors = torch.linalg.cholesky(gram) @ random_rotation(16)[:k]
    expected = math.sqrt((1 - c) ** (k - 1) * (1 + (k - 1) * c))
    for value in both_forms([vector.unsqueeze(0).to(device) for vector in vectors]):
        close(value, expected)


def test_brute_force_determinant():
    """All pairs, one k x k determinant each."""
    A, R = tuples(1, 5)[0], tuples(3, 7, seed=3)
    expected = torch.empty(5, 7, dtype=F64)
    for i, j in itertools.product(range(5), range(7)):
        M = torch.stack([A[i], *(r[j] for r in R)])
        expected[i, j] = torch.linalg.det(M @ M.T).sqrt()
    close(gram_volume(A, R), expected)
    close(gram_volume(A, R, squared=True), expected**2)
    close(reference_gram_volume(A, R), expected)
    close(formula_gram_volume(A, R), expected)


# -------------------------------------------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("k", [3, 5, 8, 9])
def test_permuting_the_modalities_changes_nothing(k):
    vectors = tuples(k)
    expected = paired_gram_volume(vectors)
    for order in (list(reversed(range(k))), [*range(1, k), 0], [1, 0, *range(2, k)]):
        for value in both_forms([vectors[p] for p in order]):  # also who is the anchor
            close(value, expected)
    others = vectors[1:]
    close(gram_volume(vectors[0], others[::-1]), gram_volume(vectors[0], others))


@pytest.mark.parametrize("k", [2, 4, 8, 9])
def test_rotation_changes_nothing(k):
    vectors, rotation = tuples(k), random_rotation(24)
    close(gram_volume(vectors[0] @ rotation, [v @ rotation for v in vectors[1:]]), gram_volume(vectors[0], vectors[1:]))
    close(paired_gram_volume([v @ rotation for v in vectors]), paired_gram_volume(vectors))


@pytest.mark.parametrize("k", [2, 4, 8, 9])
def test_sign_flips_change_nothing(k):
    vectors = tuples(k)
    for p in range(k):
        flipped = [-v if q == p else v for q, v in enumerate(vectors)]
        assert torch.equal(paired_gram_volume(flipped), paired_gram_volume(vectors))
        assert torch.equal(gram_volume(flipped[0], flipped[1:]), gram_volume(vectors[0], vectors[1:]))


@pytest.mark.parametrize("k", [2, 3, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_homogeneous_of_degree_one_in_every_vector(k, dtype):
    """Scaling by a power of two is exact, so equality is too: no absolute threshold hides anywhere."""
    vectors = tuples(k, dtype=dtype)
    for p in {0, 1, k - 1}:
        for factor in (2.0**-12, 2.0**9):
            scaled = [factor * v if q == p else v for q, v in enumerate(vectors)]
            assert torch.equal(paired_gram_volume(scaled), factor * paired_gram_volume(vectors))
            assert torch.equal(gram_volume(scaled[0], scaled[1:]), factor * gram_volume(vectors[0], vectors[1:]))
            assert torch.equal(gram_volume(scaled[0], scaled[1:], squared=True), factor**2 * gram_volume(vectors[0], vectors[1:], squared=True))


@pytest.mark.parametrize("k", [2, 3, 5, 8, 9])
def test_hadamard_and_the_chain_of_bounds(k):
    vectors = tuples(k)
    value = paired_gram_volume(vectors)
    lengths = torch.stack([v.norm(dim=-1) for v in vectors])
    assert (value >= 0).all() and (value <= lengths.prod(0)).all()
    assert (value <= paired_gram_volume(vectors[:-1]) * lengths[-1]).all()
    orthogonal = torch.linalg.qr(torch.stack(vectors, -1)).Q.unbind(-1)
    scaled = [length.unsqueeze(-1) * q for length, q in zip(lengths, orthogonal, strict=True)]
    for value in both_forms(scaled):
        close(value, lengths.prod(0))


@pytest.mark.parametrize("k", [2, 4, 8, 9])
def test_adding_a_multiple_of_another_vector_changes_nothing(k):
    vectors = tuples(k)
    for p, q in ((0, 1), (k - 1, 0), (1, k - 1)):
        if p != q:
            sheared = [v + 1.7 * vectors[q] if index == p else v for index, v in enumerate(vectors)]
            for value, expected in zip(both_forms(sheared), both_forms(vectors), strict=True):
                close(value, expected)


def test_paired_is_the_diagonal_of_all_pairs():
    vectors = tuples(4, rows=9)
    mask = Maker().mask(9, 4)
    mask[:, 0] = True
    close(gram_volume(vectors[0], vectors[1:], present=mask[:, 1:]).diagonal(), paired_gram_volume(vectors, present=mask))


def test_squared_is_the_square():
    vectors = tuples(4)
    close(gram_volume(vectors[0], vectors[1:], squared=True), gram_volume(vectors[0], vectors[1:]) ** 2)
    close(paired_gram_volume(vectors, squared=True), paired_gram_volume(vectors) ** 2)


def test_normalize_is_the_volume_of_unit_vectors():
    vectors = [3 * v for v in tuples(4)]
    unit = [v / v.norm(dim=-1, keepdim=True) for v in vectors]
    close(gram_volume(vectors[0], vectors[1:], normalize=True), gram_volume(unit[0], unit[1:]))
    close(paired_gram_volume(vectors, normalize=True), paired_gram_volume(unit))


def test_root_counts_the_vectors_that_are_present():
    vectors, mask = tuples(4, rows=7), Maker().mask(7, 3)
    exponent = 1 / (1 + mask.sum(-1).double())
    close(gram_volume(vectors[0], vectors[1:], present=mask, normalize="root"), gram_volume(vectors[0], vectors[1:], present=mask) ** exponent)
    close(gram_volume(vectors[0], vectors[1:], normalize="root"), gram_volume(vectors[0], vectors[1:]) ** 0.25)
    close(
        paired_gram_volume(vectors[1:], present=mask, normalize="root"),
        paired_gram_volume(vectors[1:], present=mask) ** (1 / mask.sum(-1).clamp(min=1).double()),
    )


def test_several_tokens_are_batches():
    A, R = torch.randn(5, 3, 16, dtype=F64), [torch.randn(5, 4, 16, dtype=F64) for _ in range(2)]
    looped = torch.stack([gram_volume(a, list(r)) for a, *r in zip(A, *R, strict=True)])
    assert torch.equal(gram_volume(A, R), looped)
    shared = gram_volume(A, [r[0] for r in R])  # the same candidates for all
    assert torch.equal(shared, torch.stack([gram_volume(a, [r[0] for r in R]) for a in A]))


# ---------------------------------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("k", [2, 3, 5, 8, 9])
def test_euler_and_the_biorthogonality_of_the_gradient(k):
    """x_q . dV/dx_p = V delta_pq, hence sum_p x_p . dV/dx_p = k V."""
    vectors = [v.requires_grad_() for v in tuples(k)]
    for value in both_forms(vectors):
        grads = gradients(value, vectors)
        for p, q in itertools.product(range(k), range(k)):
            close((vectors[q] * grads[p]).sum(-1), value.detach() if p == q else 0.0, atol=1e-8)
        close(sum((v * g).sum(-1) for v, g in zip(vectors, grads, strict=True)), k * value.detach(), rtol=1e-8)


@pytest.mark.parametrize("k", [2, 4, 8, 9])
def test_gradient_is_bounded_by_the_other_lengths(k):
    vectors = [v.requires_grad_() for v in Maker(torch.float32).nearly_collinear(k, 12, 64, 0.02)]
    for p, gradient in enumerate(gradients(paired_gram_volume(vectors), vectors)):
        others = torch.stack([v.norm(dim=-1) for q, v in enumerate(vectors) if q != p]).prod(0)
        assert (gradient.norm(dim=-1) <= others * (1 + 1e-4)).all()


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_gradient_of_all_pairs_is_autograds(m, squared):
    """Closed form against autograd through Gram-Schmidt: rectangular, masked, not unit."""
    inputs = [v.requires_grad_() for v in (tuples(1, 7)[0], *tuples(m, 11, seed=5))]
    mask, W = Maker().mask(11, m), torch.randn(7, 11, dtype=F64)
    ours = gradients(gram_volume(inputs[0], inputs[1:], present=mask, squared=squared), inputs, W)
    theirs = gradients(reference_gram_volume(inputs[0], inputs[1:], present=mask, squared=squared), inputs, W)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, rtol=1e-9, atol=1e-9)


def test_eps_bounds_the_gradient_near_zero():
    """Two unit vectors at angle t: |dV/da| is 1 at any angle; with sqrt(eps) = 0.1 it is sin(t) / 0.1 once sin(t) < 0.1."""
    angle = 1e-3
    a = torch.tensor([[1.0, 0.0]], dtype=F64, requires_grad=True)
    b = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=F64)
    (usual,) = gradients(gram_volume(a, [b]), a)
    (bounded,) = gradients(gram_volume(a, [b], eps=1e-2), a)
    close(usual.norm(), 1.0)
    close(bounded, usual * math.sin(angle) / 0.1)


def test_formula_has_the_nan_gradients_that_we_do_not():
    a = torch.ones(1, 4, requires_grad=True)
    assert gradients(formula_gram_volume(a, [torch.ones(1, 4)]), a)[0].isnan().all()
    assert torch.equal(gradients(gram_volume(a, [torch.ones(1, 4)]), a)[0], torch.zeros(1, 4))


# ------------------------------------------------------------------------------------------------------------------------------- missing modalities


@on_each_device
@pytest.mark.parametrize("m", [2, 3, 7, 8])
def test_missing_modalities_are_left_out_of_the_determinant(m, device):
    A, R = tuples(1, 5, device=device)[0], tuples(m, 9, device=device, seed=3)
    mask = Maker(device=device).mask(9, m, probability=0.6)
    mask[0] = False
    value = gram_volume(A, R, present=mask)
    for j in range(9):
        there = [r[j : j + 1] for p, r in enumerate(R) if mask[j, p]]
        close(value[:, j], gram_volume(A, there)[:, 0] if there else A.norm(dim=-1))


@pytest.mark.parametrize("k", [3, 9])
@pytest.mark.parametrize("options", [{}, {"squared": True}, {"normalize": True}, {"normalize": "root"}])
def test_absent_content_never_matters(k, options):
    """NaN, Inf and zeros behind the mask give the same bits, and exactly zero gradient."""
    vectors, mask = tuples(k, rows=7, width=16, dtype=torch.float32), Maker().mask(7, k, probability=0.5)
    mask[:, 0] = True

    def run(filler):
        filled = [torch.where(mask[:, p, None], v, filler).requires_grad_() for p, v in enumerate(vectors)]
        found = []
        for value in (paired_gram_volume(filled, present=mask, **options), gram_volume(filled[0], filled[1:], present=mask[:, 1:], **options)):
            grads = gradients(value, filled)
            for p, gradient in enumerate(grads):
                assert not gradient[~mask[:, p]].count_nonzero()
            found += [value, *grads]
        return found

    expected = run(1.0)
    assert all(torch.isfinite(t).all() for t in expected)
    for filler in (math.nan, math.inf, 0.0):
        for ours, theirs in zip(run(filler), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_a_sample_with_nothing_has_volume_one():
    value = paired_gram_volume(torch.randn(3, 2, 8), present=torch.tensor([[True, True], [False, False], [True, False]]))
    assert value[1] == 1


# -------------------------------------------------------------------------------------------------------------------------------------------- edges


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ZERO_VOLUME)
@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_dependent_tuples_have_volume_zero_and_gradient_zero(name, count, dtype, device):
    vectors = degenerate_zoo(Maker(dtype, device), count)[name]
    for squared in (False, True):
        inputs = [v.requires_grad_() for v in vectors]
        diagonal = gram_volume(inputs[0], inputs[1:], squared=squared).diagonal()
        for value in (paired_gram_volume(inputs, squared=squared), diagonal):
            assert not value.count_nonzero()
            for gradient in gradients(value, inputs):
                assert not gradient.count_nonzero()


@on_each_device
@pytest.mark.parametrize("m", [1, 2, 8])
def test_neighbours_of_a_degenerate_candidate_are_untouched(m, device):
    """Gradients with a dead candidate in the middle are those without it, bit for bit for the candidates."""
    A = torch.randn(6, 20, device=device)
    R = [torch.randn(9, 20, device=device) for _ in range(m)]
    W = torch.randn(6, 9, device=device)
    dead = [r.clone() for r in R]
    dead[-1][4] = 0 if m == 1 else dead[0][4]
    keep = [0, 1, 2, 3, 5, 6, 7, 8]
    inputs = [A.requires_grad_(), *(r.requires_grad_() for r in dead)]
    value = gram_volume(inputs[0], inputs[1:])
    assert not value[:, 4].count_nonzero()
    anchor, *others = gradients(value, inputs, W)
    without = [A.detach().requires_grad_(), *(r.detach()[keep].requires_grad_() for r in dead)]
    anchor_without, *others_without = gradients(gram_volume(without[0], without[1:]), without, W[:, keep])
    torch.testing.assert_close(anchor, anchor_without, rtol=1e-5, atol=1e-5)
    for full, rest in zip(others, others_without, strict=True):
        assert not full[4].count_nonzero()
        torch.testing.assert_close(full[keep], rest, rtol=1e-6, atol=1e-6)


@on_each_device
@pytest.mark.parametrize("name", NOT_FINITE)
@pytest.mark.parametrize("count", [2, 4, 9])
@pytest.mark.parametrize("squared", [False, True])
def test_bad_values_stay_in_their_row_and_column(name, count, squared, device):
    vectors = degenerate_zoo(Maker(device=device), count)[name]
    good = degenerate_zoo(Maker(device=device), count)["strided"]
    clean = gram_volume(good[0], good[1:], squared=squared)
    column = gram_volume(good[0], [*good[1:-1], vectors[-1]], squared=squared)  # candidate 1 is bad
    assert column[:, 1].isnan().all()
    row = gram_volume(vectors[-1], good[1:], squared=squared)  # anchor 1 is bad
    assert row[1].isnan().all() and torch.isfinite(row[[0, 2, 3, 4]]).all()
    keep = [0, 2, 3, 4]
    unaffected = gram_volume(good[0], [r[keep] for r in (*good[1:-1], vectors[-1])], squared=squared)
    torch.testing.assert_close(column[:, keep], unaffected, rtol=1e-6, atol=1e-6)
    assert clean.shape == column.shape
    paired = paired_gram_volume(vectors, squared=squared)
    assert paired[1].isnan() and torch.isfinite(paired[keep]).all()
    assert paired_gram_volume(vectors[::-1], squared=squared)[1].isnan()  # also as the first vector, before there is anything to project on


@pytest.mark.parametrize("k, width", [(3, 2), (5, 3), (8, 7), (10, 6), (10, 9)])
def test_more_vectors_than_dimensions(k, width):
    for dtype in (torch.float32, F64):
        inputs = [v.requires_grad_() for v in tuples(k, width=width, dtype=dtype)]
        for value in both_forms(inputs):
            assert not value.count_nonzero()
            for gradient in gradients(value, inputs):
                assert not gradient.count_nonzero()


def test_more_vectors_than_dimensions_is_said_once(monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules["modalign.ops.gram_volume"], "_warned_too_many_vectors", False)
    with pytest.warns(UserWarning, match="gram_volume: 3 vectors of 2 dimensions are always dependent") as caught:
        gram_volume(torch.randn(4, 2), [torch.randn(3, 2)] * 2)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gram_volume(torch.randn(4, 2), [torch.randn(3, 2)] * 2)
        paired_gram_volume(torch.randn(4, 3, 2))


def test_as_many_vectors_as_dimensions_is_the_determinant():
    M = torch.randn(6, 4, 4, dtype=F64)
    close(paired_gram_volume(M), torch.linalg.det(M).abs())


def test_rows_further_apart_than_32_bits_can_count():
    """Offsets of 2^31 elements and more in both operands; only a few pages of the storage are ever touched."""
    storage = torch.empty(2 * 2**30 + 64, dtype=torch.float16)
    far = storage.as_strided((3, 16), (2**30, 1))
    far.copy_(torch.randn(3, 16))
    near = far.contiguous()
    assert torch.equal(gram_volume(far, [far + 1, far.flip(0)]), gram_volume(near, [near + 1, near.flip(0)]))
    others = storage.as_strided((3, 16), (2**30, 1), 32)
    others.copy_(torch.randn(3, 16))
    assert torch.equal(gram_volume(near, [others]), gram_volume(near, [others.contiguous()]))
    assert torch.equal(paired_gram_volume([far, others]), paired_gram_volume([near, others.contiguous()]))
    assert torch.equal(triangle_area(near, far, others), triangle_area(near, near, others.contiguous()))


# ----------------------------------------------------------------------------------------------------------------------------------------- accuracy


def collinear(delta, rows=64, shared=False, dtype=torch.float32, device="cpu"):
    make = Maker(dtype, device, seed=7)
    if not shared:
        return make.nearly_collinear(3, rows, 512, delta)
    common = make.nearly_collinear(1, 1, 512, 0.0)[0].double()
    found = []
    for _ in range(3):
        v = common + delta * make.randn(rows, 512).double() / 512**0.5
        found.append(make.place(v / v.norm(dim=-1, keepdim=True)))
    return found


@on_each_device
@pytest.mark.parametrize("shared", [False, True], ids=["per row", "all pairs"])
@pytest.mark.parametrize("delta, bound", [(1.0, 1e-4), (0.3, 1e-4), (0.1, 1e-4), (0.03, 1e-4), (0.01, 1e-4), (0.003, 1e-3), (0.001, 1e-3)])
def test_nearly_collinear_volumes_keep_their_digits(delta, bound, shared, device):
    """Three unit vectors, a common direction plus delta times a random one, D = 512, float32. The determinant formula is off by 6e-3 at delta =
    1e-2 and by 0.8 at 1e-3."""
    vectors = collinear(delta, shared=shared, device=device)
    exact = [v.double() for v in vectors]
    pairs, expected = gram_volume(vectors[0], vectors[1:]), reference_gram_volume(exact[0], exact[1:])
    assert ((pairs - expected).abs() / expected).max() < bound
    paired, expected = paired_gram_volume(vectors), reference_paired_gram_volume(exact)
    assert ((paired - expected).abs() / expected).max() < bound


@on_each_device
@pytest.mark.parametrize("shared", [False, True], ids=["per row", "all pairs"])
@pytest.mark.parametrize("delta, bound", [(0.1, 2e-4), (0.03, 2e-4), (0.01, 2e-4), (0.003, 5e-4)])
def test_nearly_collinear_gradients_keep_their_digits(delta, bound, shared, device):
    vectors = [v.requires_grad_() for v in collinear(delta, shared=shared, device=device)]
    exact = [v.detach().double().requires_grad_() for v in vectors]
    weights = torch.eye(64, device=device) if not shared else torch.rand(64, 64, device=device) + 0.5
    ours = gradients(gram_volume(vectors[0], vectors[1:]), vectors, weights)
    theirs = gradients(reference_gram_volume(exact[0], exact[1:]), exact, weights.double())
    for a, b in zip(ours, theirs, strict=True):
        assert ((a - b).norm(dim=-1) / b.norm(dim=-1)).max() < bound
    ours, theirs = gradients(paired_gram_volume(vectors), vectors), gradients(reference_paired_gram_volume(exact), exact)
    for a, b in zip(ours, theirs, strict=True):
        assert ((a - b).norm(dim=-1) / b.norm(dim=-1)).max() < bound


@on_each_device
@pytest.mark.parametrize("k, delta, bound", [(5, 0.01, 1e-3), (8, 0.03, 1e-3), (9, 0.03, 1e-3), (12, 0.1, 1e-3)])
def test_many_nearly_collinear_vectors_keep_their_digits(k, delta, bound, device):
    """What a single Gram-Schmidt pass would lose. k > 8 is the plain-torch path."""
    vectors = [v.requires_grad_() for v in Maker(device=device, seed=k).nearly_collinear(k, 32, 256, delta)]
    exact = [v.detach().double().requires_grad_() for v in vectors]
    expected = reference_paired_gram_volume(exact)
    for value in both_forms(vectors):
        assert ((value - expected).abs() / expected).max() < bound
        for a, b in zip(gradients(value, vectors), gradients(expected, exact), strict=True):
            assert ((a - b).norm(dim=-1) / b.norm(dim=-1)).max() < 2 * bound
        expected = reference_paired_gram_volume(exact)


@on_each_device
@pytest.mark.parametrize("op, m", [("gram_volume", 3), ("gram_volume", 7), ("gram_volume_wide", 9)])
def test_basis_is_orthonormal_however_close_the_candidates(op, m, device):
    """Gram-Schmidt run once leaves Q Q^T - I of about eps / delta, 1e-3 here; run twice, a few eps. The factor gives the candidates back."""
    vectors = Maker(device=device).nearly_collinear(m, 20, 256, 1e-4)
    _, basis, factor = getattr(torch.ops.modalign, op)(vectors[0][None], [v[None] for v in vectors], None, False, 1e-12)
    basis, factor = basis[0].double(), factor[0].double()
    identity = torch.eye(m, dtype=F64, device=device)
    assert (basis @ basis.mT - identity).abs().max() < 2e-6
    assert (factor @ basis - torch.stack(vectors, 1)).abs().max() < 2e-6
    assert not factor.triu(1).count_nonzero()


def test_float64_keeps_its_digits_too():
    vectors = collinear(1e-5, dtype=F64)
    ours, paired = gram_volume(vectors[0], vectors[1:]).diagonal(), paired_gram_volume(vectors)
    close(ours, paired, rtol=1e-8, atol=0)


@pytest.mark.parametrize("delta", [1.0, 0.1, 0.01])
def test_squared_volume_to_absolute_accuracy(delta):
    vectors = collinear(delta, shared=True)
    expected = reference_gram_volume(vectors[0].double(), [v.double() for v in vectors[1:]], squared=True)
    assert (gram_volume(vectors[0], vectors[1:], squared=True) - expected).abs().max() < 2e-6


@pytest.mark.parametrize("name", _load.compiled_instruction_sets())
def test_every_instruction_set_computes_the_same(name):
    """Bits may differ between instruction sets, digits may not. A set that this machine lacks says so."""
    try:
        context = _load.use_instruction_set(name)
        context.__enter__()
    except ValueError as error:
        assert "use_instruction_set: name must be one that this machine can run" in str(error)
        return
    try:
        assert _load.instruction_set() == name
        for vectors in (collinear(1.0, rows=37), collinear(0.01, rows=37)):
            inputs = [v.requires_grad_() for v in vectors]
            exact = [v.detach().double().requires_grad_() for v in vectors]
            for function, reference in (
                (gram_volume, reference_gram_volume),
                (lambda a, r: triangle_area(a, *r), lambda a, r: reference_triangle_area(a, *r)),
            ):
                value, expected = function(inputs[0], inputs[1:]), reference(exact[0], exact[1:])
                assert (value - expected).abs().max() < 1e-6
                for a, b in zip(gradients(value.sum(), inputs), gradients(expected.sum(), exact), strict=True):
                    assert (a - b).norm() < 2e-4 * b.norm()
    finally:
        context.__exit__(None, None, None)


@pytest.mark.parametrize("m", [1, 2, 3, 5, 7])
def test_kernel_and_plain_torch_path_agree(m):
    """The path for more than 8 modalities takes fewer as well: two implementations of the same op, saved tensors included."""
    A, R = torch.randn(2, 13, 40, dtype=F64), [torch.randn(2, 17, 40, dtype=F64) for _ in range(m)]
    R[-1][0, 3] = R[0][0, 3] if m > 1 else 0
    mask, W = Maker().mask(2, 17, m), torch.randn(2, 13, 17, dtype=F64)
    for squared in (False, True):
        kernel = torch.ops.modalign.gram_volume(A, R, mask, squared, 1e-24)
        plain = torch.ops.modalign.gram_volume_wide(A, R, mask, squared, 1e-24)
        for ours, theirs in zip(kernel, plain, strict=True):
            close(ours, theirs, rtol=1e-9, atol=1e-9)
        kernel = torch.ops.modalign.gram_volume_bwd(W, A, *kernel[1:], squared, 1e-24, True, True)
        plain = torch.ops.modalign.gram_volume_wide_bwd(W, A, *plain[1:], squared, 1e-24, True, True)
        for ours, theirs in zip(kernel, plain, strict=True):
            close(ours, theirs, rtol=1e-9, atol=1e-8)


def test_plain_torch_path_works_in_row_blocks(monkeypatch):
    import sys

    inputs = [v.requires_grad_() for v in tuples(10, rows=7, width=20)]
    expected = gram_volume(inputs[0], inputs[1:])
    grads = gradients(expected.sum(), inputs)
    monkeypatch.setattr(sys.modules["modalign.ops.gram_volume"], "WIDE_BLOCK_BYTES", 0)  # one row at a time
    value = gram_volume(inputs[0], inputs[1:])
    close(value, expected)
    for ours, theirs in zip(gradients(value.sum(), inputs), grads, strict=True):
        close(ours, theirs)


# ------------------------------------------------------------------------------------------------------------------------------------------- memory


def memory_problem(B, C, D, m, layout="rows", backward=False):
    """What `peak_memory` measures in its own process."""

    def problem(B, C, D):
        def operand(rows):
            return (torch.randn(D, rows).mT if layout == "columns" else torch.randn(rows, D)).requires_grad_(backward)

        anchor, others = operand(B), [operand(C) for _ in range(m)]

        def call():
            value = gram_volume(anchor, others)
            if backward:
                value.backward(torch.ones(()).expand(B, C))
                return value.detach(), [v.grad for v in (anchor, *others)]
            return value.detach()

        return call

    return problem(B, C, D), problem(9, 7, 8)


def test_memory_is_linear_in_rows_and_columns():
    """Workspace beyond the result stays within a few copies of the operands: no intermediate per pair, no silent copy of a strided operand on top."""
    B, C, D, m = 4096, 3072, 128, 3
    operands = (B + m * C) * D * 4
    forward = peak_memory("test_gram_volume:memory_problem", B=B, C=C, D=D, m=m, layout="columns", threads=2)
    assert forward.kept < B * C * 4 + 2 * operands, forward
    assert forward.workspace < 4 * operands, forward
    both = peak_memory("test_gram_volume:memory_problem", B=B, C=C, D=D, m=m, backward=True, threads=2)
    assert both.peak < B * C * 4 + 10 * operands, both


# ------------------------------------------------------------------------------------------------------------------------------------ triangle area


def test_triangle_hand_values():
    corners = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0]], dtype=F64)
    close(triangle_area(*(c.unsqueeze(0) for c in corners)), 6.0)
    angles = torch.tensor([0.0, 2 * math.pi / 3, 4 * math.pi / 3], dtype=F64)  # equilateral on the unit circle
    circle = torch.stack([angles.cos(), angles.sin()], -1)
    close(triangle_area(*(c.unsqueeze(0) for c in circle)), 3 * math.sqrt(3) / 4)
    close(triangle_area(*(c.unsqueeze(0) for c in circle), squared=True), 27 / 16)


def test_triangle_is_half_the_volume_of_two_edges():
    a, u, v = tuples(3)
    expected = paired_gram_volume([a - u, a - v]) / 2
    close(triangle_area(a, u, v).diagonal(), expected)
    close(triangle_area(a, u, v, squared=True).diagonal(), expected**2)


def test_triangle_formulas_agree():
    a, u, v = tuples(1, 5)[0], *tuples(2, 7, seed=4)
    close(triangle_area(a, u, v), reference_triangle_area(a, u, v))
    close(triangle_area(a, u, v), formula_triangle_area(a, u, v))


def test_triangle_moves_freely():
    points, rotation, shift = tuples(3), random_rotation(24), torch.randn(24, dtype=F64)
    expected = triangle_area(*points)
    close(triangle_area(*(p @ rotation + shift for p in points)), expected)
    close(triangle_area(points[0], points[2], points[1]), expected)
    for order in itertools.permutations(range(3)):  # which corner is the anchor
        close(triangle_area(*(points[i] for i in order)).diagonal(), expected.diagonal())
    for factor in (0.25, 8.0):
        assert torch.equal(triangle_area(*(factor * p for p in points)), factor**2 * expected)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_collinear_points_have_no_area_and_no_gradient(dtype, device):
    a, v = torch.randn(5, 8, dtype=dtype, device=device), torch.randn(5, 8, dtype=dtype, device=device)
    cases = {
        "u = v": (a, v, v),
        "all the same": (a, a, a),
        "a = u": (a, a, v),
        "a multiple": (a, 2 * a, -4 * a),
        "origin": (torch.zeros_like(a), a, 2 * a),
    }
    for name, points in cases.items():
        inputs = [p.clone().requires_grad_() for p in points]
        for squared in (False, True):
            value = triangle_area(*inputs, squared=squared).diagonal()
            assert not value.count_nonzero(), name
            assert not any(g.count_nonzero() for g in gradients(value, inputs)), name


def test_triangle_gradient_is_half_the_base_along_the_height():
    a, u, v = (p.requires_grad_() for p in tuples(3))
    value = triangle_area(a, u, v).diagonal()
    grad_a, grad_u, grad_v = gradients(value, (a, u, v))
    base = (u - v).detach()
    n = base / base.norm(dim=-1, keepdim=True)
    height = (a - u).detach()
    height = height - (height * n).sum(-1, keepdim=True) * n
    close(grad_a, base.norm(dim=-1, keepdim=True) / 2 * height / height.norm(dim=-1, keepdim=True))
    close(grad_a + grad_u + grad_v, torch.zeros_like(a))  # moving all three together changes nothing


@pytest.mark.parametrize("delta, bound", [(0.1, 1e-4), (0.01, 1e-4), (0.001, 1e-3)])
def test_nearly_degenerate_triangles_keep_their_digits(delta, bound):
    """Corners within delta of one another far from the origin: |a - u|^2 from squares would lose everything."""
    vectors = [v.requires_grad_() for v in collinear(delta)]
    exact = [v.detach().double().requires_grad_() for v in vectors]
    value, expected = triangle_area(*vectors).diagonal(), reference_triangle_area(*exact).diagonal()
    assert ((value - expected).abs() / expected).max() < bound
    for a, b in zip(gradients(value, vectors), gradients(expected, exact), strict=True):
        assert ((a - b).norm(dim=-1) / b.norm(dim=-1)).max() < 5 * bound


def test_triangle_bad_values_stay_in_their_row_and_column():
    a, u, v = (Maker(seed=s).randn(5, 16) for s in range(3))
    for bad in (math.nan, math.inf):
        for index in range(3):
            points = [a.clone(), u.clone(), v.clone()]
            points[index][1, 3] = bad
            value = triangle_area(*points)
            where = (1, slice(None)) if index == 0 else (slice(None), 1)
            assert value[where].isnan().all()
            value[where] = 0
            assert torch.isfinite(value).all()


@on_each_device
@pytest.mark.parametrize("dtype, huge", [(torch.float32, 1e20), (torch.bfloat16, 1e20), (torch.float64, 1e160)])
def test_an_overflow_is_never_a_perfect_match(dtype, huge, device):
    """Squared lengths beyond the accumulation type: infinite or NaN, as from the formula, not volume 0."""
    anchor, other = torch.zeros(2, 8, dtype=dtype, device=device), torch.zeros(1, 8, dtype=dtype, device=device)
    anchor[0, 0], anchor[1, 0], other[0, 1] = huge, 1, 1
    for value in (gram_volume(anchor, [other]), 2 * triangle_area(anchor, other, -other)):
        assert not torch.isfinite(value[0]).any() and torch.isfinite(value[1]).all()


@on_each_device
@pytest.mark.parametrize("upstream", [torch.ones, torch.randn])
def test_gradient_errors_do_not_grow_with_the_number_of_anchors(upstream, device):
    anchor, *others = (torch.nn.functional.normalize(torch.randn(n, 16, device=device), dim=-1) for n in (20_000, 8, 8))
    weight = upstream(20_000, 8, device=device)
    inputs = [anchor, *others]
    exact = [v.double().requires_grad_() for v in inputs]
    wanted = torch.autograd.grad(reference_gram_volume(exact[0], exact[1:]), exact, weight.double())
    raised = [v.requires_grad_() for v in inputs]
    for got, want in zip(torch.autograd.grad(gram_volume(raised[0], raised[1:]), raised, weight), wanted, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.square().mean().sqrt()
