"""ThresholdMerger: thresholds found on batches in which pictures compete, packed results, budgets of layers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from modalign.nn import ThresholdMerger, merge_budget, pad_packed
from modalign.ops import match_tokens, virtual_unmerge_attention


def pictures(B: int, N: int, D: int, seed: int = 0) -> Tensor:
    """Of very different variety: item b is b / B parts noise."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.arange(1, B + 1)[:, None, None] / B
    return torch.randn(B, 1, D, generator=generator) * (1 - share) + torch.randn(B, N, D, generator=generator) * share


def calibrated(r: int, *batches: Tensor, **options: object) -> ThresholdMerger:
    merger = ThresholdMerger(r, **options)
    merger.calibrating = True
    for batch in batches:
        merger(batch, batch)
    merger.calibrating = False
    return merger


def test_of_one_batch_the_mean_is_met_exactly_and_simple_pictures_keep_fewer():
    batch = pictures(6, 48, 16)
    for r in (0, 3, 10):
        merger = calibrated(r, batch)
        tokens, size, match = merger(batch, batch)
        lengths = match.cu_seqlens.diff()
        assert len(tokens) == 6 * (48 - r) and size.sum() == 6 * 48
        if r:
            assert lengths[0] < lengths[-1] and lengths.min() >= 24
    assert calibrated(30, batch).threshold > 0  # more than half of every item cannot merge; the last that could is the threshold


def test_the_threshold_is_the_best_that_did_not_merge_and_batches_are_averaged():
    one, other = pictures(4, 30, 8, 1), pictures(4, 30, 8, 2)
    reached = []
    for batch in (one, other):
        scores = match_tokens(batch, 0).score
        reached.append(scores[scores > -torch.inf].sort(descending=True)[0][4 * 5].clamp(min=0).double())
    merger = calibrated(5, one, other)
    torch.testing.assert_close(merger.threshold, (reached[0] + reached[1]) / 2)
    assert merger.batches == 2
    again = ThresholdMerger(5)
    again.load_state_dict(merger.state_dict())
    assert torch.equal(again(one, one).tokens, merger(one, one).tokens)
    opposed = torch.tensor([[[1.0], [-1.0], [1.0], [-1.0]]])
    assert calibrated(1, opposed).threshold == 0  # and not -1


def test_before_calibration_nothing_merges_and_empty_batches_teach_nothing():
    merger, batch = ThresholdMerger(5), pictures(3, 20, 4)
    assert torch.equal(merger(batch, batch).tokens, batch.flatten(0, 1))
    merger.calibrating = True
    merger(batch[:0], batch[:0]), merger(batch[:, :1], batch[:, :1])
    assert merger.batches == 0 and merger.threshold == 1


def test_equal_counts_are_tome():
    batch = pictures(5, 32, 8)[2:3].repeat(4, 1, 1)  # the same picture four times
    merger = calibrated(7, batch)
    packed, wanted = merger(batch, batch), match_tokens(batch, 7, keep_order=True)
    assert torch.equal(packed.match.cu_seqlens, torch.tensor([0, 25, 50, 75, 100]).int()) and torch.equal(packed.tokens.view(4, 25, 8), wanted.merge(batch))


def test_a_higher_threshold_keeps_no_fewer():
    batch, before = pictures(4, 40, 8), 0
    merger = ThresholdMerger(0)
    for threshold in (0.0, 0.3, 0.6, 0.9, 1.0):
        merger.threshold.fill_(threshold)
        kept = len(merger(batch, batch).tokens)
        assert kept >= before
        before = kept


def test_packed_padded_and_alone_have_the_same_bits():
    lengths = [40, 7, 0, 23]
    rows, cu = pictures(1, 70, 8)[0], torch.tensor([0, *lengths]).cumsum(0).int()
    merger = ThresholdMerger(3, protected=1)
    merger.threshold.fill_(0.35)
    x, size, features, longest = rows, None, rows, 40
    parts = [(rows[begin:end], None) for begin, end in zip(cu[:-1], cu[1:], strict=True)]
    for _ in range(3):  # layers
        x, size, match = merger(x, features, size, cu_seqlens=cu, longest=longest)
        cu, features = match.cu_seqlens, x
        parts = [merger(part[None], part[None], None if sizes is None else sizes[None])[:2] for part, sizes in parts]
        assert torch.equal(x, torch.cat([part for part, _ in parts])) and torch.equal(size, torch.cat([sizes for _, sizes in parts]))
    padded, there = pad_packed(x, cu)
    assert there.sum(1).tolist() == [len(part) for part, _ in parts] and torch.equal(padded[there], x) and not padded[~there].any()
    assert pad_packed(x, cu, 50)[0].shape == (4, 50, 8)


def test_where_patches_went_serves_virtual_unmerging():
    """The map of a merge is what `virtual_unmerge_attention` takes: of tokens merged without loss it gives what attention gives before."""
    batch = pictures(2, 12, 8).repeat_interleave(2, 1)  # pairs of equal patches
    match = match_tokens(batch, 12, keep_order=True)
    q, k, v = (torch.randn(2, 12, 2, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    merged = [each.transpose(1, 2) for each in (q, k, v)]
    source = match.source()
    alone = [each.gather(2, source[:, None, :, None].expand(-1, 2, -1, 4)) for each in merged]
    wanted = torch.nn.functional.scaled_dot_product_attention(*alone)
    got = virtual_unmerge_attention(*merged, source, causal=False, rotary=(torch.ones(24, 2), torch.zeros(24, 2)))
    mean = match.merge(wanted.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(got, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["constant", "linear", "reverse_linear"])
def test_budgets_sum_to_the_total(kind):
    for layers in range(1, 30):
        for total in (0, 1, 7, 100, 576):
            budget = merge_budget(layers, total, kind)
            assert len(budget) == layers and sum(budget) == total and min(budget) >= 0
    assert merge_budget(24, 480, "linear")[0] == 40 and merge_budget(24, 480)[0] == 20


def test_bad_arguments():
    for call, message in (
        (lambda: merge_budget(0, 3), "merge_budget: layers must be a whole number of 1 or more, got 0"),
        (lambda: merge_budget(3, -1), "merge_budget: total must be a whole number of 0 or more, got -1"),
        (lambda: merge_budget(3, 3, "cubic"), 'merge_budget: kind must be "constant", "linear" or "reverse_linear", got \'cubic\''),
        (lambda: ThresholdMerger(-2), "ThresholdMerger: r must be a whole number of 0 or more, got -2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def rank_of_two(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    merger = ThresholdMerger(4, process_group=dist.group.WORLD)
    merger.calibrating = True
    batch = pictures(3, 24, 8, seed=rank)
    merger(batch, batch)
    alone = [calibrated(4, pictures(3, 24, 8, seed=each)).threshold for each in range(2)]
    torch.testing.assert_close(merger.threshold, (alone[0] + alone[1]) / 2)
    dist.destroy_process_group()


def test_processes_average_their_thresholds(tmp_path):
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path / "meet"),), nprocs=2)
