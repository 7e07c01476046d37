"""The loss modules and the losses under open_clip's names."""

from __future__ import annotations

import copy
import doctest

import pytest
import torch
import torch.nn.functional as F

import modalign.compat.open_clip as open_clip
import modalign.nn.contrastive_losses as modules
import modalign.nn.structure_regularizer as structure_regularizer
from modalign import nn, ops
from ranks import run_ranks


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


@pytest.mark.parametrize("module", [modules, open_clip, structure_regularizer])
def test_examples_in_docstrings_run(module):
    found = doctest.testmod(module)
    assert found.failed == 0 and found.attempted > 0


def test_modules_are_the_ops_with_a_temperature():
    a, u, v = torch.randn(9, 8), torch.randn(9, 8), torch.randn(9, 8)
    gram, triangle, clip, siglip = nn.GramContrastiveLoss(), nn.TriangleContrastiveLoss(), nn.ClipLoss(), nn.SigLipLoss()
    assert torch.equal(gram(a, [u, v]), ops.gram_contrastive_loss(a, [u, v], temperature=gram.temperature, label_smoothing=0.1, normalize=True))
    assert torch.equal(triangle(a, u, v), ops.triangle_contrastive_loss(a, u, v, temperature=triangle.temperature, label_smoothing=0.1, normalize=True))
    assert torch.equal(clip(a, u), ops.clip_loss(a, u, logit_scale=clip.log_scale.exp(), normalize=True))
    assert torch.equal(siglip(a, u), ops.siglip_loss(a, u, logit_scale=siglip.log_scale.exp(), logit_bias=siglip.bias, normalize=True))
    assert torch.equal(gram(a, [u, v], label_smoothing=0.0), ops.gram_contrastive_loss(a, [u, v], temperature=0.07, normalize=True))
    for module, tensors in ((gram, (a, [u, v])), (triangle, (a, u, v)), (clip, (a, u)), (siglip, (a, u))):
        module(*tensors).backward()
        assert all(parameter.grad is not None and parameter.grad != 0 for parameter in module.parameters())
        copy.deepcopy(module).load_state_dict(module.state_dict())


def test_the_structure_regularizer_warms_up():
    pairs = [(torch.randn(20, 6), torch.randn(20, 4, requires_grad=True)) for _ in range(2)]
    each = [ops.structure_loss(*pair, temperature=0.3) for pair in pairs]
    regularizer = nn.StructureRegularizer(8.0, 4, temperature=0.3)
    found = [regularizer(*pairs) for _ in range(6)]
    assert found[0] == 0 and regularizer.steps == 6
    for value, share in zip(found, (0, 0.25, 0.5, 0.75, 1, 1), strict=True):
        torch.testing.assert_close(value, 8 * share * (each[0] + each[1]) / 2)
    assert regularizer.diagonal_mass.shape == (2, 2) and (regularizer.diagonal_mass < 1).all()
    again = nn.StructureRegularizer(8.0, 4, temperature=0.3)
    again.load_state_dict(regularizer.state_dict())
    assert again.eval().steps == 6 and torch.equal(again(*pairs), found[-1]) and again.steps == 6
    paper, released = nn.StructureRegularizer.paper(warmup_steps=0), nn.StructureRegularizer.released(warmup_steps=0)
    torch.testing.assert_close(paper(*pairs), 10 * sum(ops.structure_loss(*pair) for pair in pairs))
    torch.testing.assert_close(released(*pairs), 5 * sum(ops.structure_loss(*pair, divergence="released", weighting="none") for pair in pairs))
    for bad, message in (
        (lambda: nn.StructureRegularizer(-1), "weight must be a number of 0 or more, got -1"),
        (lambda: nn.StructureRegularizer(1, 2.5), "warmup_steps must be a whole number of 0 or more, got 2.5"),
        (lambda: nn.StructureRegularizer(reduction="max"), 'reduction must be "mean" or "sum", got \'max\''),
        (lambda: nn.StructureRegularizer()(), "modalities must be one pair"),
        (lambda: nn.StructureRegularizer(1, 0, temperature=0)(*pairs), "structure_loss: temperature must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_a_temperature_stays_within_its_limits():
    loss = nn.GramContrastiveLoss(limits=(0.05, 0.1))
    with torch.no_grad():
        loss.temperature.fill_(-3.0)
    loss(unit(4, 8), [unit(4, 8)])
    assert loss.temperature.item() == pytest.approx(0.05)
    with torch.no_grad():
        loss.temperature.fill_(3.0)
    loss.eval()(unit(4, 8), [unit(4, 8)])
    assert loss.temperature.item() == 3.0
    for bad, message in (
        (lambda: nn.GramContrastiveLoss(0.9), r"temperature must be within limits \(0.001, 0.5\), got 0.9"),
        (lambda: nn.TriangleContrastiveLoss(limits=(0.5, 0.1)), "limits must be two positive numbers in order"),
        (lambda: nn.ClipLoss(200.0), "scale must be positive and at most max_scale = 100.0, got 200.0"),
        (lambda: nn.SigLipLoss(0.0), "scale must be positive and finite, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_gradients_through_cached_embeddings():
    """A big batch through a small encoder: embeddings without a graph, one backward of the loss to them, then chunk by chunk through the encoder."""
    torch.manual_seed(0)
    encoder, text, video, audio = torch.nn.Linear(12, 8), torch.randn(40, 12), torch.randn(40, 12), torch.randn(40, 12)
    loss = nn.GramContrastiveLoss()
    loss(encoder(text), [encoder(video), encoder(audio)]).backward()
    expected = [parameter.grad.clone() for parameter in [*encoder.parameters(), *loss.parameters()]]
    for parameter in [*encoder.parameters(), *loss.parameters()]:
        parameter.grad = None

    with torch.no_grad():
        cached = [encoder(batch) for batch in (text, video, audio)]
    leaves = [embedding.requires_grad_() for embedding in cached]
    loss(leaves[0], leaves[1:]).backward()
    for batch, leaf in zip((text, video, audio), leaves, strict=True):
        for rows in torch.arange(40).split(7):
            encoder(batch[rows]).backward(leaf.grad[rows])
    for parameter, theirs in zip([*encoder.parameters(), *loss.parameters()], expected, strict=True):
        assert torch.allclose(parameter.grad, theirs, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------------------------------- open_clip


def usual_clip_loss(image, text, scale, bias=0.0):
    logits, at = scale * image @ text.T + bias, torch.arange(len(image))
    return (F.cross_entropy(logits, at) + F.cross_entropy(logits.T, at)) / 2


def test_open_clip_on_one_process():
    image, text, scale = unit(8, 16), unit(8, 16), torch.tensor(14.0)
    assert torch.allclose(open_clip.ClipLoss()(image, text, scale), usual_clip_loss(image, text, scale))
    assert torch.allclose(open_clip.ClipLoss()(image, text, scale, torch.tensor(3.0)), usual_clip_loss(image, text, scale))
    assert list(open_clip.ClipLoss()(image, text, scale, output_dict=True)) == ["contrastive_loss"]
    logits = 10 * image @ text.T - 10
    signs = 2 * torch.eye(8) - 1
    assert torch.allclose(open_clip.SigLipLoss()(image, text, torch.tensor(10.0), torch.tensor(-10.0)), -F.logsigmoid(signs * logits).sum() / 8)
    with pytest.raises(ValueError, match="use_horovod must be False"):
        open_clip.ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match='dist_impl must be "bidir"'):
        open_clip.SigLipLoss(dist_impl="tree")


OPTIONS = [(local, grad) for local in (False, True) for grad in (False, True)]


def worker(rank, world):
    """Ours and the original's way, for each combination of its options."""
    import torch.distributed as dist
    from torch.distributed.nn.functional import all_gather

    torch.manual_seed(0)
    whole = unit(6 * world, 10), unit(6 * world, 10)
    found = {}

    def measure(function):
        image, text = (part[6 * rank : 6 * rank + 6].clone().requires_grad_() for part in whole)
        scale = torch.tensor(12.0, requires_grad=True)
        loss = function(image, text, scale)
        return [loss.detach(), *torch.autograd.grad(loss, [image, text, scale])]

    def original(local, with_grad):
        def loss(image, text, scale):
            everyone = []
            for part in (image, text):
                if with_grad:
                    everyone.append(torch.cat(all_gather(part)))
                    continue
                parts = [torch.zeros_like(part) for _ in range(world)]
                dist.all_gather(parts, part.detach())
                if not local:
                    parts[rank] = part  # its own rows keep their gradient
                everyone.append(torch.cat(parts))
            images, texts = everyone
            if not local:
                return usual_clip_loss(images, texts, scale)
            at = torch.arange(6) + 6 * rank
            return (F.cross_entropy(scale * image @ texts.T, at) + F.cross_entropy(scale * text @ images.T, at)) / 2

        return loss

    for local, with_grad in OPTIONS:
        found[local, with_grad] = measure(original(local, with_grad)), measure(open_clip.ClipLoss(local, with_grad, rank=rank, world_size=world))
    for how in (None, "gather"):
        found[how] = measure(lambda i, t, s, how=how: open_clip.SigLipLoss(rank=rank, world_size=world, dist_impl=how)(i, t, s, torch.tensor(-10.0)))
    logits = 12.0 * whole[0] @ whole[1].T - 10
    found["siglip"] = -F.logsigmoid((2 * torch.eye(6 * world) - 1) * logits)[6 * rank : 6 * rank + 6].sum() / 6
    return found


def test_open_clip_on_two_processes(tmp_path):
    ranks = run_ranks(2, "test_nn:worker", str(tmp_path))
    for local, with_grad in OPTIONS:
        for found in ranks:
            theirs, ours = found[local, with_grad]
            for ours_one, theirs_one in list(zip(ours, theirs, strict=True))[1:3]:
                assert torch.allclose(ours_one, theirs_one, rtol=1e-4, atol=1e-7), (local, with_grad)
        # values and the scale's gradient are shared out among ranks in another way; their means agree
        for position in (0, 3):
            means = [torch.stack([found[local, with_grad][side][position] for found in ranks]).mean() for side in (0, 1)]
            assert torch.allclose(means[1], means[0], rtol=1e-4), (local, with_grad, position)
    for found in ranks:
        for how in (None, "gather"):
            assert torch.allclose(found[how][0], found["siglip"], rtol=1e-5)
