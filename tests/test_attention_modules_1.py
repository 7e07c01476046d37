"""MaskedAttention, the decoder layer, gated and composite attention, fewer visual heads, dual cross-attention: each against dense float64 formulas, and what its paper promises."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modalign import masks, nn
from module_battery import F64, Case, battery, dense_attention, dense_feed_forward, dense_layer, dense_rotation, opened, split

TOKENS = masks.layout([("prefix", 2), ("visual", (3, 3)), ("question", 3), ("answer", 4)])
TWO = masks.layout([("prefix", 2), ("visual", (2, 3)), ("question", 3), ("visual", (2, 2)), ("answer", 2)], [("visual", (2, 2)), ("question", 1), ("answer", 3)])
N, TWO_N = len(TOKENS), len(TWO)
STREAMS, TEXT, MEDIA = nn.token_streams(TOKENS), masks.tokens([0] * 6, last=torch.tensor([-1, 0, 0, 1, 1, 1])), masks.tokens([0] * 5, segment=torch.tensor([0, 0, 1, 1, 1]))


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def window_case(name, **options):
    def make():
        return nn.NeighborAwareLayer(16, 4, key_heads=2, hidden=24, **options)

    return Case(name, make, lambda B: ((randn(B, N, 16), make().mask(TOKENS), STREAMS), {}))


def streams_case(name, kind, **options):
    places = {"text_positions": STREAMS.text.index, "visual_positions": STREAMS.visual.index}
    wide = options.get("feature_width", 16)
    return Case(name, lambda: kind(16, 4, key_heads=2, hidden=24, **options), lambda B: ((randn(B, 9, 16), randn(B, 9, wide, seed=1), STREAMS.text_mask()), places))


CASES = [
    Case("MaskedAttention", lambda: nn.MaskedAttention(12, 4, key_heads=2, head_width=6, bias=True, rotary=100.0), lambda B: ((randn(B, 7, 12),), {"causal": True})),
    Case("MaskedAttention to a context", lambda: nn.MaskedAttention(12, 2, context_width=5), lambda B: ((randn(B, 7, 12), randn(B, 4, 5, seed=1)), {})),
    Case("DecoderLayer", lambda: nn.DecoderLayer(16, 4, key_heads=2, hidden=24), lambda B: ((randn(B, N, 16), masks.modality_mutual(TOKENS)), {})),
    Case(
        "GatedCrossAttention",
        lambda: nn.GatedCrossAttention(12, 10, heads=2, head_width=6, expansion=2),
        lambda B: ((randn(B, 6, 12), randn(B, 5, 10, seed=1), masks.media(TEXT, MEDIA)), {}),
        ("attention_gate", "feed_forward_gate"),
        True,
    ),
    Case(
        "HybridDecoderLayer",
        lambda: nn.HybridDecoderLayer(16, 10, heads=2, hidden=24, cross={"heads": 2, "head_width": 6, "expansion": 2}),
        lambda B: ((randn(B, 6, 16), randn(B, 5, 10, seed=1), masks.media(TEXT, MEDIA)), {}),
        ("cross.attention_gate", "cross.feed_forward_gate"),
    ),
    streams_case("CompositeDecoderLayer", nn.CompositeDecoderLayer),
    streams_case("CompositeDecoderLayer, ffn", nn.CompositeDecoderLayer, visual_update="ffn"),
    streams_case("NoVisualAttentionLayer", nn.NoVisualAttentionLayer, feature_width=10),
    window_case("NeighborAwareLayer", active_heads=[True, False, True, False], feed_forward_cut=3),
    window_case("NeighborAwareLayer, renormalised", active_heads=[True, False, True, False], renormalize=True),
    Case(
        "DualCrossAttention",
        lambda: nn.DualCrossAttention(12, 10, heads=4, key_heads=2),
        lambda B: ((randn(B, 4, 12), randn(B, 3, 12, seed=1), randn(B, 8, 10, seed=2)), {}),
        ("visual_gate", "text_gate"),
        True,
    ),
    Case(
        "DualCrossAttention, not shared",
        lambda: nn.DualCrossAttention(12, 10, heads=4, share=False),
        lambda B: ((randn(B, 4, 12), randn(B, 3, 12, seed=1), randn(B, 8, 10, seed=2)), {}),
        ("visual_gate", "text_gate"),
        True,
    ),
]
TestBattery = battery(CASES)


X, PLAIN, TURNED = torch.ones(2, 3, 8), nn.MaskedAttention(8, 4), nn.MaskedAttention(8, 4, rotary=10.0)


def named(name):
    return next(case for case in CASES if case.name == name)


def launched(monkeypatch, module):
    """Shapes [rows, keys] of the attentions that the modules of a file launch, in a list that fills."""
    shapes, original = [], module.masked_attention

    def counted(query, key, *rest, **options):
        shapes.append((query.shape[2], key.shape[2]))
        return original(query, key, *rest, **options)

    monkeypatch.setattr(module, "masked_attention", counted)
    return shapes


def close(ours, want, tolerance=1e-11):
    torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------------------------------------------------- MaskedAttention


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("rotary", [None, 100.0])
def test_attention_is_the_dense_formula(key_heads, rotary):
    torch.manual_seed(1)
    module = nn.MaskedAttention(12, 4, key_heads=key_heads, head_width=6, bias=True, rotary=rotary).double()
    weights, x, keep = module.state_dict(), randn(2, 7, 12), torch.rand(2, 4, 7, 7) < 0.4

    def project(name, heads):
        return split(x @ weights[f"{name}_proj.weight"].T + weights[f"{name}_proj.bias"], heads)

    q, k, v = project("q", 4), project("k", key_heads), project("v", key_heads)
    if rotary:
        places = torch.tensor([[3, 4, 5, 6, 7, 8, 9], [0, 2, 4, 6, 8, 10, 12]])
        q, k = (dense_rotation(each, places, rotary) for each in (q, k))
    want = dense_attention(q, k, v, keep).transpose(1, 2).flatten(2) @ weights["o_proj.weight"].T + weights["o_proj.bias"]
    close(module(x, mask=keep, positions=places if rotary else None), want)


def test_far_positions_keep_their_digits():
    x, places = randn(1, 2, 50, 64), torch.arange(50) + 1_000_000
    assert (nn.rotate(x.float(), places, 10000.0) - nn.rotate(x, places, 10000.0)).abs().max() < 1e-5
    close(nn.rotate(x, places, 10000.0), dense_rotation(x, places), 1e-9)


def test_keys_behind_a_length_are_not_seen():
    module, x = opened(named("MaskedAttention to a context")), randn(2, 7, 12)
    context, keep = randn(2, 4, 5, seed=1), torch.arange(4) < torch.tensor([[4], [2]])
    close(module(x, context, key_lengths=torch.tensor([4, 2])), module(x, context, keep[:, None, None]))


def test_rotary_depends_on_distance_alone():
    q, k = randn(1, 2, 5, 8), randn(1, 2, 5, 8, seed=1)
    places = torch.tensor([0, 3, 4, 9, 11])
    scores = [nn.rotate(q, places + shift, 50.0) @ nn.rotate(k, places + shift, 50.0).mT for shift in (0, 1000)]
    close(*scores)
    assert (scores[0] - q @ k.mT).abs().max() > 0.1


@pytest.mark.parametrize("steps", [[7], [1] * 7, [3, 1, 3]])
def test_decoding_with_earlier_keys_is_the_whole_at_once(steps):
    module, x, past, parts = opened(named("MaskedAttention")), randn(2, 7, 12), None, []
    for part in x.split(steps, 1):
        out, past = module(part, causal=True, past=past, return_keys=True)
        parts.append(out)
    close(torch.cat(parts, 1), module(x, causal=True))
    assert past.key.shape == past.value.shape == (2, 2, 7, 6)
    _, past = module(x[:, :3], x[:, :4], return_keys=True)  # a context of tokens goes on where it ended too
    close(module(x[:, 3:], x[:, 4:], past=past, positions=torch.arange(3, 7)), module(x, x)[:, 3:])


def test_decoding_under_a_mask_takes_its_rows():
    module, x = nn.DecoderLayer(16, 4).double(), randn(1, N, 16)
    mask, whole = masks.image_prefix(TOKENS), None
    whole = module(x, mask)
    _, past = module(x[:, :14], masks.image_prefix(TOKENS.select(0, 14)), return_keys=True)
    close(module(x[:, 14:], mask.rows(14, N), past=past), whole[:, 14:])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.MaskedAttention(10, 4), ValueError, "MaskedAttention: heads must divide width = 10 where head_width is not given, got 4"),
        (lambda: nn.MaskedAttention(12, 4, key_heads=3), ValueError, "MaskedAttention: key_heads must divide heads = 4, got 3"),
        (lambda: nn.MaskedAttention(12, 4, rotary=100.0), ValueError, "MaskedAttention: head_width must be even for rotary, got 3"),
        (lambda: nn.MaskedAttention(8, 4, rotary="x"), TypeError, "MaskedAttention: rotary must be a number, got 'x'"),
        (lambda: nn.MaskedAttention(8, 4, rotary=True), TypeError, "MaskedAttention: rotary must be a number, got True"),
        (lambda: nn.MaskedAttention(8, 4, rotary=float("nan")), ValueError, "MaskedAttention: rotary must be finite and positive, got nan"),
        (lambda: nn.MaskedAttention(8, 4, rotary=0), ValueError, "MaskedAttention: rotary must be finite and positive, got 0"),
        (lambda: nn.MaskedAttention(8, 4, bias=3), TypeError, "MaskedAttention: bias must be True or False, got int 3"),
        (lambda: nn.GatedFeedForward(8, 16)(X, 0), ValueError, "GatedFeedForward: units must be None or a whole number from 1 to 16, got 0"),
        (lambda: nn.GatedFeedForward(8, 16)(X, -1), ValueError, "GatedFeedForward: units must be"),
        (lambda: nn.GatedFeedForward(8, 16)(X, 17), ValueError, "GatedFeedForward: units must be"),
        (lambda: nn.GatedFeedForward(8, 16)(X, True), ValueError, "GatedFeedForward: units must be"),
        (lambda: nn.DecoderLayer(8, 4, eps=-1), ValueError, "DecoderLayer: eps must be finite and 0 or more, got -1"),
        (lambda: nn.DecoderLayer(8, 4, eps="1"), TypeError, "DecoderLayer: eps must be a number, got '1'"),
        (lambda: nn.DecoderLayer("8", 4), ValueError, "DecoderLayer: width must be a whole number of at least 1, got '8'"),
        (lambda: nn.EncoderLayer(8, 4, hidden=0), ValueError, "EncoderLayer: hidden must be a whole number of at least 1, got 0"),
        (lambda: nn.EncoderLayer(8, 4, hidden=True), ValueError, "EncoderLayer: hidden must be a whole number of at least 1, got True"),
        (lambda: nn.GatedCrossAttention(8, expansion=0), ValueError, "GatedCrossAttention: expansion must be a whole number of at least 1, got 0"),
        (lambda: nn.GatedCrossAttention(8)(X, None), TypeError, r"GatedCrossAttention: media must be a tensor \[B, ..., 8\], got NoneType"),
        (lambda: nn.GatedCrossAttention(8)(X, X[:1]), ValueError, r"MaskedAttention: context must be .* with B = 2"),
        (lambda: nn.DualCrossAttention(8, heads=2, share=1), TypeError, "DualCrossAttention: share must be True or False, got int 1"),
        (lambda: nn.DualCrossAttention(8, heads=2, share=False)(X, X, X, masks.causal(7, 3)), ValueError, "DualCrossAttention: mask must be of 6 queries and 3 keys"),
        (lambda: nn.DualCrossAttention(8, heads=2, share=False)(X, X, X, torch.ones(6, 3)), TypeError, "DualCrossAttention: mask must be a bool tensor"),
        (lambda: PLAIN(X, positions=torch.arange(3)), ValueError, "MaskedAttention: positions must be given with rotary alone, got"),
        (lambda: PLAIN(X, X, key_positions=torch.arange(3)), ValueError, "MaskedAttention: key_positions must be given with rotary alone, got"),
        (lambda: nn.DecoderLayer(8, 4, rotary=None)(X, positions=torch.arange(3)), ValueError, "MaskedAttention: positions must be given with rotary alone, got"),
        (lambda: nn.CompositeDecoderLayer(8, 4, rotary=None)(X, text_positions=torch.arange(3)), ValueError, "MaskedAttention: text_positions must be given with rotary alone"),
        (lambda: nn.VisionAdditiveAttention(8, 8, 4)(X, positions=torch.arange(3)), ValueError, "MaskedAttention: positions must be given with rotary alone, got"),
        (lambda: nn.NeighborAwareLayer(8, 4, rotary=None)(torch.ones(1, N, 8), None, STREAMS, positions=torch.arange(N)), ValueError, "positions must be given with rotary alone"),
        (lambda: PLAIN.queries(X, torch.arange(2)), ValueError, r"positions must be whole numbers \[N\] or \[B, N\] with B = 2 and N = 3"),
        (lambda: TURNED(X, key_positions=torch.arange(3)), ValueError, "MaskedAttention: key_positions must be given for a context of tokens alone"),
        (lambda: TURNED(X, TURNED.keys(X), key_positions=torch.arange(3)), ValueError, "MaskedAttention: key_positions must be given for a context of tokens"),
        (lambda: TURNED(X, X, key_positions=torch.arange(2)), ValueError, r"positions must be whole numbers \[N\] or \[B, N\] with B = 2 and N = 3"),
        (lambda: TURNED(X, positions=torch.zeros(3, 3).long()), ValueError, r"positions must be whole numbers \[N\] or \[B, N\] with B = 2 and N = 3"),
        (lambda: TURNED(X, positions=torch.ones(3).bool()), TypeError, "MaskedAttention: positions must be a tensor of whole numbers .*, got a bool tensor"),
        (lambda: TURNED(X, positions=torch.ones(3)), TypeError, "MaskedAttention: positions must be a tensor of whole numbers"),
        (lambda: TURNED(X, positions=[0, 1, 2]), TypeError, "MaskedAttention: positions must be a tensor of whole numbers .*, got list"),
        (lambda: TURNED(X, past=tuple(TURNED.keys(X))), TypeError, "MaskedAttention: past must be KeyValues, got tuple"),
        (lambda: TURNED(X, past=TURNED.keys(X[:1])), ValueError, r"MaskedAttention: past must be \[B, 4, N, 2\] with B = 2"),
        (lambda: TURNED(X, nn.KeyValues(*torch.ones(2, 2, 2, 3, 2))), ValueError, r"MaskedAttention: context must be \[B, 4, N, 2\], got"),
        (lambda: nn.CompositeDecoderLayer(8, 4)(X, past=(X, X)), TypeError, "MaskedAttention: past must be KeyValues, got tuple"),
        (lambda: nn.CompositeDecoderLayer(8, 4)(X, visual_positions=torch.arange(3)), ValueError, "CompositeDecoderLayer: visual_positions must be given with visual alone"),
        (lambda: nn.MaskedAttention(12.0, 4), ValueError, "MaskedAttention: width must be a whole number of at least 1, got 12.0"),
        (lambda: nn.MaskedAttention(12, 4)(torch.ones(2, 3, 11)), ValueError, r"MaskedAttention: x must be \[B, N, 12\], got"),
        (lambda: nn.MaskedAttention(12, 4)(torch.ones(12)), ValueError, r"MaskedAttention: x must have 2 or more dimensions \[B, N, 12\], got"),
        (lambda: nn.MaskedAttention(12, 4)(torch.ones(3, 12)), ValueError, r"MaskedAttention: x must be \[B, N, 12\], got"),
        (lambda: nn.MaskedAttention(12, 4)(torch.ones(2, 3, 12).long()), TypeError, "MaskedAttention: x must be float16"),
        (lambda: nn.MaskedAttention(12, 4, context_width=5)(torch.ones(2, 3, 12), torch.ones(2, 3, 4)), ValueError, r"context must be \[B, M, 5\], got"),
        (lambda: nn.MaskedAttention(8, 4, rotary=10.0)(torch.ones(2, 3, 8), positions=torch.arange(2)), ValueError, r"positions must be whole numbers \[N\] or \[B, N\]"),
        (lambda: nn.GatedCrossAttention(8)(torch.ones(2, 3, 8), torch.ones(2, 8)), ValueError, r"media must be \[B, ..., 8\] with 3 or more dimensions"),
        (lambda: nn.GatedCrossAttention(8)(torch.ones(2, 3, 8), torch.ones(2, 5, 8), masks.causal(3, 4)), ValueError, "mask must be of 3 queries and 5 keys"),
        (lambda: nn.NeighborAwareLayer(8, 4, window=2), ValueError, "window must be odd"),
        (lambda: nn.NeighborAwareLayer(8, 4, active_heads=[True]), ValueError, "active_heads must name 4 heads, got 1"),
        (lambda: nn.NeighborAwareLayer(8, 4, active_heads=[1, 0, 1, 1]), TypeError, "active_heads must be None or True or False for each head"),
        (lambda: nn.NeighborAwareLayer(8, 4, active_heads="1011"), TypeError, "active_heads must be None or True or False for each head"),
        (lambda: nn.NeighborAwareLayer(8, 4, active_heads=torch.ones(4)), TypeError, "active_heads must be None or True or False for each head"),
        (lambda: nn.NeighborAwareLayer(8, 4, active_heads=[True] * 4, layer_drop=True), ValueError, "active_heads must not be given with layer_drop"),
        (lambda: nn.NeighborAwareLayer(8, 4, layer_drop=1), TypeError, "layer_drop must be True or False, got int 1"),
        (lambda: nn.NeighborAwareLayer(8, 4)(X, None, None), TypeError, "NeighborAwareLayer: streams must be TokenStreams, got NoneType"),
        (lambda: nn.NeighborAwareLayer(8, 4)(X, None, STREAMS), ValueError, rf"TokenStreams: x must be \[B, {N}, D\]"),
        (lambda: nn.NeighborAwareLayer(8, 4, renormalize=True)(torch.ones(1, N, 8), None, STREAMS), ValueError, "mask must be given with renormalize"),
        (lambda: masks.neighbor_window(TOKENS, active_heads=[1, 0]), TypeError, "active_heads must be None or True or False for each head"),
        (lambda: nn.NeighborAwareLayer(8, 4, feed_forward_cut=0), ValueError, "feed_forward_cut must be a whole number"),
        (lambda: nn.CompositeDecoderLayer(8, 4, visual_update="none"), ValueError, 'visual_update must be "self" or "ffn"'),
        (lambda: nn.CompositeDecoderLayer(8, 4)(torch.ones(1, 2, 8), torch.ones(2, 2, 8)), ValueError, r"visual must be \[B, N, 8\] with B = 1 on cpu, as the other tokens, got"),
        (lambda: nn.NoVisualAttentionLayer(8, 4, feature_width=5)(torch.ones(1, 2, 8), torch.ones(1, 2, 8)), ValueError, r"features must be \[B, N, 5\]"),
        (lambda: nn.token_streams(masks.tokens([0, 1])), ValueError, 'tokens must have a type "visual", got no names'),
        (lambda: nn.token_streams(None), TypeError, "token_streams: tokens must be masks.Tokens, got NoneType"),
        (lambda: STREAMS.take(torch.ones(1, 3, 8)), ValueError, rf"x must be \[B, {N}, D\]"),
        (lambda: STREAMS.take([1.0]), TypeError, rf"x must be a tensor \[B, {N}, D\], got list"),
        (lambda: STREAMS.put(torch.ones(1, 10, 8)), ValueError, r"TokenStreams: text must be \[B, 9, D\] on cpu, got"),
        (lambda: STREAMS.put(torch.ones(1, 8, 8)), ValueError, r"TokenStreams: text must be \[B, 9, D\] on cpu, got"),
        (lambda: STREAMS.put(torch.ones(1, 9, 8), torch.ones(1, 12, 8)), ValueError, r"TokenStreams: visual must be \[B, 9, D\] on cpu, got"),
        (lambda: STREAMS.put(torch.ones(2, 9, 8), torch.ones(1, 9, 8)), ValueError, "TokenStreams: visual must be like text but for the number of tokens"),
        (lambda: STREAMS.put(torch.ones(2, 9, 8), torch.ones(2, 9, 7)), ValueError, "TokenStreams: visual must be like text but for the number of tokens"),
        (lambda: STREAMS.put(torch.ones(2, 9, 8), torch.ones(2, 9, 8).double()), ValueError, "TokenStreams: visual must be like text but for the number of tokens"),
        (lambda: nn.token_streams(TWO).take(torch.ones(3, TWO_N, 8)), ValueError, rf"TokenStreams: x must be \[2, {TWO_N}, D\] on cpu, got"),
        (lambda: nn.token_streams(TWO).put(torch.ones(1, 7, 8)), ValueError, r"TokenStreams: text must be \[2, 7, D\] on cpu, got"),
        (lambda: nn.pool_frames(torch.ones(1, 2, 9, 8)), ValueError, r"frames must"),
        (lambda: nn.pool_frames(torch.ones(1, 2, 9, 9, 8), mode="max"), ValueError, 'mode must be "average" or "bilinear"'),
        (lambda: nn.DualCrossAttention(8, heads=2)(torch.ones(1, 2, 8), torch.ones(2, 2, 8), torch.ones(1, 2, 8)), ValueError, r"text must be \[B, N, 8\] with B = 1"),
        (lambda: masks.tile_layout([("picture", 0)], tile_tokens=1), ValueError, "a span of picture must be 1 or more"),
        (lambda: masks.tile_layout([("image", 1)], tile_tokens=1), ValueError, 'spans must be "text" or "picture"'),
    ],
)
def test_bad_input_is_refused_in_words(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ------------------------------------------------------------------------------------------------------------------------------------------ decoder layer


@pytest.mark.parametrize("rule", ["image_prefix", "composite", "no_visual_attention", "modality_mutual", "neighbor_window"])
def test_decoder_layer_under_a_mask_is_the_dense_formula(rule):
    module, x = opened(named("DecoderLayer")), randn(2, TWO_N, 16)
    mask = getattr(masks, rule)(TWO)
    close(module(x, mask), dense_layer(module.state_dict(), x, mask.dense(), 4, 2))


def test_decoder_layer_without_a_mask_is_causal():
    module, x = opened(named("DecoderLayer")), randn(2, 9, 16)
    close(module(x), dense_layer(module.state_dict(), x, torch.ones(9, 9).tril().bool(), 4, 2))


def test_names_of_weights_are_those_of_llama_layers():
    names = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")} | {"input_layernorm", "post_attention_layernorm"}
    for kind in (nn.DecoderLayer, nn.CompositeDecoderLayer):
        assert set(kind(16, 4).state_dict()) == {f"{name}.weight" for name in names}
    assert set(nn.NeighborAwareLayer(16, 4).state_dict()) == {f"{name}.weight" for name in names}


def test_modality_mutual_pictures_see_the_question_and_never_the_answer():
    """Rows before an answer token, those of pictures included, do not change with it; those of pictures change with the question."""
    layers = [opened(named("DecoderLayer"), seed) for seed in range(2)]
    mask, visual = masks.modality_mutual(TOKENS), (TOKENS.type[0] == 1)

    def run(x):
        for layer in layers:
            x = layer(x, mask)
        return x

    x = randn(1, N, 16)
    base = run(x)
    for at in range(14, N):  # answer tokens
        changed = x.clone()
        changed[:, at] += 1
        assert torch.equal(run(changed)[:, :at], base[:, :at])
    changed = x.clone()
    changed[:, 13] += 1  # the end of the question
    assert (run(changed) - base)[0, visual].abs().amin(0).max() > 1e-3
    assert torch.equal(run(changed)[:, :2], base[:, :2])


# --------------------------------------------------------------------------------------------------------------------------------- gated cross-attention


def dense_gated(weights, x, media, keep, heads):
    def norm(y, name):
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return y * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    q, k, v = split(norm(x, "norm") @ weights["attention.q_proj.weight"].T, heads), *(split(media @ weights[f"attention.{n}_proj.weight"].T, heads) for n in "kv")
    seen = dense_attention(q, k, v, keep).transpose(1, 2).flatten(2) @ weights["attention.o_proj.weight"].T
    y = x + weights["attention_gate"].tanh() * seen
    hidden = norm(y, "feed_forward.0") @ weights["feed_forward.1.weight"].T
    gelu = hidden / 2 * (1 + torch.erf(hidden / 2**0.5))
    return y + weights["feed_forward_gate"].tanh() * (gelu @ weights["feed_forward.3.weight"].T), seen


@pytest.mark.parametrize("immediate", [True, False])
def test_gated_block_is_the_dense_formula(immediate):
    module, x, media = opened(named("GatedCrossAttention")), randn(2, 6, 12), randn(2, 5, 10, seed=1)
    times, of_key = torch.tensor([-1, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 1, 1])
    keep = times[:, None] == of_key if immediate else times[:, None] >= of_key
    want, _ = dense_gated(module.state_dict(), x, media, keep, 2)
    close(module(x, media, masks.media(TEXT, MEDIA, immediate=immediate)), want)
    close(module(x, media.view(2, 1, 5, 10), masks.media(TEXT, MEDIA, immediate=immediate)), want)


def test_the_gradient_of_a_gate_is_the_product_with_what_it_lets_through():
    module, x, media = opened(named("GatedCrossAttention")), randn(2, 6, 12), randn(2, 5, 10, seed=1)
    with torch.no_grad():
        module.feed_forward_gate.zero_()
    for a in (0.0, 0.7):
        with torch.no_grad():
            module.attention_gate.fill_(a)
        weight = randn(2, 6, 12, seed=3)
        _, seen = dense_gated(module.state_dict(), x, media, (torch.tensor([-1, 0, 0, 1, 1, 1])[:, None] == torch.tensor([0, 0, 1, 1, 1])), 2)
        (found,) = torch.autograd.grad((module(x, media, masks.media(TEXT, MEDIA)) * weight).sum(), module.attention_gate)
        close(found, (1 - torch.tensor(a, dtype=F64).tanh() ** 2) * (weight * seen).sum())


@pytest.mark.parametrize("immediate", [True, False])
def test_text_before_the_first_picture_sees_none(immediate):
    module, x = opened(named("GatedCrossAttention")), randn(2, 6, 12)
    one, other = (module(x, randn(2, 5, 10, seed=seed), masks.media(TEXT, MEDIA, immediate=immediate)) for seed in (1, 2))
    assert torch.equal(one[:, :1], other[:, :1]) and (one - other)[:, 1:].abs().amin() > 0


@pytest.mark.parametrize("immediate", [True, False])
def test_decoding_with_the_keys_of_pictures_kept(immediate):
    module, x, media = opened(named("GatedCrossAttention")), randn(2, 6, 12), randn(2, 5, 10, seed=1)
    mask, keys = masks.media(TEXT, MEDIA, immediate=immediate), module.keys(media)
    close(torch.cat([module(x[:, n : n + 1], keys, mask.rows(n, n + 1)) for n in range(6)], 1), module(x, media, mask))


def test_tags_see_their_tile_and_text_the_pictures_before_it():
    """Two pictures of two tiles and one; every tile has two tokens."""
    queries, keys = masks.tile_layout([("text", 2), ("picture", 2), ("text", 2), ("picture", 1), ("text", 1)], tile_tokens=2)
    keep = masks.tile_tags(queries, keys).dense()[0, 0]
    tiles = [(), (), (0,), (1,), (2,), (0, 1, 2), (0, 1, 2), (3,), (4,), (0, 1, 2, 3, 4)]  # tiles 2 and 4 are the thumbnails
    want = torch.zeros(10, 10, dtype=torch.bool)
    for row, seen in enumerate(tiles):
        for tile in seen:
            want[row, 2 * tile : 2 * tile + 2] = True
    assert torch.equal(keep, want)


def test_tiles_may_change_places_together_with_their_tags():
    """Permuting the tiles of a picture with their tags permutes the tags' rows and nothing else."""
    queries, keys = masks.tile_layout([("text", 2), ("picture", 3), ("text", 2)], tile_tokens=2)
    module, x, tiles = opened(named("GatedCrossAttention")), randn(1, len(queries), 12), randn(1, len(keys), 10, seed=1)
    order, mask = torch.tensor([2, 0, 3, 1]), masks.tile_tags(queries, keys)
    moved = x.clone()
    moved[:, 2:6] = x[:, 2:6][:, order]
    one, other = module(x, tiles, mask), module(moved, tiles.view(1, 4, 2, 10)[:, order].flatten(1, 2), mask)
    close(other[:, 2:6], one[:, 2:6][:, order])
    close(other[:, [0, 1, 6, 7]], one[:, [0, 1, 6, 7]])


def test_hybrid_thumbnails_in_the_sequence_tiles_through_the_gate():
    spans = [("text", 2), ("picture", 2), ("text", 3)], [("picture", 1), ("text", 1)]
    queries, keys = masks.tile_layout(*spans, tile_tokens=4, thumbnail=True)
    assert queries.type[0].tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0] and queries.valid.sum(1).tolist() == [12, 7]
    keep = masks.tile_tags(queries, keys).dense()[:, 0]
    assert keep.sum(2).tolist() == [[0, 0, 4, 4, 0, 0, 0, 0, 0, 8, 8, 8], [4, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0]]
    module = opened(named("HybridDecoderLayer"))
    x, tiles = randn(2, 12, 16), randn(2, 8, 10, seed=1)
    weights = module.state_dict()
    cross, decoder = ({name.removeprefix(part): value for name, value in weights.items() if name.startswith(part)} for part in ("cross.", "decoder."))
    y, _ = dense_gated(cross, x, tiles, keep[:, None], 2)
    close(module(x, tiles, masks.tile_tags(queries, keys)), dense_layer(decoder, y, torch.ones(12, 12).tril().bool(), 2, 2))


# ------------------------------------------------------------------------------------------------------------------------------------ composite attention


@pytest.mark.parametrize("visual_update", ["self", "ffn"])
@pytest.mark.parametrize("tokens", [TOKENS, TWO], ids=["one picture", "ragged batch"])
def test_composite_layer_is_a_decoder_layer_under_the_composite_mask(tokens, visual_update):
    module = opened(named("CompositeDecoderLayer"))
    module.visual_update = visual_update
    streams, x, there = nn.token_streams(tokens), randn(2, len(tokens), 16), tokens.valid == 1
    text, visual = module(*streams.take(x), streams.text_mask(), text_positions=streams.text.index, visual_positions=streams.visual.index)
    want = dense_layer(module.state_dict(), x, masks.composite(tokens, visual_update=visual_update).dense(), 4, 2)
    there = there.expand(2, -1)
    close(streams.put(text, visual)[there], want[there])


def test_composite_visual_tokens_are_alone():
    """self: what a visual token becomes depends on no other token, and is the linear formula; ffn: no attention at all."""
    module = opened(named("CompositeDecoderLayer"))
    text, visual, weights = randn(2, 5, 16), randn(2, 6, 16, seed=1), module.state_dict()
    h = visual / (visual.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights["input_layernorm.weight"]
    value = split(h @ weights["self_attn.v_proj.weight"].T, 2).repeat_interleave(2, 1).transpose(1, 2).flatten(2)
    for update, y in (("self", visual + value @ weights["self_attn.o_proj.weight"].T), ("ffn", visual)):
        module.visual_update = update
        n = y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights["post_attention_layernorm.weight"]
        out = module(text, visual)[1]
        close(out, y + dense_feed_forward(weights, n))
        changed = visual.clone()
        changed[:, 3] += 1
        rest = [0, 1, 2, 4, 5]
        assert torch.equal(module(-text, changed)[1][:, rest], out[:, rest])


def projected(module, *inputs, **options):
    """FLOPs of matrix products outside the attention."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs, **options)
    return counter.get_total_flops()


def test_composite_work_is_that_of_text_rows(monkeypatch):
    """As many rows as there is text; Nt (Nt + 2 Nv) / 2 + Nt / 2 pairs; and no query projection of visual tokens."""
    from modalign.nn import composite_decoder_layer

    Nt, Nv, D = 7, 20, 16
    tokens = masks.layout([("visual", (4, 5)), ("question", Nt)])
    streams, module = nn.token_streams(tokens), nn.CompositeDecoderLayer(D, 4, hidden=24)
    text, visual = torch.randn(1, Nt, D), torch.randn(1, Nv, D)
    shapes = launched(monkeypatch, composite_decoder_layer)
    flops = {}
    for update in ("self", "ffn"):
        module.visual_update = update
        flops[update] = projected(module, text, visual, streams.text_mask())
    assert shapes == [(Nt, Nt + Nv)] * 2
    pairs = (Nt * (Nt + 2 * Nv) + Nt) / 2
    assert streams.text_mask().flops(4, 4) == pytest.approx(2 * (4 + 4) * 4 * pairs)
    assert masks.composite(tokens, visual_update="ffn").flops(4, 4) == pytest.approx(streams.text_mask().flops(4, 4))
    square, mlp = 2 * D * D, 3 * 2 * D * 24
    assert flops["ffn"] == Nt * 2 * square + (Nt + Nv) * (2 * square + mlp)  # q and o of text; k, v and mlp of all
    assert flops["self"] == flops["ffn"] + Nv * square  # W_o W_v v
    whole = nn.DecoderLayer(D, 4, hidden=24)
    assert projected(whole, torch.cat([visual, text], 1)) == (Nt + Nv) * (4 * square + mlp)


@pytest.mark.parametrize("kind", ["CompositeDecoderLayer", "NoVisualAttentionLayer"])
def test_decoding_behind_the_streams_goes_on_with_text(kind):
    module, text = opened(named(kind)), randn(2, 6, 16)
    visual = randn(2, 5, module.projector[0].in_features if kind == "NoVisualAttentionLayer" else 16, seed=1)
    whole, first = module(text, visual), module(text[:, :4], visual, return_keys=True)
    out, parts = first[0], []
    parts.append(out)
    past = first[-1]
    for n in (4, 5):
        step = module(text[:, n : n + 1], past=past, return_keys=True)
        parts.append(step[0])
        past = step[-1]
    close(torch.cat(parts, 1), whole if isinstance(whole, torch.Tensor) else whole[0])


# ------------------------------------------------------------------------------------------------------------------------------------- SAISA's alignment


def test_no_visual_attention_is_causal_rows_of_text_with_projected_keys():
    """Visual hidden states are replaced by those of the layer's projector; the rows of text are those of causal attention."""
    module, features = opened(named("NoVisualAttentionLayer")), randn(2, 9, 10, seed=1)
    weights, x = module.state_dict(), randn(2, N, 16)
    text, _ = STREAMS.take(x)
    out = module(text, features, STREAMS.text_mask(), text_positions=STREAMS.text.index, visual_positions=STREAMS.visual.index)
    hidden = features @ weights["projector.0.weight"].T + weights["projector.0.bias"]
    hidden = hidden / 2 * (1 + torch.erf(hidden / 2**0.5))
    visual = hidden @ weights["projector.2.weight"].T + weights["projector.2.bias"]
    whole = dense_layer(weights, STREAMS.put(text, visual), torch.ones(N, N).tril().bool(), 4, 2)
    close(out, STREAMS.take(whole)[0])


def test_no_visual_attention_layers_have_projectors_of_their_own_and_no_visual_feed_forward(monkeypatch):
    from modalign.nn import composite_decoder_layer

    layers = torch.nn.ModuleList(nn.NoVisualAttentionLayer(16, 4, feature_width=10, hidden=24) for _ in range(2))
    assert {name for name in layers.state_dict() if "projector" in name} == {f"{n}.projector.{at}.{part}" for n in (0, 1) for at in (0, 2) for part in ("weight", "bias")}
    shapes = launched(monkeypatch, composite_decoder_layer)
    Nt, Nv = 9, 9
    flops = projected(layers[0], torch.randn(1, Nt, 16), torch.randn(1, Nv, 10), STREAMS.text_mask())
    square = 2 * 16 * 16
    assert shapes == [(Nt, Nt + Nv)] and flops == Nt * (4 * square + 6 * 16 * 24) + Nv * (2 * 10 * 16 + square + 2 * square)


def test_the_pilot_lets_visual_tokens_look_at_text():
    module, x = opened(named("DecoderLayer")), randn(2, N, 16)
    keep = torch.ones(N, N).tril().bool()
    keep[2:11, 2:11] = False
    close(module(x, masks.no_visual_attention(TOKENS, visual_to_text="causal")), dense_layer(module.state_dict(), x, keep, 4, 2))


# ------------------------------------------------------------------------------------------------------------------------------- neighbours, heads, units


def dense_window(module, x, gates, cut, renormalize):
    """With all probabilities: those of visual keys are multiplied by the gate behind the softmax."""
    weights, visual = module.state_dict(), (TOKENS.type[0] == 1)
    keep = torch.ones(N, N).tril().bool()
    y, z = TOKENS.y[0].long(), TOKENS.x[0].long()
    near = ((y[:, None] - y).abs() <= module.window // 2) & ((z[:, None] - z).abs() <= module.window // 2)
    keep[2:11, 2:11] = near[2:11, 2:11]
    keep = keep.expand(4, N, N).clone()
    gates = torch.tensor(gates, dtype=F64)
    if renormalize:
        keep[gates == 0] &= ~visual & ~visual[:, None]

    def norm(h, name):
        return h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    h, places = norm(x, "input_layernorm"), torch.arange(N)
    q, k, v = (split(h @ weights[f"self_attn.{name}_proj.weight"].T, n) for name, n in (("q", 4), ("k", 2), ("v", 2)))
    q, k = dense_rotation(q, places), dense_rotation(k, places)
    p = (q @ k.repeat_interleave(2, 1).mT / 2).masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0)
    if not renormalize:
        p = p * torch.where(visual, gates[:, None, None], 1)
    out = p @ v.repeat_interleave(2, 1)
    if not renormalize:
        out = out * torch.where(visual[:, None], gates[:, None, None], 1)
    x = x + out.transpose(1, 2).flatten(2) @ weights["self_attn.o_proj.weight"].T
    h = norm(x, "post_attention_layernorm")
    return x + torch.where(visual[:, None], dense_feed_forward(weights, h, 24 // cut), dense_feed_forward(weights, h))


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("gates", [[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize("window", [1, 3, 5])
def test_neighbor_layer_is_the_dense_formula(window, gates, cut, renormalize):
    options = dict(window=window, active_heads=[gate == 1 for gate in gates], feed_forward_cut=cut, renormalize=renormalize)
    module = opened(window_case("", **options))
    x = randn(2, N, 16)
    close(module(x, module.mask(TOKENS), STREAMS), dense_window(module, x, gates, cut, renormalize))


def test_neighbor_layer_without_a_mask_is_causal():
    for cut in (1, 3):
        module, x = opened(window_case("", feed_forward_cut=cut)), randn(2, N, 16)
        base, changed = module(x, None, STREAMS), x.clone()
        changed[:, 7] += 1
        assert torch.equal(module(changed, None, STREAMS)[:, :7], base[:, :7]) and (module(changed, None, STREAMS) - base)[:, 7:].abs().amin(-1).min() > 0
        close(base, module(x, masks.causal(N), STREAMS))


@pytest.mark.parametrize("closed", [{"active_heads": [True, False, True, False]}, {"layer_drop": True}])
def test_loaded_weights_do_not_open_heads(closed):
    base, x = opened(named("DecoderLayer")), randn(2, N, 16)
    for weights in (base.state_dict(), opened(window_case(""), seed=3).state_dict()):
        module = opened(window_case("", **closed))
        module.load_state_dict(weights)
        close(module(x, module.mask(TOKENS), STREAMS), dense_window(module, x, [int(each) for each in module.active_heads], 1, False))


def test_a_closed_gate_is_not_a_mask():
    """It takes values out behind the softmax; a mask renormalises. With gates open, nothing changes."""
    x, found = randn(2, N, 16), {}
    for active in ([True] * 4, [True, True, True, False]):
        for renormalize in (False, True):
            module = opened(window_case("", active_heads=active, renormalize=renormalize))
            found[active[3], renormalize] = module(x, module.mask(TOKENS), STREAMS)
    close(found[True, False], found[True, True])
    assert (found[False, False] - found[False, True])[:, 11:].abs().amin(-1).max() > 1e-3


def test_a_window_of_the_whole_picture_is_the_base_model_bit_for_bit():
    for renormalize in (False, True):
        module, x = opened(window_case("", window=2 * 3 - 1, renormalize=renormalize)), randn(2, N, 16)
        base = nn.DecoderLayer(16, 4, key_heads=2, hidden=24).double()
        base.load_state_dict(module.state_dict())
        assert torch.equal(module(x, module.mask(TOKENS), STREAMS), base(x, masks.image_prefix(TOKENS)))
        near = module.mask(TOKENS).dense()[0, 0, 2:11, 2:11]
        assert near.all()


def test_a_window_of_one_is_self():
    layer = nn.NeighborAwareLayer(16, 4, window=1)
    assert torch.equal(layer.mask(TOKENS).dense()[0, 0, 2:11, 2:11], torch.eye(9, dtype=torch.bool))


def test_layer_drop_renormalised_is_the_text_alone():
    module, x = opened(window_case("", layer_drop=True, renormalize=True)), randn(2, N, 16)
    assert not any(module.active_heads)
    text, _ = STREAMS.take(x)
    alone = nn.DecoderLayer(16, 4, key_heads=2, hidden=24).double()
    alone.load_state_dict(module.state_dict())
    keep = masks.relation({(q, k): "causal" for q in (0, 2, 3) for k in (0, 2, 3)}, STREAMS.text)
    close(STREAMS.take(module(x, module.mask(TOKENS), STREAMS))[0], alone(text, keep, positions=STREAMS.text.index))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_layer_drop_renormalised_keeps_visual_tokens_from_text_whatever_they_hold(value):
    for cut in (1, 3):
        module, x = opened(window_case("", layer_drop=True, renormalize=True, feed_forward_cut=cut)), randn(2, N, 16)
        want, spoilt = module(x, module.mask(TOKENS), STREAMS), x.clone()
        spoilt[:, TOKENS.type[0] == 1] = value
        assert torch.equal(*(STREAMS.take(each)[0] for each in (module(spoilt, module.mask(TOKENS), STREAMS), want)))


def test_closed_heads_and_cut_units_cost_nothing():
    tokens = masks.layout([("prefix", 4), ("visual", (24, 24)), ("question", 20)])
    streams, heads = nn.token_streams(tokens), [True] * 2 + [False] * 6
    layers = [nn.NeighborAwareLayer(16, 8, hidden=64, active_heads=active, renormalize=True, feed_forward_cut=cut) for active, cut in ((None, 1), (heads, 1), (heads, 4))]
    pairs = [layer.mask(tokens).flops(8, 2) / 8 for layer in layers]  # of a head, on average
    text = 24 * 25 / 2
    visual = 576 * 4 + (3 * 24 - 2) ** 2 + 20 * 576  # to the prefix; 3 x 3 clipped at the border; from the question
    assert pairs[0] == pytest.approx(8 * (text + visual)) and pairs[1] == pairs[2] == pytest.approx(8 * (text + visual / 4))
    assert masks.image_prefix(tokens).flops(8, 2) > 12 * 8 * pairs[2]
    flops = [projected(layer, torch.randn(1, 600, 16), layer.mask(tokens), streams) for layer in layers]
    assert flops[0] == flops[1] and flops[1] - flops[2] == 576 * 3 * 2 * 16 * 48


# --------------------------------------------------------------------------------------------------------------------------------- dual cross-attention


def by_direction(module, visual, text, context, keep):
    weights, out = module.state_dict(), []
    for x, gate, rows in ((visual, "visual_gate", slice(0, visual.shape[1])), (text, "text_gate", slice(visual.shape[1], None))):
        part = "text_attention" if gate == "text_gate" and "text_attention.q_proj.weight" in weights else "attention"
        q, k, v = (split(y @ weights[f"{part}.{n}_proj.weight"].T, h) for n, y, h in (("q", x, 4), ("k", context, 2), ("v", context, 2)))
        seen = dense_attention(q, k, v, None if keep is None else keep[:, :, rows]).transpose(1, 2).flatten(2) @ weights[f"{part}.o_proj.weight"].T
        out.append(x + weights[gate].tanh() * seen)
    return out


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("options", [None, {"same_frame": True}, {"causal_media": True}, {"same_frame": True, "causal_media": True}])
def test_both_directions_are_the_dense_formula(share, options, monkeypatch):
    """Four frames in two videos, a pooled token each; three tokens of text, before, between and behind the videos."""
    from modalign.nn import masked_attention as file

    module = opened(Case("", lambda: nn.DualCrossAttention(12, 10, heads=4, key_heads=2, share=share), None))
    names = masks.TYPE_NAMES
    places = dict(segment=torch.tensor([0, 0, 1, 1] + [-1] * 3), last=torch.tensor([0, 0, 1, 1, -1, 0, 1]), t=torch.tensor([0, 1, 0, 1, 0, 0, 0]))
    queries = masks.tokens([1] * 4 + [2] * 3, **places, names=names)
    keys = masks.tokens([1] * 8, segment=torch.tensor([0] * 4 + [1] * 4), t=torch.tensor([0, 0, 1, 1] * 2), names=names)
    visual, text, context = randn(2, 4, 12), randn(2, 3, 12, seed=1), randn(2, 8, 10, seed=2)
    keep = mask = None
    if options is not None:
        mask, keep = masks.dual_cross(queries, keys, **options), torch.ones(1, 1, 7, 8, dtype=torch.bool)
        if "same_frame" in options:
            keep[0, 0, :4] = torch.eye(4).repeat_interleave(2, 1).bool()
        if "causal_media" in options:
            keep[0, 0, 4] = False
            keep[0, 0, 5, 4:] = False
    shapes = launched(monkeypatch, file)
    for ours, want in zip(module(visual, text, context, mask), by_direction(module, visual, text, context, keep), strict=True):
        close(ours, want)
    assert shapes == ([(7, 8)] if share else [(4, 8), (3, 8)])


def test_the_gradient_of_closed_dual_gates_is_what_they_would_let_through():
    case = named("DualCrossAttention")
    torch.manual_seed(0)
    module, ((visual, text, context), _) = case.make().double(), case.inputs(2)
    weight = randn(2, 4, 12, seed=5), randn(2, 3, 12, seed=6)
    found = torch.autograd.grad(sum((a * b).sum() for a, b in zip(module(visual, text, context), weight, strict=True)), [module.visual_gate, module.text_gate])
    seen = module.attention(torch.cat([visual, text], 1), context)
    close(torch.stack(found), torch.stack([(seen[:, :4] * weight[0]).sum(), (seen[:, 4:] * weight[1]).sum()]))


def test_pooled_frames():
    """27 x 27 to 3 x 3: the mean of 9 x 9, or the middle of it; frames stay apart."""
    frames = randn(2, 3, 27, 27, 5)
    cells = frames.view(2, 3, 3, 9, 3, 9, 5)
    close(nn.pool_frames(frames), cells.mean((3, 5)).reshape(2, 27, 5))
    close(nn.pool_frames(frames, mode="bilinear"), cells[:, :, :, 4, :, 4].reshape(2, 27, 5))
    assert nn.pool_frames(frames, 1).shape == (2, 3, 5) and nn.pool_frames(frames, 4).shape == (2, 48, 5)


# ------------------------------------------------------------------------------------------------------------------------------- devices, exported graphs


def test_what_holds_tensors_moves_whole():
    held = [
        STREAMS,
        TURNED.keys(X),
        nn.TextGuidedFeatures(X, X),
        nn.HierarchicalTemporalFeatures(X, X, X),
        masks.neighborhood((3, 4), 3),
    ]
    for each in held:
        moved = each.to("meta")
        assert type(moved) is type(each) and all(leaf.is_meta for leaf in torch.utils._pytree.tree_leaves(moved) if isinstance(leaf, torch.Tensor))


def test_a_bool_mask_is_one_for_attentions_of_their_own_too():
    module, keep = opened(named("DualCrossAttention, not shared")), torch.rand(2, 1, 7, 8) < 0.5
    inputs = randn(2, 4, 12), randn(2, 3, 12, seed=1), randn(2, 8, 10, seed=2)
    visual, text = module(*inputs, keep)
    close(visual, inputs[0] + module.visual_gate.tanh() * module.attention(inputs[0], inputs[2], keep[:, :, :4]))
    close(text, inputs[1] + module.text_gate.tanh() * module.text_attention(inputs[1], inputs[2], keep[:, :, 4:]))
    assert all(torch.equal(a, b) for a, b in zip(module(*inputs, masks.from_dense(keep)), (visual, text), strict=True))


def exported(module, arguments, tmp_path):
    """The graph of a call, written to a file and read again."""
    torch.export.save(torch.export.export(module, arguments), tmp_path / "graph.pt2")
    return torch.export.load(tmp_path / "graph.pt2").module()


def test_layers_are_exported_with_masks_as_inputs(tmp_path):
    layer, x = opened(named("DecoderLayer")), randn(2, N, 16)
    graph = exported(layer, (x, masks.modality_mutual(TOKENS)), tmp_path)
    turned = TOKENS.replace(type=torch.tensor([0] * 2 + [1] * 9 + [2] * 2 + [3] * 5))
    assert not torch.equal(masks.modality_mutual(turned).dense(), masks.modality_mutual(TOKENS).dense())
    for tokens in (TOKENS, turned):
        close(graph(x, masks.modality_mutual(tokens)), layer(x, masks.modality_mutual(tokens)))


def test_layers_are_exported_with_streams_as_inputs(tmp_path):
    layer, x = opened(named("NeighborAwareLayer")), randn(2, N, 16)
    inputs = x, layer.mask(TOKENS), STREAMS
    close(exported(layer, inputs, tmp_path)(*inputs), layer(*inputs))


class _Hidden(torch.nn.Module):
    def forward(self, x, tokens, hood):
        return torch.where((tokens.type == 1)[..., None], 0, hood.restore(hood.arrange(x)))


def test_tokens_and_neighborhoods_are_inputs_of_exported_graphs(tmp_path):
    for grid in ((N,), (2, N // 2)):  # the first stays in its order: None
        inputs = randn(1, N, 16), TOKENS, masks.neighborhood(grid, 1)
        assert torch.equal(exported(_Hidden(), inputs, tmp_path)(*inputs), _Hidden()(*inputs))
