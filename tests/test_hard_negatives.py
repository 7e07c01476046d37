"""Draws of hard negatives: the generator, the distribution, the own item, candidates that take no part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gumbel import pair_noise, philox

from modalign import _load
from modalign.ops import clip_hard_negatives, gram_hard_negatives, gram_volume
from modalign.ops.gram_hard_negatives import reference_gram_hard_negatives


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def test_philox_of_the_test_gives_the_published_numbers():
    """The known answers of Random123 for a counter and a key of zeros, and of ones."""
    assert [hex(word) for word in philox([0, 0, 0, 0], (0, 0))] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    assert [hex(word) for word in philox([2**32 - 1] * 4, (2**32 - 1, 2**32 - 1))] == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, -3, 2**40 + 5])
def test_the_kernel_takes_the_largest_with_noise(dtype, seed):
    B, C = 37, 301
    a, others, target = unit(B, 20).to(dtype), [unit(C, 20).to(dtype) for _ in range(2)], torch.randint(C, (B,))
    found = torch.ops.modalign.gram_contrastive_loss(
        a, others, torch.tensor(-8.0, dtype=dtype), None, target, None, 0.0, 0.5, 0.5, 1e-12, 0, torch.tensor(seed)
    )
    z = (-8 * gram_volume(a.double(), [other.double() for other in others])).numpy()
    z[np.arange(B), target] = -np.inf
    rows, columns = z + pair_noise(seed, B, C)
    slack = 1e-4 if dtype is torch.float32 else 1e-12
    assert (rows[np.arange(B), found[6]] >= rows.max(1) - slack).all() and (columns[found[7], np.arange(C)] >= columns.max(0) - slack).all()


def test_the_same_on_every_instruction_set_and_number_of_threads():
    a, others = unit(67, 20), [unit(67, 20) for _ in range(2)]

    def drawn():
        return torch.stack(gram_hard_negatives(a, others, generator=torch.Generator().manual_seed(3)))

    first, threads = drawn(), torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(first, drawn())
    finally:
        torch.set_num_threads(threads)
    for name in ("portable", _load.instruction_set()):
        with _load.use_instruction_set(name):
            assert (drawn() == first).float().mean() > 0.97  # a near tie may go the other way


def chi_square(counts, weights):
    """Against its 99.99 % quantile, by the normal approximation of Wilson and Hilferty."""
    expected = counts.sum() * weights
    assert not counts[weights == 0].any()
    there = weights > 0
    freedom = int(there.sum()) - 1
    found = float(((counts - expected)[there] ** 2 / expected[there]).sum())
    return found < freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("op", ["gram", "clip"])
@pytest.mark.parametrize("floor, sharp", [(0.0, 5.0), (1e-4, 30.0), (0.05, 30.0)])
@pytest.mark.parametrize("labels", ["own", "mixed"])
def test_frequencies(op, floor, sharp, labels):
    """2,000 draws of each row and column follow softmax + floor without the own item."""
    B, C, rounds = (6, 6, 2000) if labels == "own" else (6, 9, 2000)
    a, others = unit(B, 8), [unit(C, 8) for _ in range(2 if op == "gram" else 1)]
    target = None if labels == "own" else torch.tensor([4, 1, 1, -1, 8, 0])
    z = -gram_volume(a, others) * sharp if op == "gram" else sharp * a @ others[0].T
    of_rows, of_columns = reference_gram_hard_negatives(z.double(), target, floor)
    generator = torch.Generator().manual_seed(11)
    rows, columns = torch.zeros(B, C), torch.zeros(B, C)
    for _ in range(rounds):
        if op == "gram":
            drawn = gram_hard_negatives(a, others, temperature=1 / sharp, floor=floor, target=target, generator=generator)
        else:
            drawn = clip_hard_negatives(a, others[0], logit_scale=sharp, floor=floor, target=target, generator=generator)
        rows[torch.arange(B), drawn.candidates] += 1
        columns[drawn.anchors, torch.arange(C)] += 1
    for i in range(B):
        assert chi_square(rows[i], of_rows[i]), f"row {i}"
    for j in range(C):
        assert chi_square(columns[:, j], of_columns[:, j]), f"column {j}"


def test_a_dominant_candidate_is_drawn():
    a = unit(20, 16)
    twin = a[torch.arange(20) ^ 1]  # the neighbour's vector is the nearest, after the own one
    drawn = clip_hard_negatives(a, F.normalize(a + twin, dim=-1), logit_scale=200.0)
    assert torch.equal(drawn.candidates, torch.arange(20) ^ 1) and torch.equal(drawn.anchors, torch.arange(20) ^ 1)


def test_absent_candidates_and_ignored_rows():
    a, others, present = unit(8, 12), [unit(8, 12) for _ in range(2)], torch.ones(8, 2, dtype=torch.bool)
    present[2] = present[5] = False
    others[0][2] = torch.nan
    target = torch.tensor([0, 1, 2, 3, -100, 5, -1, 7])
    a[4] = torch.nan
    for floor in (0.0, 0.5):
        for _ in range(50):
            drawn = gram_hard_negatives(a, others, present=present, target=target, floor=floor)
            assert drawn.candidates[4] == -1 and (drawn.anchors[[2, 5]] == -1).all()
            assert not torch.isin(drawn.candidates, torch.tensor([2, 5])).any() and not (drawn.anchors == 4).any()
            assert (drawn.candidates[[0, 1, 3, 7]] != torch.tensor([0, 1, 3, 7])).all() and (drawn.candidates[[0, 1, 2, 3, 5, 6, 7]] >= 0).all()


def test_nothing_left_to_draw():
    a, others, present = unit(3, 12), [unit(3, 12)], torch.tensor([[True], [False], [False]])
    drawn = gram_hard_negatives(a, others, present=present, floor=0.1)
    assert drawn.candidates.tolist() == [-1, 0, 0] and drawn.anchors[0] in (1, 2) and drawn.anchors[1:].tolist() == [-1, -1]
    drawn = clip_hard_negatives(a[:1], a, logit_scale=1.0, target=torch.tensor([-100]))
    assert drawn.candidates.tolist() == [-1] and drawn.anchors.tolist() == [-1] * 3
    empty = clip_hard_negatives(a[:0], a[:0], logit_scale=1.0)
    assert empty.candidates.shape == empty.anchors.shape == (0,)


def test_generators():
    a = unit(30, 8)
    one, two = (clip_hard_negatives(a, a, logit_scale=5.0, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one.candidates, two.candidates) and torch.equal(one.anchors, two.anchors)
    torch.manual_seed(0)
    first = clip_hard_negatives(a, a, logit_scale=5.0).candidates
    assert not torch.equal(first, clip_hard_negatives(a, a, logit_scale=5.0).candidates)
    torch.manual_seed(0)
    assert torch.equal(first, clip_hard_negatives(a, a, logit_scale=5.0).candidates)


def test_many_candidates_in_half_precision_strided():
    a, y = unit(64, 24).bfloat16(), unit(24, 5000).T.bfloat16()
    drawn = clip_hard_negatives(a.T.contiguous().T, y, logit_scale=20.0, target=torch.arange(64))
    assert ((drawn.candidates >= 0) & (drawn.candidates < 5000) & (drawn.candidates != torch.arange(64))).all()
    assert ((drawn.anchors >= 0) & (drawn.anchors < 64)).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"anchor": unit(1, 8), "others": [unit(1, 8)]}, "anchor must have at least 2 rows, got a batch of one"),
        ({"others": [unit(0, 8)], "target": torch.full((4,), -1)}, "there must be candidates to draw from, got C = 0"),
        ({"floor": -0.1}, "floor must be finite and at least 0, got -0.1"),
        ({"floor": "x"}, "floor must be a number"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"generator": 3}, "generator must be None or a torch.Generator, got int 3"),
        ({"others": [unit(5, 8)]}, "target must be given where there are not as many candidates"),
        ({"others": [unit(4, 8)] * 8}, "others must hold 1 to 7 tensors, got 8"),
    ],
)
def test_bad_input(change, message):
    given = {"anchor": unit(4, 8), "others": [unit(4, 8)]} | change
    with pytest.raises((TypeError, ValueError), match=f"gram_hard_negatives: {message}"):
        gram_hard_negatives(given.pop("anchor"), given.pop("others"), **given)
