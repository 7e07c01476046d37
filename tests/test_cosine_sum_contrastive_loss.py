"""cosine_sum_contrastive_loss beyond the battery: what it is made of, gaps, processes, memory."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from modalign.nn import CosineSumContrastiveLoss
from modalign.ops import clip_loss, cosine_sum_contrastive_loss
from modalign.testing import peak_memory


def leaves_of(m, B=11, C=11, D=7):
    return [torch.randn(rows, D, dtype=torch.float64).requires_grad_() for rows in (B, *[C] * m)]


def assert_same(ours, theirs, leaves):
    assert torch.allclose(ours, theirs, rtol=1e-10)
    for a, e in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        assert torch.allclose(a, e, rtol=1e-9, atol=1e-12)


def cosines(anchor, others):
    return torch.stack([F.cosine_similarity(anchor[:, None], other[None], dim=-1) for other in others])


@pytest.mark.parametrize("m", [1, 2, 9])
@pytest.mark.parametrize("mean", [False, True])
def test_cross_entropies_of_sums_of_cosines(m, mean):
    anchor, *others = leaves = leaves_of(m)
    z, at = cosines(anchor, others).sum(0) / 0.2 / (m if mean else 1), torch.arange(11)
    expected = (F.cross_entropy(z, at) + F.cross_entropy(z.T, at)) / 2
    assert_same(cosine_sum_contrastive_loss(anchor, others, temperature=0.2, mean=mean), expected, leaves)


def test_two_modalities_are_clip_loss():
    anchor, other = leaves = leaves_of(1)
    assert_same(cosine_sum_contrastive_loss(anchor, [other], temperature=0.1), clip_loss(anchor, other, logit_scale=10.0, normalize=True), leaves)


@pytest.mark.parametrize("mean", [False, True])
def test_gaps(mean):
    anchor, *others = leaves = leaves_of(3)
    present = torch.rand(11, 3) < 0.6
    present[:, 1] |= ~present.any(1)
    present[5] = False
    each = torch.where(present.T[:, None], cosines(anchor, others), 0)
    z = each.sum(0) / (present.sum(1).clamp(min=1) if mean else 1) / 0.2
    labelled = [i for i in range(11) if i != 5]
    expected = sum((z[i, labelled].logsumexp(0) + z[:, i].logsumexp(0)) / 2 - z[i, i] for i in labelled) / 10
    ours = cosine_sum_contrastive_loss(anchor, others, temperature=0.2, present=present, mean=mean)
    assert_same(ours, expected, leaves)
    holes = [torch.where(present[:, p, None], other, torch.nan).detach().requires_grad_() for p, other in enumerate(others)]
    dirty = cosine_sum_contrastive_loss(anchor, holes, temperature=0.2, present=present, mean=mean)
    assert torch.equal(dirty, ours)
    for gradient, here in zip(torch.autograd.grad(dirty, holes), present.T, strict=True):
        assert torch.isfinite(gradient).all() and (gradient[~here] == 0).all() and (gradient[here] != 0).any()


def test_values_of_tensors_are_named_as_they_were_given():
    for value in (-0.5, 0.0, torch.nan):
        with pytest.raises(RuntimeError, match="cosine_sum_contrastive_loss: temperature must be positive and finite, got"):
            cosine_sum_contrastive_loss(torch.randn(3, 4), [torch.randn(3, 4)], temperature=torch.tensor(value))


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_one_batch_over_processes(exchange):
    anchor, *others = leaves = leaves_of(2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = {"process_group": dist.group.WORLD, "exchange": exchange}
        assert_same(cosine_sum_contrastive_loss(anchor, others, **group), cosine_sum_contrastive_loss(anchor, others), leaves)
        present = torch.rand(11, 2) < 0.5
        assert_same(cosine_sum_contrastive_loss(anchor, others, present=present, **group), cosine_sum_contrastive_loss(anchor, others, present=present), leaves)
    finally:
        dist.destroy_process_group()


def test_the_module_has_the_settings_of_the_one_on_volumes():
    anchor, *others = (t.float() for t in leaves_of(2))
    loss = CosineSumContrastiveLoss()
    expected = cosine_sum_contrastive_loss(anchor, others, temperature=loss.temperature, label_smoothing=0.1)
    assert torch.equal(loss(anchor, others), expected)
    loss(anchor, others).backward()
    assert loss.temperature.grad != 0


def memory_problem(B, D):
    """What `peak_memory` measures in its own process."""

    def problem(n):
        torch.manual_seed(0)
        vectors = [torch.randn(n, D, requires_grad=True) for _ in range(3)]

        def call():
            cosine_sum_contrastive_loss(vectors[0], vectors[1:], workspace_bytes=0).backward()
            return [vector.grad for vector in vectors]

        return call

    return problem(B), problem(64)


def test_training_memory_is_linear():
    D = 64
    peaks = [peak_memory("test_cosine_sum_contrastive_loss:memory_problem", B=B, D=D, threads=2).peak for B in (1024, 2048, 4096, 8192)]
    assert peaks[-1] < 20 * 8192 * 3 * D * 4 + 16e6  # one float32 matrix of cosines alone would be 268 MB
    assert peaks[-1] - peaks[-2] < 2.6 * max(peaks[-2] - peaks[-3], 3e6)
