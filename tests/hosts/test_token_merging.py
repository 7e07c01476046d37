"""Token merging inside timm's and transformers' vision transformers."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers
from torch.utils.checkpoint import checkpoint

from modalign import nn, ops


def vit(**options):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=7, **options).eval()


TIMM = {
    "class token": {},
    "layer scale": {"init_values": 0.1},
    "qk-norm": {"qk_norm": True},
    "registers": {"reg_tokens": 4},
    "mean": {"global_pool": "avg", "class_token": False},
}


@pytest.mark.parametrize("options", TIMM.values(), ids=list(TIMM))
def test_timm(options):
    model, pictures = vit(**options), torch.randn(3, 3, 64, 64)
    before = model(pictures)
    names = list(model.state_dict())
    with nn.patch(model, r=0):
        assert torch.equal(model(pictures), before)
    with nn.patch(model, r=2) as merging:
        assert list(model.state_dict()) == names
        merged = model(pictures)
        N = merging.last.sources[1].shape[1]
        assert merging.last.size.shape == (3, N - 8) and torch.equal(merging.last.size.sum(1), torch.full((3,), float(N)))
        assert merging.last.source.shape == (3, N) and merging.last.source.max() == N - 9
        protected = model.num_prefix_tokens
        assert torch.equal(merging.last.source[:, :protected], torch.arange(protected).expand(3, -1)) and (merging.last.size[:, :protected] == 1).all()
        assert not torch.equal(merged, before)
        merging.r = 0
        assert torch.equal(model(pictures), before)
    assert torch.equal(model(pictures), before) and isinstance(model.blocks, torch.nn.Sequential)


def by_hand(model, pictures, r):
    """ToMe in plain torch for timm's ViT."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(pictures)))
    size = None
    for block in model.blocks:
        attention, h = block.attn, block.norm1(x)
        q, k, v = attention.qkv(h).reshape(*h.shape[:2], 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(q), attention.k_norm(k)
        logits = q @ k.mT * attention.scale + (0 if size is None else size.log()[:, None, None, :])
        h = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + block.ls1(attention.proj(h))
        x, size, _ = ops.merge_tokens(x, k.mean(1), r, size=size, protected=model.num_prefix_tokens)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("options", TIMM.values(), ids=list(TIMM))
def test_what_is_computed_is_the_paper(options):
    model, pictures = vit(**options), torch.randn(2, 3, 64, 64)
    with nn.patch(model, r=3):
        torch.testing.assert_close(model(pictures), by_hand(model, pictures, 3), rtol=1e-4, atol=1e-5)


def test_equal_patches_merge_without_a_trace():
    """Four patches that are the same, but for positions, which are taken away: what is merged is equal, and attention counts it."""
    model = vit(pos_embed="none", class_token=False, global_pool="avg")
    pictures = torch.randn(2, 3, 16, 16).repeat(1, 1, 4, 4)
    before = model(pictures)
    with nn.patch(model, r=2, restore=True):
        torch.testing.assert_close(model(pictures), before, rtol=1e-4, atol=1e-5)
    with nn.patch(model, r=2, proportional=False, restore=True):
        torch.testing.assert_close(model(pictures), before, rtol=1e-4, atol=1e-5)  # all keys are equal here


TOWERS = {
    "CLIP": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=64, patch_size=16)),
    "SigLIP": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=64, patch_size=16)
    ),
    "ViT": lambda: transformers.ViTModel(transformers.ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=64, patch_size=16)),
    "DINOv2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=64, patch_size=16)),
    "DINOv2 with registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=64, patch_size=16)
    ),
}


@pytest.mark.parametrize("name", list(TOWERS))
def test_transformers(name):
    torch.manual_seed(0)
    model, pictures = TOWERS[name]().eval(), torch.randn(2, 3, 64, 64)
    before = model(pictures).last_hidden_state
    with nn.patch(model, r=0):
        assert torch.equal(model(pictures).last_hidden_state, before)
    with nn.patch(model, r=3) as merging:
        after = model(pictures).last_hidden_state
        protected = {"CLIP": 1, "SigLIP": 0, "ViT": 1, "DINOv2": 1, "DINOv2 with registers": 5}[name]
        assert merging.protected == protected and after.shape[1] == before.shape[1] - 9
        assert (merging.last.size[:, :protected] == 1).all() and (merging.last.size.sum(1) == before.shape[1]).all()
    with nn.patch(model, r=3, restore=True):
        assert model(pictures).last_hidden_state.shape == before.shape
    assert torch.equal(model(pictures).last_hidden_state, before)


@pytest.mark.parametrize("name", list(TOWERS))
def test_hidden_states_are_recorded_and_layers_checkpointed(name):
    """As vision-language models ask for them: those of every layer, with as many tokens as the layer left."""
    torch.manual_seed(0)
    model, pictures = TOWERS[name](), torch.randn(2, 3, 64, 64)
    with nn.patch(model, r=3):
        states = model.eval()(pictures, output_hidden_states=True).hidden_states
        N = states[0].shape[1]
        assert [state.shape[1] for state in states] == [N, N - 3, N - 6, N - 9]
        model.train()
        want = torch.autograd.grad(model(pictures).last_hidden_state.square().sum(), list(model.parameters()), allow_unused=True)
        model.gradient_checkpointing_enable()
        got = torch.autograd.grad(model(pictures).last_hidden_state.square().sum(), list(model.parameters()), allow_unused=True)
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
    assert all(type(each).__module__ != nn.patch.__module__ for each in model.modules())


def test_intermediates_of_timm():
    model, pictures = vit(), torch.randn(2, 3, 64, 64)
    with nn.patch(model, r=2):
        states = model.forward_intermediates(pictures, output_fmt="NLC", intermediates_only=True)
        assert [state.shape[1] for state in states] == [14, 12, 10, 8]
        with pytest.raises(ValueError, match="patch: layers must be run from the first on while tokens merge, got slice"):
            model.blocks[2:]


def test_training_checkpoints_and_two_passes_at_once():
    model, pictures = vit(), torch.randn(2, 3, 64, 64)
    with nn.patch(model, r=2):
        one, other = model(pictures), model(pictures.flip(0))
        (one.square().sum() + other.sum()).backward()
        want = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model.set_grad_checkpointing(True)
        one, other = model(pictures), model(pictures.flip(0))
        (one.square().sum() + other.sum()).backward()
        for p, grad in zip(model.parameters(), want, strict=True):
            torch.testing.assert_close(p.grad, grad)
        model.set_grad_checkpointing(False)
        torch.testing.assert_close(checkpoint(model, pictures, use_reentrant=False), one)


@pytest.mark.parametrize("make", [vit, TOWERS["CLIP"]], ids=["timm", "transformers"])
def test_one_compiled_graph(make):
    model, pictures = make().eval(), torch.randn(2, 3, 64, 64)
    last = (lambda given: given) if make is vit else (lambda given: given.last_hidden_state)
    with nn.patch(model, r=2):
        want = last(model(pictures))
        torch._dynamo.reset()
        got = last(torch.compile(model, fullgraph=True, backend="aot_eager")(pictures))
        torch.testing.assert_close(got, want)


def test_copies_are_models_of_their_own():
    model, pictures = vit(), torch.randn(1, 3, 64, 64)
    with nn.patch(model, r=2) as merging:
        twin = copy.deepcopy(model)
        assert torch.equal(twin(pictures), model(pictures))
        merging.r = 0
        assert not torch.equal(twin(pictures), model(pictures))


def test_the_example_runs(tmp_path):
    example = Path(__file__).parents[2] / "examples/merge_tokens_in_a_vit.py"
    shown = subprocess.run([sys.executable, example, "--quick", "--out", tmp_path / "vit.json"], capture_output=True, text=True, check=True, timeout=240).stdout
    rows = json.loads((tmp_path / "vit.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [17, 8] and rows[0]["cosine"] > 1 - 1e-6 and "| 3 | 8 |" in shown


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(ValueError, match=r"patch: model must have one list of layers of a known kind, got none"):
        nn.patch(torch.nn.Linear(2, 2), 1)
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4), vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
        )
    )
    with pytest.raises(ValueError, match=r"patch: model must have one list of layers .*, got \w+\.layers, \w+\.layers"):
        nn.patch(clip, 1)
    nn.patch(clip.vision_model, 1).remove()
    model = vit()
    with nn.patch(model, r=2), pytest.raises(ValueError, match="patch: layers must be called without masks"):
        model.forward_features(torch.randn(1, 3, 64, 64), attn_mask=torch.ones(17, 17, dtype=torch.bool))
    for block in model.blocks:
        block.attn.fused_attn = False
    with nn.patch(model, r=2), pytest.raises(RuntimeError, match="patch: attention must run through torch's scaled_dot_product_attention"):
        model(torch.randn(1, 3, 64, 64))

    class Sandwich(timm.models.vision_transformer.Block):
        def forward(self, x):
            return super().forward(x) * 2

    model.blocks[0].__class__ = Sandwich
    with pytest.raises(ValueError, match=r"patch: Sandwich must be x \+ attention\(x\), then x \+ mlp\(x\), got"):
        nn.patch(model, 2)
    for r in (-1, 1.5, (4, 3.0)):
        with pytest.raises(ValueError, match="merge_schedule: r must be a whole number"):
            nn.patch(vit(), r)
    with pytest.raises(ValueError, match="merge_schedule: r must have at most 4 numbers"):
        nn.patch(vit(), [1] * 5)
