"""segment_max_similarity beyond the battery: which row is chosen, ties, NaN, empty segments, what the papers build on it, bits, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from modalign import _load, info
from modalign.ops import segment_max_similarity
from modalign.ops.segment_max_similarity import formula_segment_max_similarity, reference_segment_max_similarity
from modalign.testing import peak_memory
from segment_cases import SEGMENT_MAX_SIMILARITY

DTYPES = SEGMENT_MAX_SIMILARITY.dtypes
BACKWARD = torch.ops.modalign.segment_max_similarity_bwd


def whole(*shape: int, dtype: torch.dtype = torch.float64, limit: int = 3) -> torch.Tensor:
    """Small whole numbers: their products are exact in every dtype, and many are equal."""
    return torch.randint(-limit, limit + 1, shape).to(dtype)


def random_offsets(R: int, S: int) -> torch.Tensor:
    """Segments of any length, some of them empty."""
    return torch.cat([torch.tensor([0]), torch.randint(0, R + 1, (S - 1,)).sort().values, torch.tensor([R])])


def by_hand(x, offsets, y):
    """Every product on its own, the first of the largest."""
    products = (x.double() @ y.double().T).tolist()
    bounds = offsets.tolist()
    values, indices = [], []
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        best = [max(range(begin, end), key=lambda r, a=a: products[r][a], default=-1) for a in range(y.shape[0])]
        indices.append(best)
        values.append([products[r][a] if r >= 0 else -torch.inf for a, r in enumerate(best)])
    shape = (len(bounds) - 1, y.shape[0])
    return torch.tensor(values, dtype=torch.float64).reshape(shape), torch.tensor(indices, dtype=torch.int64).reshape(shape)


def gradients(x, offsets, y, weight):
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    return torch.autograd.grad(segment_max_similarity(x, offsets, y).values, (x, y), weight)


# -------------------------------------------------------------------------------------------------------------------------------- the chosen row


SIZES = [(1, 1, 1, 1), (40, 7, 5, 3), (500, 9, 131, 17), (1300, 300, 30, 4), (97, 2, 33, 8), (800, 1, 70, 5)]


@pytest.mark.parametrize("instructions", info.collect()["instruction_sets"]["ran_here"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_of_the_largest_products_is_chosen(dtype, instructions):
    with _load.use_instruction_set(instructions):
        for seed, (R, S, A, D) in enumerate(SIZES):
            torch.manual_seed(seed)
            x, offsets, y = whole(R, D, dtype=dtype), random_offsets(R, S), whole(A, D, dtype=dtype)
            values, indices = segment_max_similarity(x, offsets, y)
            expected = by_hand(x, offsets, y)
            assert torch.equal(values.double(), expected[0]) and torch.equal(indices, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_and_formula_choose_alike(dtype):
    torch.manual_seed(0)
    x, offsets, y = whole(90, 4, dtype=dtype), random_offsets(90, 12), whole(6, 4, dtype=dtype)
    values, indices = by_hand(x, offsets, y)
    reference = reference_segment_max_similarity(x, offsets, y)
    assert torch.equal(reference.values.double(), values) and torch.equal(reference.indices, indices)
    assert torch.equal(formula_segment_max_similarity(x, offsets, y).values.double(), values)


def test_half_types_choose_before_they_round():
    x = torch.tensor([[256.0, 0.0], [256.0, 0.5], [256.0, 0.25]], dtype=torch.bfloat16)
    values, indices = segment_max_similarity(x, torch.tensor([0, 3]), torch.ones(1, 2, dtype=torch.bfloat16))
    assert values.item() == 256 and indices.item() == 1


def test_gradients_go_to_the_chosen_rows_alone():
    for seed, (R, S, A, D) in enumerate([(60, 7, 40, 5), (700, 300, 17, 130), (300, 1, 50, 300), (40, 20, 1, 7)]):
        torch.manual_seed(seed)
        x, offsets, y = whole(R, D), random_offsets(R, S), whole(A, D)
        weight = whole(S, A)
        indices = segment_max_similarity(x, offsets, y).indices
        grad_x, grad_y = torch.zeros_like(x), torch.zeros_like(y)
        for s, a in torch.nonzero(indices >= 0).tolist():
            grad_x[indices[s, a]] += weight[s, a] * y[a]
            grad_y[a] += weight[s, a] * x[indices[s, a]]
        for dtype in DTYPES[:2]:  # whole numbers: sums in any order are exact
            ours = gradients(x.to(dtype), offsets, y.to(dtype), weight.to(dtype))
            assert torch.equal(ours[0].double(), grad_x) and torch.equal(ours[1].double(), grad_y)


# -------------------------------------------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_share_nothing(dtype):
    x = torch.ones(5, 3, dtype=dtype)
    offsets, y = torch.tensor([0, 2, 5]), torch.ones(4, 3, dtype=dtype)
    assert segment_max_similarity(x, offsets, y).indices.tolist() == [[0] * 4, [2] * 4]
    grad_x, _ = gradients(x, offsets, y, torch.ones(2, 4, dtype=dtype))
    assert grad_x[:, 0].tolist() == [4, 0, 4, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_segments(dtype):
    torch.manual_seed(0)
    x, y = torch.randn(6, 4).to(dtype), torch.randn(3, 4).to(dtype)
    offsets = torch.tensor([0, 0, 2, 2, 2, 6, 6])
    values, indices = segment_max_similarity(x, offsets, y)
    empty = torch.tensor([True, False, True, True, False, True])
    assert (values[empty] == -torch.inf).all() and (indices[empty] == -1).all() and torch.isfinite(values[~empty]).all()
    filled = segment_max_similarity(x, torch.tensor([0, 2, 6]), y)
    assert torch.equal(values[~empty], filled.values) and torch.equal(indices[~empty], filled.indices)
    weight = torch.randn(6, 3).to(dtype)
    for ours, theirs in zip(gradients(x, offsets, y, weight), gradients(x, torch.tensor([0, 2, 6]), y, weight[~empty]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_in_its_segment_and_its_column(dtype):
    torch.manual_seed(0)
    x, offsets, y = torch.randn(300, 8).to(dtype), torch.tensor([0, 4, 150, 150, 300]), torch.randn(9, 8).to(dtype)
    clean = segment_max_similarity(x, offsets, y)
    x[40], x[70] = torch.nan, torch.nan
    values, indices = segment_max_similarity(x, offsets, y)
    assert values[1].isnan().all() and (indices[1] == 40).all()
    for s in (0, 2, 3):
        assert torch.equal(values[s], clean.values[s]) and torch.equal(indices[s], clean.indices[s])
    y[5, 0] = torch.nan
    values, indices = segment_max_similarity(x[150:], torch.tensor([0, 0, 150]), y)
    assert values[:, 5].tolist()[0] == -torch.inf and values[1, 5].isnan() and indices[:, 5].tolist() == [-1, 0]
    assert not values[1, :5].isnan().any() and not values[1, 6:].isnan().any()


def test_infinite_products():
    x = torch.tensor([[-torch.inf], [-torch.inf], [1.0], [torch.inf], [torch.inf]])
    values, indices = segment_max_similarity(x, torch.tensor([0, 2, 5]), torch.ones(1, 1))
    assert values[:, 0].tolist() == [-torch.inf, torch.inf] and indices[:, 0].tolist() == [0, 3]


def test_views_are_read_where_they_are():
    torch.manual_seed(0)
    x, offsets, y = torch.randn(50, 6), random_offsets(50, 9), torch.randn(7, 6)
    expected = segment_max_similarity(x, offsets, y)
    spread = torch.stack([offsets, offsets + 99], 1)[:, 0]
    assert spread.stride() == (2,)
    for ours, theirs in zip(segment_max_similarity(x.T.contiguous().T, spread, y.repeat(1, 2)[:, :6]), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_raw_backward_checks_what_it_follows():
    x, offsets, y = torch.randn(5, 3), torch.tensor([0, 2, 5]), torch.randn(4, 3)
    values, indices = torch.ops.modalign.segment_max_similarity(x, offsets, y)
    wrong = indices.clone()
    wrong[1, 2] = 1
    for given, message in (
        (wrong, "indices must be rows of their segment or -1, got 1 in segment 1"),
        (indices.T.contiguous().T, "indices must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=f"segment_max_similarity: {message}"):
            BACKWARD(values, given, x, offsets, y, True, True)
    grad_x, grad_y = BACKWARD(values, indices, x, offsets, y, False, True)
    assert grad_x.numel() == 0 and grad_y.shape == y.shape


# ------------------------------------------------------------------------------------------------------------------------------- what is built on it


def test_regions_in_any_order():
    """Region-attribute mapping (ViLLA): the order of the regions of an image does not matter."""
    torch.manual_seed(0)
    x, offsets, y = torch.randn(40, 16), torch.tensor([0, 11, 12, 40]), torch.randn(6, 16)
    order = torch.cat([torch.randperm(11), torch.tensor([11]), 12 + torch.randperm(28)])
    plain, mixed = segment_max_similarity(x, offsets, y), segment_max_similarity(x[order], offsets, y)
    assert torch.equal(plain.values, mixed.values) and torch.equal(plain.indices, order[mixed.indices])


def test_late_interaction_of_two_items():
    """Token-wise maxima (FILIP): text tokens against the patches of every image, averaged over the tokens of a text."""
    torch.manual_seed(0)
    texts = [F.normalize(torch.randn(n, 12), dim=1) for n in (5, 9, 2)]
    images = [F.normalize(torch.randn(n, 12), dim=1) for n in (7, 3, 11, 4)]
    patches = torch.tensor([0, 7, 10, 21, 25])
    best = segment_max_similarity(torch.cat(images), patches, torch.cat(texts)).values  # [images, tokens]
    similarity = torch.stack([part.mean(1) for part in best.split([5, 9, 2], dim=1)], 1)
    expected = torch.tensor([[(text @ image.T).max(1).values.mean() for text in texts] for image in images])
    torch.testing.assert_close(similarity, expected)


def test_pooled_scores_of_a_codebook():
    """Maxima over tokens for every code (FDT): padding is left out by the offsets and cannot contribute a 0."""
    torch.manual_seed(0)
    tokens, codes = -torch.rand(2, 6, 8), torch.rand(50, 8)
    lengths = torch.tensor([4, 6])
    rows = torch.cat([tokens[i, :n] for i, n in enumerate(lengths.tolist())])
    values = segment_max_similarity(rows, torch.tensor([0, 4, 10]), codes).values
    scores = (tokens @ codes.T).masked_fill(torch.arange(6)[None, :, None] >= lengths[:, None, None], -torch.inf)
    assert (values < 0).all()
    torch.testing.assert_close(values, scores.amax(1))


def test_the_result_travels_as_a_tuple():
    x, offsets, y = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 2, 6]), torch.randn(3, 4)
    result = segment_max_similarity(x, offsets, y)
    values, indices = result
    assert values is result.values and indices is result.indices and not indices.requires_grad
    moved = result.to("cpu")
    assert type(moved) is type(result) and torch.equal(moved.values, values)
    torch._dynamo.reset()
    compiled = torch.compile(segment_max_similarity, backend="aot_eager", fullgraph=True)(x, offsets, y)
    assert torch.equal(compiled.values, values) and torch.equal(compiled.indices, indices)


# --------------------------------------------------------------------------------------------------------------------------------- bits and memory


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_segment_has_the_same_bits_whatever_surrounds_it(dtype):
    torch.manual_seed(0)
    x, offsets, y = torch.randn(1500, 40).to(dtype), random_offsets(1500, 25), torch.randn(140, 40).to(dtype)
    weight = torch.randn(25, 140).to(dtype)
    together, (grad_x, _) = segment_max_similarity(x, offsets, y), gradients(x, offsets, y, weight)
    for s in range(25):
        begin, end = offsets[s].item(), offsets[s + 1].item()
        alone = segment_max_similarity(x[begin:end], torch.tensor([0, end - begin]), y)
        assert torch.equal(alone.values[0], together.values[s])
        assert torch.equal(torch.where(alone.indices[0] < 0, -1, alone.indices[0] + begin), together.indices[s])
        assert torch.equal(gradients(x[begin:end], torch.tensor([0, end - begin]), y, weight[s : s + 1])[0], grad_x[begin:end])


def memory_problem(R, A, D, backward):
    """What `peak_memory` measures in its own process."""

    def problem(R, A):
        torch.manual_seed(0)
        x, y = torch.randn(R, D).requires_grad_(backward), torch.randn(A, D).requires_grad_(backward)
        offsets = torch.arange(0, R + 1, 100)

        def call():
            values = segment_max_similarity(x, offsets, y).values
            if backward:
                values.sum().backward()
            return [values.detach(), x.grad, y.grad]

        return call

    return problem(R, A), problem(200, 50)


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_of_rows_times_candidates_is_stored(backward):
    R, A, D = 20_000, 2_000, 64
    peak = peak_memory("test_segment_max_similarity:memory_problem", R=R, A=A, D=D, backward=backward, threads=2).peak
    results = 200 * A * 12 + (4 * (R + A) * D + 200 * A * 8 if backward else 0)  # values, indices; gradients and the upstream gradient
    assert peak <= results + 4 * (R + A) * D + (6 << 20), peak
    assert 8 * peak < 4 * R * A  # the matrix of products
