"""Retrieval with tuples and zero-shot classification: against pairs counted one by one, and what panels, ties, gaps and re-ranking do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from modalign import ops
from modalign.metrics import (
    Retrieval,
    hit_ranks,
    joint_retrieval,
    mean_reciprocal_rank,
    median_rank,
    recall_at_k,
    retrieval,
    search_ranks,
    search_retrieval,
    zero_shot,
)
from modalign.testing import Maker, devices, peak_memory

on_each_device = pytest.mark.parametrize("device", devices())
F64 = torch.float64
SCORES = ("volume", "volume_root", "cosine_sum", "max")


def tuples(B, C, D=16, m=2, dtype=F64, device="cpu", noise=0.5):
    """Anchors near the tuple with their number (modulo C), none of them of unit length."""
    make = Maker(dtype, device, 5)
    centre = make.randn(C, D)
    anchor = centre[torch.arange(B, device=device) % C] + noise * make.randn(B, D)
    return 3 * anchor, [(2 + p) * (centre + noise * make.randn(C, D)) for p in range(m)]


def by_hand(anchor, others, score, present=None):
    """Similarities pair by pair, larger is better."""
    unit = [F.normalize(x, dim=1) for x in (anchor, *others)]
    found = torch.empty(len(anchor), len(others[0]), dtype=F64)
    for i in range(len(anchor)):
        for j in range(len(others[0])):
            there = [p for p in range(len(others)) if present is None or present[j, p]]
            vectors = torch.stack([unit[0][i], *(unit[1 + p][j] for p in there)])
            cosines = [(unit[0][i] @ unit[1 + p][j]).item() for p in there]
            volume = torch.linalg.det(vectors @ vectors.T).clamp(min=0).sqrt().item()
            found[i, j] = {
                "volume": -volume,
                "volume_root": -(volume ** (1 / len(vectors))),
                "cosine_sum": sum(cosines),
                "max": max(cosines, default=-float("inf")),
            }[score]
    return found


def figures(ranks):
    return Retrieval(recall_at_k(ranks, 1), recall_at_k(ranks, 5), recall_at_k(ranks, 10), median_rank(ranks))


# ------------------------------------------------------------------------------------------------------------------------------- joint retrieval


@on_each_device
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("gaps", [False, True])
def test_figures_of_both_directions(score, gaps, device):
    B = 30
    anchor, others = tuples(B, B, device=device, noise=1.0)
    present = None
    if gaps:
        present = Maker(device=device, seed=3).mask(B, 2)
        present[~present.any(1), 0] = True
        others = [torch.where(present[:, p, None], other, float("nan")) for p, other in enumerate(others)]
    scores = by_hand(anchor.cpu(), [other.cpu() for other in others], score, None if present is None else present.cpu())
    for workspace in (0, 5000, None):
        found = joint_retrieval(anchor, others, score=score, present=present, workspace_bytes=workspace)
        assert found.to_tuples == retrieval(scores)
        assert found.to_anchors == retrieval(scores.T)
        if "volume" in score:
            assert found.gramian_value == pytest.approx(-scores.amax(1).mean().item(), rel=1e-9)
        else:
            assert found.gramian_value is None
    assert 0 < found.to_tuples.r1 < 1 and found.to_tuples != found.to_anchors  # the figures tell something


@pytest.mark.parametrize("score", SCORES)
def test_several_right_answers(score):
    anchor, others = tuples(40, 20, noise=1.0)
    groups, candidate_groups = torch.arange(40) % 20 // 2, torch.arange(20) // 2
    scores = by_hand(anchor, others, score)
    found = joint_retrieval(anchor, others, score=score, groups=groups, candidate_groups=candidate_groups, workspace_bytes=2000)
    assert found.to_tuples == retrieval(scores, query_groups=groups, candidate_groups=candidate_groups)
    assert found.to_anchors == retrieval(scores.T, query_groups=candidate_groups, candidate_groups=groups)
    same = joint_retrieval(anchor[:20], others, score=score, groups=groups[:20])
    assert same.to_tuples == retrieval(scores[:20], query_groups=groups[:20])


def test_collapsed_vectors_are_no_hit():
    anchor, others = torch.ones(12, 4), [torch.ones(12, 4), torch.ones(12, 4)]
    for score in SCORES:
        found = joint_retrieval(anchor, others, score=score)
        assert found.to_tuples == found.to_anchors == retrieval(torch.zeros(12, 12))


def test_volume_ranks_agree_with_the_op():
    anchor, others = tuples(50, 50, dtype=torch.float32, noise=1.0)
    unit = [F.normalize(x, dim=1) for x in (anchor, *others)]
    rank = ops.gram_target_rank(unit[0], unit[1:], torch.arange(50))
    assert joint_retrieval(anchor, others).to_tuples == figures(rank)


def test_half_types_are_scored_in_float32():
    anchor, others = tuples(30, 30, dtype=torch.bfloat16, noise=1.0)
    wide = anchor.float(), [other.float() for other in others]
    for score in SCORES:
        assert joint_retrieval(anchor, others, score=score) == joint_retrieval(*wide, score=score)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert joint_retrieval(*wide, score=score) == joint_retrieval(anchor, others, score=score)


def test_a_matcher_re_ranks_the_first():
    """It sees pairs (anchor, tuple) in both directions, orders the first n among themselves, and cannot bring in another."""
    anchor, others = tuples(30, 30, noise=1.5)
    scores = by_hand(anchor, others, "volume")
    calls = []

    def knows(anchors, tuples):
        assert anchors.shape == tuples.shape and anchors.dtype is tuples.dtype is torch.int64
        calls.append(torch.stack([anchors, tuples], -1).flatten(0, 1))
        return (anchors == tuples).float()

    for top in (1, 5, 100):
        calls.clear()
        found = joint_retrieval(anchor, others, rerank=knows, rerank_top=top, workspace_bytes=3000)
        for direction, ranks in (("to_tuples", hit_ranks(scores)), ("to_anchors", hit_ranks(scores.T))):
            expected = torch.where(ranks < top, 0, ranks)  # found among the first: now the first
            assert getattr(found, direction) == figures(expected)
        pairs = {tuple(pair) for pair in torch.cat(calls).tolist()}
        first = [{(i, j) for i in range(30) for j in scores[i].argsort(descending=True)[:top].tolist()}]
        first.append({(i, j) for j in range(30) for i in scores[:, j].argsort(descending=True)[:top].tolist()})
        assert pairs == first[0] | first[1]
    assert joint_retrieval(anchor, others).to_tuples.r1 < 1
    assert joint_retrieval(anchor, others).gramian_value == found.gramian_value


def test_equal_scores_of_a_matcher_go_by_index():
    anchor, others = tuples(20, 20, noise=2.0)
    order = by_hand(anchor, others, "volume").argsort(dim=1, descending=True)
    order = torch.cat([order[:, :7].sort(1).values, order[:, 7:]], 1)
    ranks = (order == torch.arange(20)[:, None]).int().argmax(1)
    found = joint_retrieval(anchor, others, rerank=lambda anchors, tuples: torch.zeros(anchors.shape), rerank_top=7)
    assert found.to_tuples == figures(ranks)


A, R = torch.randn(4, 8), torch.randn(5, 8)
FOUR, FIVE = torch.zeros(4, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: joint_retrieval(A, R), TypeError, "others must be a sequence of tensors"),
        (lambda: joint_retrieval(A, [R[:, :7]]), ValueError, r"others\[0\] must have anchor's width D = 8"),
        (lambda: joint_retrieval(A, [R]), ValueError, "groups must be given where .* got 4 anchors and 5 tuples"),
        (lambda: joint_retrieval(A, [R], candidate_groups=FIVE), ValueError, "groups must be given with candidate_groups, got None"),
        (lambda: joint_retrieval(A, [R], groups=FOUR), ValueError, r"candidate_groups must have shape \[5\] on cpu, got a int64 tensor of shape \(4,\)"),
        (lambda: joint_retrieval(A, [R], groups=FOUR.float()), TypeError, r"groups must be an int64 tensor \[4\], got a float32"),
        (lambda: joint_retrieval(A, [R], groups=FOUR, candidate_groups=FIVE + 1), ValueError, "every query must have a candidate of its group, got 4"),
        (lambda: joint_retrieval(A, [A], score="cosine"), ValueError, "score must be one of volume, volume_root, cosine_sum, max, got str 'cosine'"),
        (lambda: joint_retrieval(A[:0], [A[:0]]), ValueError, "anchor and others must hold at least one row, got 0 and 0"),
        (lambda: joint_retrieval(A, [A * float("nan")]), ValueError, "vectors that are present must not hold NaN or infinities, got 16 scores"),
        (lambda: joint_retrieval(A, [A], present=torch.ones(4, 1)), TypeError, "present must be a bool tensor"),
        (lambda: joint_retrieval(A, [A], present=FOUR[:, None].bool()), ValueError, "present must leave every tuple at least one modality, got 4 tuples"),
        (lambda: joint_retrieval(A, [A], rerank=lambda a, t: a), ValueError, r"rerank must give floating-point scores \[4, 4\], got a int64"),
        (lambda: joint_retrieval(A, [A], rerank=lambda a, t: a[:, 0].float()), ValueError, r"rerank must give floating-point scores \[4, 4\], got"),
        (lambda: joint_retrieval(A, [A], rerank=lambda a, t: a / 0.0 - a / 0.0), ValueError, "rerank must give scores that are not NaN, got 16 NaN of 16"),
        (lambda: joint_retrieval(A, [A], rerank_top=0), ValueError, "rerank_top must be a whole number of at least 1, got int 0"),
        (lambda: joint_retrieval(A, [A], workspace_bytes=-1), ValueError, "workspace_bytes must be at least 0, got -1"),
    ],
)
def test_joint_retrieval_refuses_bad_input(call, error, message):
    with pytest.raises(error, match=f"^joint_retrieval: {message}"):
        call()


# ------------------------------------------------------------------------------------------------------------------------------- zero-shot


@on_each_device
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("score", SCORES)
def test_zero_shot_sample_by_sample(score, m, device):
    classes, N = 9, 60
    prototypes, centres = tuples(classes, classes, m=m, device=device, noise=1.2)
    labels = torch.arange(N, device=device) % (classes - 1)  # the last class has no samples
    make = Maker(F64, device, 8)
    queries = [centre[labels] + 2 * make.randn(N, 16) for centre in centres]
    present = make.mask(N, m)
    present[:, 0] = True
    for mask in (None, present):
        scores = by_hand(prototypes.cpu(), [query.cpu() for query in queries], score, None if mask is None else mask.cpu()).T
        order = scores.argsort(dim=1, descending=True)
        place = (order == labels.cpu()[:, None]).int().argmax(1)
        for workspace in (0, None):
            found = zero_shot(queries[0] if m == 1 else queries, prototypes, labels, score=score, present=mask, workspace_bytes=workspace)
            assert found.top1 == pytest.approx((place == 0).double().mean().item())
            assert found.top5 == pytest.approx((place < 5).double().mean().item())
            assert found.per_class[-1] is None
            shares = [(place[labels.cpu() == k] == 0).double().mean().item() for k in range(classes - 1)]
            assert found.per_class[:-1] == pytest.approx(shares)
            assert found.mean_per_class == pytest.approx(sum(shares) / len(shares))
    assert 0.1 < found.top1 < found.top5 < 1


def test_prompts_are_averaged_as_directions():
    make = Maker(F64, seed=1)
    prompts, queries, labels = make.randn(7, 4, 16), make.randn(50, 16), torch.arange(50) % 7
    prompts = prompts * torch.tensor([1.0, 100.0, 0.01, 5.0], dtype=F64)[:, None]  # lengths must not matter
    prompts[3, 2] = 0
    means = torch.stack([sum(F.normalize(prompt, dim=0) for prompt in of_class) / 4 for of_class in prompts])
    assert zero_shot(queries, prompts, labels) == zero_shot(queries, means, labels)
    assert zero_shot(queries, prompts[:, :1], labels) == zero_shot(queries, prompts[:, 0], labels)
    assert zero_shot(queries, prompts, labels) != zero_shot(queries, prompts.mean(1), labels)
    tuples_of_one = zero_shot([queries], prompts, labels, score="max")
    assert tuples_of_one == zero_shot(queries, prompts, labels)


def test_equal_classes_go_to_the_lower():
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 5, 5])
    found = zero_shot(torch.ones(8, 4), torch.ones(6, 4), labels)
    assert (found.top1, found.top5, found.per_class) == (1 / 8, 5 / 8, (1.0, 0.0, 0.0, 0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: zero_shot(A, R[0], FOUR), ValueError, r"prototypes must have shape \[K, D\] or"),
        (lambda: zero_shot(A, R[:0], FOUR), ValueError, r"prototypes must have shape \[K, D\] or \[K, P, D\] with at least one class and prompt"),
        (lambda: zero_shot(A, R[None, None], FOUR), ValueError, r"prototypes must have shape \[K, D\] or"),
        (lambda: zero_shot(A, R.double(), FOUR), TypeError, r"queries\[0\] must have prototypes's dtype torch.float64"),
        (lambda: zero_shot([A, A[:3]], R, FOUR), ValueError, r"queries\[1\] must have shape \[N, D\], as many samples as the others"),
        (lambda: zero_shot([], R, FOUR), ValueError, "queries must hold at least one tensor"),
        (lambda: zero_shot(A[:0], R, FOUR[:0]), ValueError, "queries must hold at least one sample, got none"),
        (lambda: zero_shot(A, R, FOUR[:2]), ValueError, r"labels must have shape \[4\] on cpu"),
        (lambda: zero_shot(A, R, FOUR.float()), TypeError, "labels must be an int64 tensor"),
        (lambda: zero_shot(A, R, FOUR + 5), ValueError, "labels must be from 0 to K - 1 = 4, got 5 to 5"),
        (lambda: zero_shot(A, R, FOUR, score="dot"), ValueError, "score must be one of"),
        (lambda: zero_shot(A, R, FOUR, present=torch.ones(4, 2, dtype=torch.bool)), ValueError, "present must have shape"),
        (lambda: zero_shot(A, R, FOUR, present=FOUR[:, None].bool()), ValueError, "present must leave every tuple at least one modality, got 4 tuples"),
        (lambda: zero_shot(A / 0, R, FOUR), ValueError, "vectors that are present must not hold NaN or infinities"),
    ],
)
def test_zero_shot_refuses_bad_input(call, error, message):
    with pytest.raises(error, match=f"^zero_shot: {message}"):
        call()


# ------------------------------------------------------------------------------------------------------------------------------- memory


def memory_problem(metric, rows):
    """What `peak_memory` measures in its own process."""

    def problem(rows):
        anchor, other, labels = torch.randn(rows, 16), torch.randn(rows, 16), torch.arange(rows)
        options = {"workspace_bytes": 4 << 20}
        if metric == "zero_shot":
            return lambda: zero_shot(anchor, other[:500], labels % 500, **options)
        return lambda: joint_retrieval(anchor, [other, -other], score=metric, **options)

    return problem(rows), problem(40)


@pytest.mark.parametrize(("metric", "rows"), [("volume", 3000), ("cosine_sum", 3000), ("zero_shot", 30_000)])
def test_memory_is_the_workspace(metric, rows):
    """All scores would take 36 MB (60 MB), their sorted lists twice that."""
    found = peak_memory("test_metrics:memory_problem", metric=metric, rows=rows, threads=1)
    assert found.peak < 14e6, found




def test_ranks_from_vectors_are_those_of_the_matrix():
    """Whole numbers, so that thousands of scores are equal; groups of 1 to 4 hits, queries and candidates of different numbers."""
    generator = torch.Generator().manual_seed(9)
    queries, candidates = (torch.randint(-2, 3, (rows, 5), generator=generator).float() for rows in (60, 90))
    candidate_groups = torch.randint(0, 40, (90,), generator=generator)
    query_groups = candidate_groups[torch.randint(0, 90, (60,), generator=generator)]
    groups = {"query_groups": query_groups, "candidate_groups": candidate_groups}
    expected = hit_ranks(queries @ candidates.T, **groups)
    assert torch.equal(search_ranks(queries, candidates, metric="dot", **groups), expected)
    assert torch.equal(search_ranks(queries, candidates, metric="sqeuclidean", **groups), hit_ranks(torch.cdist(queries.double(), candidates.double()).square().round(), larger_is_better=False, **groups))
    assert search_retrieval(queries, candidates, metric="dot", **groups) == retrieval(queries @ candidates.T, **groups)
    assert torch.equal(search_ranks(queries, queries, metric="dot"), hit_ranks(queries @ queries.T))
    assert mean_reciprocal_rank(expected) == pytest.approx(float((1 / (expected + 1)).mean()))
    assert search_ranks(queries[:0], candidates, query_groups=query_groups[:0], candidate_groups=candidate_groups).shape == (0,)
    for call, message in (
        (lambda: search_ranks(queries, candidates), "candidates must be as many as queries when no groups are given, got 90 and 60"),
        (lambda: search_ranks(queries, candidates, query_groups=query_groups), r"query_groups and candidate_groups must be \[60\] and \[90\]"),
        (lambda: search_ranks(queries, candidates, query_groups=query_groups + 99, candidate_groups=candidate_groups), "every query must have a candidate of its group, got 60"),
        (lambda: search_ranks(queries * torch.nan, queries), "queries and candidates must not be NaN, got hits without a rank for 60 queries"),
        (lambda: search_ranks(queries, queries, candidate_groups=query_groups), "query_groups must be given with candidate_groups"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
