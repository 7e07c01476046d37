"""Windowed refinement, text-guided encoding, temporal tokens, additive attention, two perspectives, regions: each against dense float64 formulas, and what its paper promises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from modalign import masks, nn
from module_battery import F64, Case, battery, dense_attention, dense_rotation, opened, split

THERE = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


VIDEO = nn.HierarchicalTemporalEncoder(8, heads=2, layers=1, levels=2, per_level=3)
CASES = [
    Case(
        "LocalWindowRefine",
        lambda: nn.LocalWindowRefine(12, 10, heads=2, hidden=8),
        lambda B: ((randn(B, 2, 4, 12), randn(B, 2, 12, seed=1), randn(B, 6, 6, 10, seed=2)), {}),
    ),
    Case(
        "TextGuidedEncoder",
        lambda: nn.TextGuidedEncoder(8, 6, heads=2, layers=4, hidden=12),
        lambda B: ((randn(B, 5, 8), randn(B, 4, 6, seed=1), THERE[:1].expand(B, -1)), {}),
    ),
    Case(
        "HierarchicalTemporalEncoder",
        lambda: nn.HierarchicalTemporalEncoder(8, heads=2, layers=2, levels=2, per_level=3, hidden=12),
        lambda B: ((randn(B, 4, 5, 8), VIDEO.mask(4, 5)), {}),
    ),
    Case(
        "TextToVisionAdditive",
        lambda: nn.TextToVisionAdditive(12, 10, heads=2),
        lambda B: ((randn(B, 5, 12), randn(B, 7, 10, seed=1)), {}),
        ("scale",),
        True,
    ),
    Case(
        "VisionAdditiveAttention",
        lambda: nn.VisionAdditiveAttention(12, 10, 4, key_heads=2, head_width=6, rotary=100.0, bias=True),
        lambda B: ((randn(B, 5, 12), randn(B, 7, 10, seed=1)), {"causal": True}),
        ("vision_gate.q", "vision_gate.k", "vision_gate.v"),
    ),
    Case(
        "DualEnhancement",
        lambda: nn.DualEnhancement(16, heads=2),
        lambda B: ((randn(B, 4, 3, 3, 16), randn(B, 4, 3, 3, 16, seed=1), randn(B, 3, 3, 16, seed=2)), {}),
    ),
    Case("PointToRegionPacker", lambda: nn.PointToRegionPacker(8, (2, 3, 1), heads=2, inner=12), lambda B: ((randn(B, 4, 6, 5, 8),), {})),
    Case("SlowFastPacker", lambda: nn.SlowFastPacker(8, times=2, heads=2, inner=12), lambda B: ((randn(B, 4, 6, 3, 8),), {})),
]
TestBattery = battery(CASES)


def named(name):
    return next(case for case in CASES if case.name == name)


def launched(monkeypatch, module):
    """Sizes [batch, rows, keys] of the attentions that the modules of a file launch, in a list that fills."""
    shapes, original = [], module.masked_attention

    def counted(query, key, *rest, **options):
        shapes.append((query.shape[0], query.shape[2], key.shape[2]))
        return original(query, key, *rest, **options)

    monkeypatch.setattr(module, "masked_attention", counted)
    return shapes


def close(ours, want, tolerance=1e-11):
    torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance)


def linear(weights, name, x):
    bias = f"{name}.bias"
    return x @ weights[f"{name}.weight"].T + (weights[bias] if bias in weights else 0)


def gelu(x):
    return x / 2 * (1 + torch.erf(x / 2**0.5))


def norm(weights, name, x):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attention(weights, name, x, context, heads, keep=None):
    q, k, v = (split(linear(weights, f"{name}.{each}_proj", y), heads) for each, y in (("q", x), ("k", context), ("v", context)))
    return linear(weights, f"{name}.o_proj", dense_attention(q, k, v, keep).transpose(1, 2).flatten(2))


def encoder_layer(weights, x, heads, keep=None, name=""):
    h = norm(weights, f"{name}attention_norm", x)
    x = x + attention(weights, f"{name}attention", h, h, heads, keep)
    h = norm(weights, f"{name}feed_forward_norm", x)
    return x + linear(weights, f"{name}feed_forward.2", gelu(linear(weights, f"{name}feed_forward.0", h)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.LocalWindowRefine(8, heads=2)(torch.ones(1, 2, 5, 8), torch.ones(1, 2, 8), torch.ones(1, 6, 6, 8)), "count must be a square, got 5"),
        (lambda: nn.LocalWindowRefine(8, heads=2)(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 8), torch.ones(1, 5, 6, 8)), r"context must be \[B, 6, 6, 8\]"),
        (lambda: nn.LocalWindowRefine(8, heads=2)(torch.ones(1, 2, 4, 8), torch.ones(1, 3, 8), torch.ones(1, 6, 6, 8)), "question must have latents' L = 2"),
        (lambda: nn.LocalWindowRefine(8, heads=2).context(torch.ones(1, 9, 9, 8), 3), "count must be a square, got 3"),
        (lambda: nn.TextGuidedEncoder(8, 6, heads=2, layers=2), "layers must be 3 or more"),
        (lambda: nn.TextGuidedEncoder(8, 6, heads=2, layers=4, early=5), "early from 0 to layers, got 4 and 5"),
        (lambda: nn.TextGuidedEncoder(8, 6, heads=2, layers=3)(torch.ones(1, 2, 8), torch.ones(1, 2, 6), torch.ones(1, 2)), r"question_mask must be bool \[B, L\] = \[1, 2\]"),
        (lambda: nn.TextGuidedEncoder(8, 6, heads=2, layers=3)(torch.ones(1, 2, 8), torch.ones(2, 2, 6)), r"question must be \[B, L, 6\] with B = 1"),
        (lambda: nn.HierarchicalTemporalEncoder(8, heads=2, layers=1, levels=15), "levels must be a whole number from 0 to 14"),
        (lambda: nn.HierarchicalTemporalEncoder(8, heads=2, layers=1)(torch.ones(1, 0, 3, 8)), "patches must have frames and sites, got 0 and 3"),
        (lambda: nn.HierarchicalTemporalLayer(8, 2)(torch.ones(1, 6, 8), frames=2), r"x must be \[B, 1 \+ 2 S, width\], got \[1, 6, 8\]"),
        (lambda: nn.HierarchicalTemporalEncoder(8, heads=2, layers=1, levels=11, stride=10), r"stride \*\* levels must be below 2 \*\* 31, got 10 \*\* 11"),
        (lambda: nn.VisionAdditiveAttention(8, 6, 2, terms="qq"), 'terms must be letters of "qkv"'),
        (lambda: nn.VisionAdditiveAttention(8, 6, 2, vision_heads=4), "vision_heads must divide vision_width = 6, got 4"),
        (lambda: nn.TextToVisionAdditive(8, 6, heads=2)(torch.ones(1, 2, 7), torch.ones(1, 2, 6)), r"h must be \[B, N, 8\]"),
        (lambda: nn.dual_perspective_crops(torch.ones(1, 3, 4, 5), 2), "sides that n = 2 divides"),
        (lambda: nn.DualEnhancement(7, heads=1), "width must be even"),
        (lambda: nn.DualEnhancement(8)(torch.ones(1, 3, 2, 2, 8), torch.ones(1, 3, 2, 2, 8)), r"local must be \[B, n\^2, g, g, 8\]"),
        (lambda: nn.DualEnhancement(8)(torch.ones(1, 4, 2, 2, 8), torch.ones(1, 4, 2, 3, 8)), r"whole must be \[B, 4, 2, 2, 8\]"),
        (lambda: nn.PointToRegionPacker(8, (1, 2)), r"region must be \(t, y, x\)"),
        (lambda: nn.PointToRegionPacker(8, (1, 2, 2), inner=12, heads=8), "heads must divide inner = 12"),
        (lambda: nn.PointToRegionPacker(8, (1, 2, 2), inner=16)(torch.ones(1, 2, 5, 4, 8)), r"T, Y, X that region \(1, 2, 2\) divides, got \[2, 5, 4\]"),
    ],
)
def test_bad_input_is_refused_in_words(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.TextGuidedEncoder(8, 6, heads=2, layers=3, early=0.5), "TextGuidedEncoder: early must be a whole number, got 0.5"),
        (lambda: nn.TextGuidedEncoder(8, 6, heads=2, layers=3, early=True), "TextGuidedEncoder: early must be a whole number, got True"),
        (lambda: nn.TextGuidedEncoder(8, 6, heads=2, layers=3)(torch.ones(1, 2, 8), torch.ones(1, 2, 6), [True, True]), "question_mask must be a bool tensor .*, got list"),
        (lambda: nn.VisionAdditiveAttention(8, 6, 2)(torch.ones(1, 2, 8), past=(1, 2)), "MaskedAttention: past must be KeyValues, got tuple"),
    ],
)
def test_input_of_another_kind_is_refused_in_words(make, message):
    with pytest.raises(TypeError, match=message):
        make()


# ------------------------------------------------------------------------------------------------------------------------------------ windowed refinement


def flat_windows(count):
    """Latents and the cells of the finer map as tokens, whose segment is the cell of the coarse map."""
    s = int(count**0.5)
    places = torch.arange(3 * s)
    cell = (places[:, None] // 3 * s + places // 3).flatten()
    return masks.tokens([0] * count, segment=torch.arange(count)), masks.tokens([0] * len(cell), segment=cell)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_refinement_is_attention_under_the_mask_of_cells(count):
    module = opened(named("LocalWindowRefine"))
    s, weights = int(count**0.5), module.state_dict()
    latents, question, context = randn(2, 3, count, 12), randn(2, 3, 12, seed=1), randn(2, 3 * s, 3 * s, 10, seed=2)
    keep = masks.cell_window(*flat_windows(count)).dense()
    q = linear(weights, "proj_in", torch.cat([question[:, :, None].expand(2, 3, count, 12), latents], -1))
    seen = torch.stack([attention(weights, "attention", q[:, n], context.flatten(1, 2), 2, keep) for n in range(3)], 1)
    want = latents + linear(weights, "proj_out.2", gelu(linear(weights, "proj_out.0", norm(weights, "norm", q + seen))))
    close(module(latents, question, context), want)


def test_a_latent_sees_no_window_but_its_own():
    module, question, latents, context = opened(named("LocalWindowRefine")), randn(2, 3, 12, seed=1), randn(2, 3, 9, 12), randn(2, 9, 9, 10, seed=2)
    out = module(latents, question, context)
    changed = context.clone()
    changed[:, 3:6, 6:9] += 1  # the window of cell (1, 2)
    moved = (module(latents, question, changed) - out).abs().amin(-1)
    rest = [n for n in range(9) if n != 5]
    assert (moved[:, :, 5] > 0).all() and torch.equal(module(latents, question, changed)[:, :, rest], out[:, :, rest])


def test_nine_equal_keys_give_their_value():
    """Whatever is asked: what comes out of the attention is the projected value."""
    module = opened(named("LocalWindowRefine"))
    weights, cell = module.state_dict(), randn(1, 1, 1, 10)
    latents, question = randn(1, 2, 4, 12), randn(1, 2, 12, seed=1)
    q = linear(weights, "proj_in", torch.cat([question[:, :, None].expand(1, 2, 4, 12), latents], -1))
    seen = linear(weights, "attention.o_proj", linear(weights, "attention.v_proj", cell))
    want = latents + linear(weights, "proj_out.2", gelu(linear(weights, "proj_out.0", norm(weights, "norm", q + seen))))
    close(module(latents, question, cell.expand(1, 6, 6, 10)), want)


def test_refinement_costs_nine_keys_a_query(monkeypatch):
    from modalign.nn import masked_attention as file

    shapes = launched(monkeypatch, file)
    nn.LocalWindowRefine(12, 10, heads=2)(torch.randn(2, 3, 16, 12), torch.randn(2, 3, 12), torch.randn(2, 12, 12, 10))
    assert shapes == [(2 * 16, 3, 9)]
    queries, keys = flat_windows(16)
    assert 32 * 3 * 9 * 4 == masks.cell_window(queries, keys).flops(1, 1) * 2 * 3


def test_latents_and_context_are_maxima_of_cells():
    module, picture = nn.LocalWindowRefine(12, 5, heads=2), randn(2, 12, 12, 5)
    close(module.pooled(picture, 2), picture.view(2, 2, 6, 2, 6, 5).amax((2, 4)))
    close(module.context(picture, 4), picture.view(2, 6, 2, 6, 2, 5).amax((2, 4)))
    with pytest.raises(ValueError, match="square"):
        module.context(picture, 5)


# ------------------------------------------------------------------------------------------------------------------------------------ text-guided encoder


def dense_guided(module, patches, question, there):
    weights, heads = module.state_dict(), 2
    x = torch.cat([patches, linear(weights, "aux_projector.2", gelu(linear(weights, "aux_projector.0", question)))], 1)
    N, layers, seen = patches.shape[1], len(module.layers), []
    late = torch.cat([torch.ones(len(x), N).bool(), there], 1)[:, None, None].expand(-1, 1, x.shape[1], -1)
    early = late.clone()
    early[:, :, :N, N:] = False
    for n in range(layers):
        x = encoder_layer(weights, x, heads, early if n < module.early else late, f"layers.{n}.")
        seen.append(x)
    half = (layers - 1) // 2
    return torch.cat([x, torch.stack(seen[:half]).mean(0), torch.stack(seen[half:-1]).mean(0)], -1).split([N, question.shape[1]], 1)


@pytest.mark.parametrize("layers", [3, 4, 7])
@pytest.mark.parametrize("early", [None, 0, 3])
def test_guided_encoder_is_the_dense_formula(layers, early):
    module = opened(Case("", lambda: nn.TextGuidedEncoder(8, 6, heads=2, layers=layers, early=early, hidden=12), None))
    patches, question = randn(2, 5, 8), randn(2, 4, 6, seed=1)
    want = dense_guided(module, patches, question, THERE)
    out = module(patches, question, THERE)
    close(out.patches, want[0])
    close(out.question[THERE], want[1][THERE])
    close(module(patches, question).patches, dense_guided(module, patches, question, torch.ones_like(THERE))[0])


def test_published_layers_are_split_in_thirteen_and_thirteen_and_one():
    module = nn.TextGuidedEncoder(4, 4, heads=1, layers=27, hidden=4)
    assert module.early == 13


def test_patches_do_not_see_the_question_early_and_see_it_late():
    patches, questions = randn(2, 5, 8), [randn(2, 4, 6, seed=seed) for seed in (1, 2)]
    early = opened(Case("", lambda: nn.TextGuidedEncoder(8, 6, heads=2, layers=4, early=4, hidden=12), None))
    one, other = (early(patches, each) for each in questions)
    assert torch.equal(one.patches, other.patches) and (one.question - other.question).abs().amin() > 0
    late = opened(Case("", lambda: nn.TextGuidedEncoder(8, 6, heads=2, layers=4, early=3, hidden=12), None))
    one, other = (late(patches, each).patches for each in questions)
    assert (one - other)[..., :8].abs().amin() > 0 and torch.equal(one[..., 8:], other[..., 8:])  # the last layer differs, the means of those before it do not


def test_padding_of_a_question_is_never_read():
    """Neither by a result nor by a gradient."""
    module, patches, question = opened(named("TextGuidedEncoder")), randn(2, 5, 8), randn(2, 4, 6, seed=1)
    out = module(patches, question.clone(), THERE)
    question[1, 2:] = torch.nan
    changed = module(patches, question, THERE)
    grads = [torch.autograd.grad(each.patches.sum() + each.question[THERE].sum(), list(module.parameters())) for each in (out, changed)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert torch.equal(out.patches, changed.patches) and torch.equal(out.question[THERE], changed.question[THERE])
    short = module(patches[1:], question[1:, :2])
    close(short.patches, out.patches[1:])


@pytest.mark.parametrize("late", [False, True])
def test_its_masks_are_those_of_the_rule(late, monkeypatch):
    from modalign.nn import masked_attention as file

    seen, original = [], file.masked_attention
    monkeypatch.setattr(file, "masked_attention", lambda q, k, v, mask, **rest: (seen.append(mask), original(q, k, v, mask, **rest))[1])
    nn.TextGuidedEncoder(8, 6, heads=2, layers=4, hidden=12)(torch.randn(2, 5, 8), torch.randn(2, 4, 6), THERE)
    tokens = masks.tokens([1] * 5 + [2] * 4, valid=torch.cat([torch.ones(2, 5).bool(), THERE], 1).int(), names=masks.TYPE_NAMES)
    rows = tokens.valid[:, None, :, None] == 1  # of tokens that are there
    found = seen[3 if late else 0].dense().expand(2, 1, 9, 9)
    assert torch.equal(found & rows, masks.text_guided(tokens, late=late).dense().expand(2, 1, 9, 9))


# ---------------------------------------------------------------------------------------------------------------------------------------- temporal tokens


@pytest.mark.parametrize(("levels", "per_level", "stride", "frames"), [(2, 3, 2, 4), (3, 4, 2, 8), (1, 2, 3, 5), (0, 4, 2, 3)])
def test_temporal_encoder_is_the_dense_formula(levels, per_level, stride, frames):
    make = Case("", lambda: nn.HierarchicalTemporalEncoder(8, heads=2, layers=2, levels=levels, per_level=per_level, stride=stride, hidden=12), None)
    module, sites = opened(make), 3
    weights, patches, others = module.state_dict(), randn(2, frames, sites, 8), 1 + levels * per_level
    level = [None] + [u for u in range(1, levels + 1) for _ in range(per_level)] + [0] * frames * sites  # None: [CLS], 0: patch
    phase = [0] + [v for _ in range(levels) for v in range(per_level)] + [0] * frames * sites
    time = [0] * others + [t for t in range(frames) for _ in range(sites)]
    N = len(level)
    keep = torch.zeros(N, N, dtype=torch.bool)
    for i in range(N):
        for j in range(N):
            if level[i] is None or level[j] is None:
                keep[i, j] = True
            elif level[i] == 0:
                keep[i, j] = level[j] > 0 or time[i] == time[j]
            else:
                keep[i, j] = 0 < level[j] <= level[i] or (level[j] == 0 and (time[j] - phase[i]) % stride ** level[i] == 0)
    assert torch.equal(module.mask(frames, sites).dense()[0, 0], keep)
    x = torch.cat([torch.cat([weights["cls"][None], weights["mst"]]).expand(2, -1, -1), patches.flatten(1, 2)], 1)
    for n in range(2):
        y = x[:, others:].view(2, frames, sites, 8)
        h = norm(weights, f"layers.{n}.temporal_norm", y)
        y = y + torch.stack([attention(weights, f"layers.{n}.temporal_attention", h[:, :, s], h[:, :, s], 2) for s in range(sites)], 2)
        x = encoder_layer(weights, torch.cat([x[:, :others], y.flatten(1, 2)], 1), 2, keep, f"layers.{n}.")
    x = norm(weights, "norm", x)
    out = module(patches)
    close(out.video, x[:, 0])
    close(out.temporal.flatten(1, 2), x[:, 1:others])
    close(out.patches.flatten(1, 2), x[:, others:])


def test_no_levels_and_one_frame_is_an_image_encoder():
    """With its weights, bit for bit: the attention along time begins at 0."""
    torch.manual_seed(0)
    video, patches = nn.HierarchicalTemporalEncoder(8, heads=2, layers=2, levels=0).double(), randn(2, 1, 9, 8)
    image = [nn.EncoderLayer(8, 2).double() for _ in range(2)]
    x = torch.cat([video.cls.expand(2, 1, 8), patches[:, 0]], 1)
    for own, layer in zip(video.layers, image, strict=True):
        layer.load_state_dict({name: value for name, value in own.state_dict().items() if "temporal" not in name})
        x = layer(x)
    assert torch.equal(video(patches).video, video.norm(x)[:, 0])
    loss = video(patches).video.square().sum()
    grads = torch.autograd.grad(loss, [video.layers[0].temporal_attention.o_proj.weight, video.layers[0].temporal_attention.v_proj.weight])
    assert grads[0].abs().max() > 0 and grads[1].abs().max() == 0


def test_temporal_work_is_that_of_the_kept_pairs(monkeypatch):
    from modalign.nn import masked_attention as file

    T, S, U, V = 8, 9, 3, 4
    module, shapes = nn.HierarchicalTemporalEncoder(8, heads=2, layers=1), launched(monkeypatch, file)
    module(torch.randn(2, T, S, 8))
    N = 1 + U * V + T * S
    assert shapes == [(2 * S, T, T), (2, N, N)]
    patch, cls = T * S * (S + U * V + 1), N
    level = sum(V * (u * V + 1) + sum(S * len(range(v % 2**u, T, 2**u)) for v in range(V)) for u in range(1, U + 1))
    assert module.mask(T, S).flops(1, 1) == pytest.approx(4 * (patch + cls + level))
    assert patch + cls + level < 0.4 * N * N


# -------------------------------------------------------------------------------------------------------------------------------------- additive attention


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_the_branch_is_the_dense_formula(heads):
    module = opened(Case("", lambda: nn.TextToVisionAdditive(12, 10, heads=heads), None))
    weights, h, vision, keep = module.state_dict(), randn(2, 5, 12), randn(2, 7, 10, seed=1), torch.rand(2, 1, 5, 7) < 0.5
    keep[0, :, 2] = False
    want = h + weights["scale"] * attention(weights, "attention", linear(weights, "to_vision", h), vision, heads, keep)
    close(module(h, vision, keep), want)
    assert torch.equal(module(h, vision, keep)[0, 2], h[0, 2])  # sees nothing


def test_no_picture_leaves_the_host_unchanged():
    branch, host = opened(named("TextToVisionAdditive")), opened(named("VisionAdditiveAttention"))
    x = randn(2, 5, 12)
    assert torch.equal(branch(x, x.new_zeros(2, 0, 10)), x)
    plain = nn.MaskedAttention(12, 4, key_heads=2, head_width=6, rotary=100.0, bias=True).double()
    plain.load_state_dict({name: value for name, value in host.state_dict().items() if "vision" not in name})
    for vision in (None, x.new_zeros(2, 0, 10)):
        assert torch.equal(host(x, vision, causal=True), plain(x, causal=True))


@pytest.mark.parametrize("terms", ["q", "k", "v", "kv", "qkv"])
@pytest.mark.parametrize("vision_heads", [1, 2])
def test_additive_terms_are_the_dense_formula(terms, vision_heads):
    module = opened(Case("", lambda: nn.VisionAdditiveAttention(12, 10, 4, key_heads=2, head_width=6, rotary=100.0, terms=terms, vision_heads=vision_heads), None))
    weights, x, vision = module.state_dict(), randn(2, 5, 12), randn(2, 7, 10, seed=1)
    c = dense_attention(split(linear(weights, "to_vision", x), vision_heads), split(vision, vision_heads), split(vision, vision_heads)).transpose(1, 2).flatten(2)
    projected = {name: linear(weights, f"{name}_proj", x) for name in "qkv"}
    for name in terms:
        projected[name] = projected[name] + weights[f"vision_gate.{name}"] * linear(weights, f"vision_proj.{name}", c)
    q, k, v = split(projected["q"], 4), split(projected["k"], 2), split(projected["v"], 2)
    q, k = dense_rotation(q, torch.arange(5), 100.0), dense_rotation(k, torch.arange(5), 100.0)
    want = linear(weights, "o_proj", dense_attention(q, k, v, torch.ones(5, 5).tril().bool()).transpose(1, 2).flatten(2))
    close(module(x, vision, causal=True), want)
    assert set(module.vision_gate) == set(terms)


def test_closed_additive_attention_is_the_host():
    torch.manual_seed(0)
    module, plain = nn.VisionAdditiveAttention(12, 10, 4).double(), nn.MaskedAttention(12, 4).double()
    plain.load_state_dict({name: value for name, value in module.state_dict().items() if "vision" not in name})
    x = randn(2, 5, 12)
    close(module(x, randn(2, 7, 10), causal=True), plain(x, causal=True))


def test_vision_never_enters_the_sequence(monkeypatch):
    """As many keys as there is text, one softmax over vision tokens as wide as the encoder; and steps of decoding are the whole at once."""
    from modalign.nn import text_to_vision_additive as file

    shapes = launched(monkeypatch, file)
    module = opened(Case("", lambda: nn.VisionAdditiveAttention(12, 300, 4, head_width=6, rotary=100.0), None))
    x, vision, past, parts = randn(2, 5, 12), randn(2, 7, 300, seed=1), None, []
    whole = module(x, vision, causal=True)
    assert shapes == [(2, 5, 7), (2, 5, 5)]
    for part in x.split([3, 1, 1], 1):
        out, past = module(part, vision, causal=True, past=past, return_keys=True)
        parts.append(out)
    close(torch.cat(parts, 1), whole)


def test_names_of_the_host_stay():
    assert {f"{name}_proj.weight" for name in "qkvo"} <= set(nn.VisionAdditiveAttention(12, 10, 4).state_dict())


# --------------------------------------------------------------------------------------------------------------------------------------- two perspectives


@pytest.mark.parametrize("n", [1, 2, 3])
def test_crops_put_together_are_the_picture(n):
    from modalign.nn.dual_enhancement import _from_blocks, _from_strides

    pictures = randn(2, 3, 4 * n, 5 * n)
    local, whole = nn.dual_perspective_crops(pictures, n)
    assert local.shape == whole.shape == (2, n * n, 3, 4, 5)
    for number in range(n * n):
        y, x = divmod(number, n)
        assert torch.equal(local[:, number], pictures[..., 4 * y : 4 * y + 4, 5 * x : 5 * x + 5]) and torch.equal(whole[:, number], pictures[..., y::n, x::n])
    L, G = (together(crops.movedim(2, 4), n).movedim(3, 1) for together, crops in ((_from_blocks, local), (_from_strides, whole)))
    assert torch.equal(L, pictures) and torch.equal(G, pictures)
    if n == 1:
        assert torch.equal(local, whole)


def dense_enhancement(module, local, whole, n, g):
    """A window at a time, taken out of the maps by their places."""
    weights, heads = module.state_dict(), module.attention.heads
    L, G = torch.zeros(2, n * g, n * g, 16, dtype=F64), torch.zeros(2, n * g, n * g, 16, dtype=F64)
    for number in range(n * n):
        y, x = divmod(number, n)
        L[:, g * y : g * y + g, g * x : g * x + g] = local[:, number]
        G[:, y::n, x::n] = whole[:, number]
    enhanced_L, enhanced_G = torch.zeros_like(L), torch.zeros_like(G)
    for y in range(n):
        for x in range(n):
            block, every = (slice(None), slice(g * y, g * y + g), slice(g * x, g * x + g)), (slice(None), slice(y, None, n), slice(x, None, n))
            for target, queries, keys, at in ((enhanced_G, G, L, block), (enhanced_L, L, G, every)):
                q, k = queries[at].flatten(1, 2), keys[at].flatten(1, 2)
                out = norm(weights, "norm", attention(weights, "attention", q, k, heads) + linear(weights, "attention.q_proj", q))
                target[at] = out.view(2, g, g, 16)
    parts = [linear(weights, f"{name}.2", gelu(linear(weights, f"{name}.0", y))) for name, y in (("local_mlp", enhanced_L), ("whole_mlp", enhanced_G))]
    return norm(weights, "fused_norm", torch.cat(parts, -1) + enhanced_L + enhanced_G)


@pytest.mark.parametrize(("n", "g"), [(1, 4), (2, 3), (3, 2)])
def test_enhancement_is_the_dense_formula(n, g):
    module = opened(named("DualEnhancement"))
    local, whole, base = randn(2, n * n, g, g, 16), randn(2, n * n, g, g, 16, seed=1), randn(2, g, g, 16, seed=2)
    fused = dense_enhancement(module, local, whole, n, g)
    resized = F.interpolate(fused.movedim(3, 1), size=(g, g), mode="bilinear").movedim(1, 3)
    if n == 3:  # the middles of 3 x 3
        close(resized, fused[:, 1::3, 1::3])
    close(module(local, whole), resized)
    close(module(local, whole, base), (resized + base) / 2)


def test_one_crop_has_one_perspective():
    """n = 1: L = G, so both directions are the same map."""
    module, x = opened(named("DualEnhancement")), randn(2, 1, 4, 4, 16)
    with torch.no_grad():
        for own, other in zip(module.local_mlp.parameters(), module.whole_mlp.parameters(), strict=True):
            own.copy_(other)
    weights = module.state_dict()
    flat = x[:, 0].flatten(1, 2)
    one = norm(weights, "norm", attention(weights, "attention", flat, flat, 2) + linear(weights, "attention.q_proj", flat))
    half = linear(weights, "local_mlp.2", gelu(linear(weights, "local_mlp.0", one)))
    close(module(x, x), norm(weights, "fused_norm", torch.cat([half, half], -1) + 2 * one).view(2, 4, 4, 16))


def test_enhancement_costs_windows(monkeypatch):
    from modalign.nn import dual_enhancement as file

    shapes = launched(monkeypatch, file)
    nn.DualEnhancement(16, heads=2)(torch.randn(2, 9, 4, 4, 16), torch.randn(2, 9, 4, 4, 16))
    assert shapes == [(2 * 9, 16, 16)] * 2  # of 2 x 144 x 144 between whole maps, a ninth


# ------------------------------------------------------------------------------------------------------------------------------------------------ regions


def packed_mlp(weights, name, x):
    return norm(weights, f"{name}.3", linear(weights, f"{name}.2", gelu(linear(weights, f"{name}.0", x))))


@pytest.mark.parametrize("region", [(1, 1, 1), (2, 1, 1), (1, 3, 1), (2, 3, 5), (4, 1, 5)])
def test_packer_is_the_dense_formula(region):
    module = opened(Case("", lambda: nn.PointToRegionPacker(8, region, heads=2, inner=12), None))
    weights, features, (t, y, x) = module.state_dict(), randn(2, 4, 6, 5, 8), region
    out = module(features)
    assert out.shape == (2, 4 // t, 6 // y, 5 // x, 8)

    def middle(start, size):  # linear interpolation at the middle of a region
        return sorted({start + (size - 1) // 2, start + size // 2})

    for a in range(4 // t):
        for b in range(6 // y):
            for c in range(5 // x):
                point = features[:, middle(a * t, t)][:, :, middle(b * y, y)][:, :, :, middle(c * x, x)].mean((1, 2, 3))[:, None]
                region = features[:, a * t : a * t + t, b * y : b * y + y, c * x : c * x + x].flatten(1, 3)
                q, k, v = split(packed_mlp(weights, "to_q", point), 2), split(packed_mlp(weights, "to_k", region), 2), split(packed_mlp(weights, "to_v", region), 2)
                want = point + linear(weights, "to_out", dense_attention(q, k, v).transpose(1, 2).flatten(2))
                close(out[:, a, b, c], want[:, 0])


def test_a_region_of_one_is_a_transform_of_each_token():
    module, features = opened(Case("", lambda: nn.PointToRegionPacker(8, (1, 1, 1), heads=2, inner=12), None)), randn(2, 2, 3, 3, 8)
    weights = module.state_dict()
    close(module(features), features + linear(weights, "to_out", packed_mlp(weights, "to_v", features)))


def test_equal_keys_give_the_mean_of_the_region():
    module, features = opened(named("PointToRegionPacker")), randn(2, 4, 6, 5, 8)
    with torch.no_grad():
        module.to_k[3].weight.zero_()
    weights = module.state_dict()
    mean = packed_mlp(weights, "to_v", features).view(2, 2, 2, 2, 3, 5, 12).mean((2, 4))
    points = features[:, :, 1::3].view(2, 2, 2, 2, 5, 8).mean(2)
    close(module(features), points + linear(weights, "to_out", mean))


def test_a_token_sees_no_region_but_its_own():
    module, features = opened(named("PointToRegionPacker")), randn(2, 4, 6, 5, 8)
    out, changed = module(features), features.clone()
    changed[:, 2:, 3:, 4] += 1  # region (1, 1, 4)
    moved = module(changed)
    same = torch.ones(2, 2, 5, dtype=torch.bool)
    same[1, 1, 4] = False
    assert torch.equal(moved[:, same], out[:, same]) and (moved - out)[:, 1, 1, 4].abs().amin() > 0


def test_packing_costs_the_keys_of_the_regions(monkeypatch):
    from modalign.nn import point_to_region_packer as file

    shapes = launched(monkeypatch, file)
    module = nn.SlowFastPacker(8, times=5, side=3, heads=2, inner=12)
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(2, 10, 6, 6, 8))
    assert shapes == [(2 * 2 * 36, 1, 5), (2 * 10 * 4, 1, 9)]
    mlp = 2 * (8 * 12 + 12 * 12)
    of_all, of_packed = 2 * 360 * 2 * 2 * mlp, 2 * (2 * 36 + 10 * 4) * (mlp + 2 * 12 * 8)  # keys and values in both streams; queries and outputs
    assert counter.get_total_flops() == of_all + of_packed
