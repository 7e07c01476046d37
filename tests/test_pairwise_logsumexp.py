"""pairwise_logsumexp beyond the battery: losses made of it, any upstream gradient, what takes no part, digits, memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from modalign.ops import clip_loss, pairwise_logsumexp
from modalign.ops.pairwise_logsumexp import PairwiseLogSumExp, log_sum_exps
from modalign.testing import assert_bitwise_deterministic, peak_memory


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def leaf(value):
    return torch.as_tensor(value, dtype=torch.float64).clone().requires_grad_()


def assert_same(ours, theirs, leaves, **tolerance):
    tolerance = tolerance or {"rtol": 1e-10, "atol": 1e-11}
    assert torch.allclose(ours, theirs, **tolerance)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        assert torch.allclose(a, b, **tolerance)


# ------------------------------------------------------------------------------------------------------------------------ losses that are made of it


def test_clip_loss_in_one_line():
    x, y, s = leaf(unit(20, 9)), leaf(unit(20, 9)), leaf(6.0)
    sums = pairwise_logsumexp(x, y, logit_scale=s)
    assert_same(((sums.rows + sums.columns) / 2 - s * (x * y).sum(1)).mean(), clip_loss(x, y, logit_scale=s), [x, y, s])


def test_uniformity_on_the_sphere():
    """log of the mean of exp(-2 |x_i - x_j|^2), Wang and Isola, ICML 2020."""
    x, n = leaf(unit(17, 5)), 2 * math.log(17)
    ours = pairwise_logsumexp(x, x, logit_scale=4.0, logit_bias=-4.0).rows.logsumexp(0) - n
    assert torch.allclose(ours, (-2 * torch.cdist(x, x).square()).exp().mean().log(), rtol=1e-10)
    assert_same(ours, (4 * (x @ x.T) - 4).exp().sum().log() - n, [x])


@pytest.mark.parametrize("bias", [None, -2.5])
def test_any_function_of_both_sides(bias):
    """Upstream gradients of any sign and size, on one side alone as well: the gradients of logits do not add up to 0 here."""
    x, y, s = leaf(torch.randn(23, 11)), leaf(torch.randn(31, 11)), leaf(0.8)
    b = [] if bias is None else [leaf(bias)]
    logits = s * x @ y.T + (b[0] if b else 0)
    sums = pairwise_logsumexp(x, y, logit_scale=s, logit_bias=b[0] if b else None)
    g, h = 10 * torch.randn(23, dtype=torch.float64), torch.randn(31, dtype=torch.float64)
    for mine, dense in (
        ((sums.rows * g).sum() + (sums.columns * h).sin().sum(), (logits.logsumexp(1) * g).sum() + (logits.logsumexp(0) * h).sin().sum()),
        (sums.rows.square().sum(), logits.logsumexp(1).square().sum()),
        (sums.columns[3], logits.logsumexp(0)[3]),
    ):
        leaves = [x, y, s, *b]
        assert torch.allclose(mine, dense, rtol=1e-12)
        for a, e in zip(torch.autograd.grad(mine, leaves, retain_graph=True), torch.autograd.grad(dense, leaves, retain_graph=True), strict=True):
            assert torch.allclose(a, e, rtol=1e-10, atol=1e-10)


def test_only_what_requires_grad_gets_it():
    x, y = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4)
    sums = pairwise_logsumexp(x, y, logit_scale=2.0)
    assert torch.autograd.grad(sums.rows.sum(), [x])[0].abs().sum() > 0
    assert not pairwise_logsumexp(x.detach(), y, logit_scale=2.0).rows.requires_grad


def test_the_result_is_a_pytree_that_moves():
    sums = pairwise_logsumexp(torch.randn(5, 4), torch.randn(6, 4), logit_scale=2.0)
    assert isinstance(sums, PairwiseLogSumExp) and sums.to("meta").rows.device.type == "meta"
    assert [leaf.shape[0] for leaf in torch.utils._pytree.tree_leaves(sums)] == [5, 6]


# -------------------------------------------------------------------------------------------------------------------------------- part, digits, NaN


@pytest.mark.parametrize("rows_left, columns_left", [(6, 9), (6, 0), (0, 9), (0, 0)])
def test_what_takes_no_part_is_as_if_it_were_not_there(rows_left, columns_left):
    x, y, s = leaf(torch.randn(11, 6)), leaf(torch.randn(14, 6)), leaf(0.9)
    rows, columns = torch.zeros(11, dtype=torch.bool), torch.zeros(14, dtype=torch.bool)
    rows[torch.randperm(11)[:rows_left]] = True
    columns[torch.randperm(14)[:columns_left]] = True
    found = log_sum_exps(torch.where(rows[:, None], x, 0), torch.where(columns[:, None], y, 0), s, None, rows, columns)
    assert (found[0][~rows] == -torch.inf).all() and (found[1][~columns] == -torch.inf).all()
    alone = pairwise_logsumexp(x[rows], y[columns], logit_scale=s)
    g, h = torch.randn(11, dtype=torch.float64), torch.randn(14, dtype=torch.float64)
    ours = torch.where(rows & (columns_left > 0), found[0], 0) @ g + torch.where(columns & (rows_left > 0), found[1], 0) @ h
    theirs = alone.rows.nan_to_num(neginf=0) @ g[rows] + alone.columns.nan_to_num(neginf=0) @ h[columns]
    assert_same(ours, theirs, [x, y, s], rtol=1e-12, atol=1e-12)


def test_losses_get_log_sum_exps_in_double():
    x, y = F.normalize(torch.eye(32) + 0.02 * torch.randn(32, 32), dim=-1), F.normalize(torch.eye(32) + 0.02 * torch.randn(32, 32), dim=-1)
    found = log_sum_exps(x, y, torch.tensor(20.0), None)
    exact = 20 * x.double() @ y.double().T
    assert all(each.dtype is torch.float64 for each in found)
    assert (found[0] - exact.logsumexp(1)).abs().max() < 5e-6 and (found[1] - exact.logsumexp(0)).abs().max() < 5e-6
    assert pairwise_logsumexp(x, y, logit_scale=20.0).rows.dtype is torch.float32


def test_a_nan_reaches_its_row_and_all_columns():
    x, y = torch.randn(5, 4), torch.randn(6, 4)
    x[2, 1] = torch.nan
    sums = pairwise_logsumexp(x, y, logit_scale=2.0)
    assert sums.rows.isnan().tolist() == [False, False, True, False, False] and sums.columns.isnan().all()


# -------------------------------------------------------------------------------------------------------------------------------- bits and memory


def test_threads_and_runs_give_the_same_bits():
    x, y, s = (t.requires_grad_() for t in (torch.randn(301, 40), torch.randn(333, 40), torch.tensor(0.7)))

    def run():
        sums = pairwise_logsumexp(x, y, logit_scale=s)
        return [*sums, *torch.autograd.grad(sums.rows.sum() + sums.columns.square().sum(), [x, y, s])]

    assert_bitwise_deterministic(run)


def memory_problem(B, D):
    """What `peak_memory` measures in its own process."""

    def problem(n):
        torch.manual_seed(0)
        x, y = torch.randn(n, D, requires_grad=True), torch.randn(n, D, requires_grad=True)

        def call():
            sums = pairwise_logsumexp(x, y, logit_scale=0.1)
            (sums.rows.sum() + sums.columns.sum()).backward()
            return [*sums, x.grad, y.grad]

        return call

    return problem(B), problem(64)


def test_training_memory_is_linear():
    D = 64
    peaks = [peak_memory("test_pairwise_logsumexp:memory_problem", B=B, D=D, threads=2).peak for B in (1024, 2048, 4096, 8192)]
    assert peaks[-1] < 20 * 8192 * 2 * D * 4 + 16e6  # one float32 matrix of logits alone would be 268 MB
    assert peaks[-1] - peaks[-2] < 2.6 * max(peaks[-2] - peaks[-3], 3e6)
