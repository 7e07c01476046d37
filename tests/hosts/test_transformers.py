"""Small, randomly initialised models of transformers on our attention and under our masks, against the same models on the host's own: outputs, gradients, generation, training, one graph."""

from __future__ import annotations

import functools
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter
from transformers import masking_utils as host
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modalign import masks
from modalign.compat import transformers as compat
from modalign.compat.transformers import register, use_mask
from modalign.testing import peak_memory

register()

VOCABULARY = 61
SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, initializer_range=0.2)
DECODER = SIZES | dict(num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0)
VISION = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4)
CLOSE = dict(rtol=1e-4, atol=1e-5)  # float32, in which the host's normalisations and softmax work for every dtype; gradients in units of the largest of their tensor


def llama(**others):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER | others))


def gemma2(**others):
    """Soft-caps that act, two kinds of layers, a window shorter than the sequences."""
    sizes = DECODER | dict(head_dim=8, sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=8, tie_word_embeddings=False)
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes | others))


def mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**DECODER | dict(sliding_window=5)))


def bert():
    sizes = SIZES | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))


def modernbert():
    """Windows both ways in every second layer."""
    sizes = SIZES | dict(local_attention=8, global_attn_every_n_layers=2, pad_token_id=0, reference_compile=False, initializer_cutoff_factor=5.0)
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**sizes))


def t5():
    """Learned biases, no scale, attention from a decoder to an encoder."""
    sizes = dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0, initializer_factor=1.0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def gemma3():
    """A vision-language model whose pictures see themselves both ways, in layers with and without a window."""
    text = DECODER | dict(head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8)
    config = transformers.Gemma3Config(text_config=text, vision_config=VISION | dict(vision_use_head=False), mm_tokens_per_image=4, image_token_id=60, boi_token_id=58, eoi_token_id=59)
    config.initializer_range = 0.2
    return transformers.Gemma3ForConditionalGeneration(config)


def llava():
    text = transformers.LlamaConfig(**DECODER)
    vision = transformers.SiglipVisionConfig(**VISION)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=60, vision_feature_select_strategy="full", vision_feature_layer=-1)
    return transformers.LlavaForConditionalGeneration(config)


def words(*shape, seed=0):
    return torch.randint(1, 57, shape, generator=torch.Generator().manual_seed(seed))


def with_picture():
    """Two words, four tokens of a picture, six words; two items."""
    ids = words(2, 12)
    ids[:, 2:6] = 60
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "pixel_values": pixels}


def padding(side, *lengths):
    N = max(lengths)
    place = torch.arange(N)
    rows = [place < n if side == "right" else place >= N - n for n in lengths]
    return torch.stack(rows).long()


def results(model, implementation, inputs, keep=None, **others):
    """Logits, and the gradient of each parameter with respect to a sum over those of the kept tokens."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    logits = model(**inputs, **others).logits
    logits = logits if keep is None else logits[keep.bool()]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weight).mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], **CLOSE)
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) > 10
    largest = max(gradient.abs().max() for gradient in theirs[1].values())
    for name, gradient in theirs[1].items():
        scale = gradient.abs().max().clamp(min=largest / 100)  # the bias of keys has gradient 0, as a softmax does not see it
        torch.testing.assert_close(ours[1][name] / scale, gradient / scale, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


# --------------------------------------------------------------------------------------------------------------------------------------------- host's rules

MODELS = {
    "llama, padded left": (llama, {"input_ids": words(3, 13)}, padding("left", 13, 9, 4)),
    "llama, padded right": (llama, {"input_ids": words(3, 13)}, padding("right", 5, 13, 1)),
    "gemma2": (gemma2, {"input_ids": words(2, 17)}, None),
    "gemma2, padded left": (gemma2, {"input_ids": words(2, 17)}, padding("left", 8, 17)),
    "mistral, padded right": (mistral, {"input_ids": words(2, 14)}, padding("right", 14, 9)),
    "bert": (bert, {"input_ids": words(2, 11)}, None),
    "bert, padded right": (bert, {"input_ids": words(2, 11)}, padding("right", 11, 6)),
    "modernbert, padded right": (modernbert, {"input_ids": words(2, 21)}, padding("right", 21, 12)),
    "t5": (t5, {"input_ids": words(2, 9), "decoder_input_ids": words(2, 6, seed=1)}, None),
    "gemma3, a picture": (gemma3, with_picture() | {"token_type_ids": (with_picture()["input_ids"] == 60).long()}, None),
    "llava, a picture, padded right": (llava, with_picture(), padding("right", 12, 9)),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_eager(name):
    make, inputs, keep = MODELS[name]
    model = make().eval()
    others = {} if keep is None else {"attention_mask": keep}
    ours, theirs = (results(model, each, inputs, keep, **others) for each in ("modalign", "eager"))
    assert_alike(ours, theirs)


def test_a_vision_encoder_has_no_mask():
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)).eval()
    pixels = torch.randn(2, 3, 8, 8)
    hidden = []
    for implementation in ("modalign", "eager"):
        model.set_attn_implementation(implementation)
        hidden.append(model(pixel_values=pixels).last_hidden_state)
    torch.testing.assert_close(*hidden, **CLOSE)


class Layer(torch.nn.Module):
    num_key_value_groups = 2

    def __init__(self, is_causal):
        super().__init__()
        self.is_causal = is_causal


@pytest.mark.parametrize("queries", [1, 5, 8])
@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("layer_is_causal", [True, False])
def test_a_layer_without_a_mask_is_causal_as_the_host_says(layer_is_causal, is_causal, queries):
    """With keys behind the queries too, as a static cache holds them."""
    query, (key, value) = torch.randn(2, 4, queries, 8), torch.randn(2, 2, 2, 8, 8)
    call = (Layer(layer_is_causal), query, key, value, None)
    ours, theirs = (function(*call, scaling=0.7, is_causal=is_causal) for function in (compat._attention, sdpa_attention_forward))
    torch.testing.assert_close(ours[0], theirs[0], **CLOSE)
    assert ours[0].shape == (2, queries, 4, 8) and ours[0].is_contiguous() and ours[1] is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [None, "bool", "float"])
def test_a_matrix_and_a_learned_bias_are_added(kind, bias):
    query, (key, value) = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 2, 7, 8)
    matrix = {None: None, "bool": torch.rand(2, 1, 5, 7) < 0.8, "float": torch.randn(2, 1, 5, 7)}[kind]
    call = dict(attention_mask=matrix, position_bias=torch.randn(1, 4, 5, 7) if bias else None)
    ours, theirs = (function(Layer(False), query, key, value, **call)[0] for function in (compat._attention, sdpa_attention_forward))
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_padding_with_anything_in_it_changes_nothing():
    model = llama().eval()
    model.set_attn_implementation("modalign")
    ids, keep = words(2, 10), padding("left", 10, 6)
    places = (keep.cumsum(1) - 1).clamp(min=0)
    first = model(ids, attention_mask=keep, position_ids=places).logits
    alone = model(ids[1:, 4:]).logits
    torch.testing.assert_close(first[1:, 4:], alone, **CLOSE)


def test_packed_sequences_are_apart():
    for make in (llama, gemma2):
        model = make().eval()
        model.set_attn_implementation("modalign")
        lengths = (7, 1, 12)
        ids = words(1, sum(lengths))
        places = torch.cat([torch.arange(n) for n in lengths])[None]
        packed = model(ids, position_ids=places, use_cache=False).logits
        torch.testing.assert_close(packed, torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1), **CLOSE)


RULES = {
    "causal": host.causal_mask_function,
    "window": host.sliding_window_causal_mask_function(4),
    "both ways": host.bidirectional_mask_function,
    "window both ways": host.sliding_window_bidirectional_mask_function(3),
    "chunks": host.chunked_causal_mask_function(5, torch.tensor([0, 3])),
    "pictures": host.or_masks(host.causal_mask_function, host.blockwise_overlay(torch.tensor([[-1] * 3 + [0] * 5 + [-1] + [1] * 4 + [-1] * 4, [0] * 17]))),
    "pictures in a window": host.and_masks(
        host.or_masks(host.causal_mask_function, host.blockwise_overlay(torch.tensor([[-1] * 3 + [0] * 5 + [-1] + [1] * 4 + [-1] * 4, [0] * 17]))), host.sliding_window_overlay(3)
    ),
}
PACKED = torch.tensor([[0] * 6 + [1] + [2] * 10, [0] * 17])
PLACES = torch.tensor([[*range(6), 0, *range(10)], [*range(17)]])
RULES |= {f"{name}, packed": host.packed_sequence_compatibility_function(RULES[name], PLACES, PACKED) for name in ("causal", "window", "both ways")}
PARTS = {"whole": (17, 17, 0, 0), "a chunk behind a cache": (5, 17, 12, 0), "a chunk behind a window": (5, 8, 12, 9), "one query": (1, 10, 9, 0), "room behind": (4, 17, 3, 0)}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_of_the_host_is_told_exactly_and_in_linear_memory(rule, part):
    queries, keys, q_offset, kv_offset = PARTS[part]
    for keep in (None, padding("left", 17, 11).bool(), padding("right", 17, 9).bool()):
        for offset in (q_offset, torch.tensor(q_offset)):  # a tensor of static caches
            arguments = dict(batch_size=2, q_length=queries, kv_length=keys, q_offset=offset, kv_offset=kv_offset, mask_function=RULES[rule], attention_mask=keep)
            mask = compat._mask(**arguments)
            wanted = host.sdpa_mask(**arguments, allow_is_causal_skip=False)
            assert mask.shape == ((2, 1, keys, 2) if queries > 1 else (2, 1, 1, keys))
            dense = compat._as_mask(mask, queries).dense() if queries > 1 else mask
            assert torch.equal(dense, wanted), (rule, part)


def test_a_rule_of_others_is_asked_pair_by_pair(monkeypatch):
    def every_third(b, h, q, k):
        return (q - k) % 3 == 0

    joined = host.and_masks(host.causal_mask_function, every_third)
    arguments = dict(batch_size=2, q_length=9, kv_length=9, mask_function=joined)
    mask = compat._mask(**arguments, use_vmap=True)
    assert mask.dtype is torch.bool and torch.equal(mask, host.sdpa_mask(**arguments, allow_is_causal_skip=False)) and not bool(mask[0, 0, 4, 2])
    partial = host.or_masks(host.causal_mask_function, functools.partial(every_third))  # a callable without a name
    assert torch.equal(compat._mask(2, 9, 9, mask_function=partial), host.sdpa_mask(2, 9, 9, mask_function=partial, allow_is_causal_skip=False))
    monkeypatch.setattr(compat, "DENSE_PAIRS", 100)
    with pytest.raises(ValueError, match="modalign mask: mask_function must be of transformers.masking_utils and keep a key for one run of queries for more than DENSE_PAIRS = 100 pairs, got another for 2 x 9 x 9"):
        compat._mask(**arguments)


def test_a_picture_in_two_pieces_is_asked_pair_by_pair():
    """Its second piece is kept by the first, by the second, and not between them; padding may lie anywhere."""
    picture = host.or_masks(host.causal_mask_function, host.blockwise_overlay(torch.tensor([[0, 0, -1, -1, 0, 0, -1]])))
    arguments = dict(batch_size=1, q_length=7, kv_length=7, mask_function=picture)
    mask = compat._mask(**arguments)
    assert torch.equal(mask, host.sdpa_mask(**arguments, allow_is_causal_skip=False)) and mask[0, 0, :, 4].tolist() == [True, True, False, False, True, True, True]
    padded = compat._mask(**arguments, attention_mask=padding("right", 4, 7)[:1].bool())
    assert padded.shape == (1, 1, 7, 2)


def with_pieces(N, *pieces, items=1):
    ids = torch.full((items, N), -1)
    for item, start, stop, number in pieces:
        ids[item, start:stop] = number
    return host.or_masks(host.causal_mask_function, host.blockwise_overlay(ids))


@pytest.mark.parametrize("start", [3010, 1014, 3999])
def test_no_piece_of_a_picture_is_overlooked(start, monkeypatch):
    """Short ones in a long sequence: the matrix where it fits, words where it does not."""
    N = 4000
    arguments = dict(batch_size=2, q_length=N, kv_length=N, mask_function=with_pieces(N, (1, 1003, 1013, 7), (1, start, min(start + 10, N), 7), items=2))
    assert torch.equal(compat._mask(**arguments), host.sdpa_mask(**arguments, allow_is_causal_skip=False))
    monkeypatch.setattr(compat, "DENSE_PAIRS", N * N)
    with pytest.raises(ValueError, match="keep a key for one run of queries for more than DENSE_PAIRS"):
        compat._mask(**arguments)


def any_window(at_least=0):
    return int(torch.randint(at_least, 12, ()))


def drawn_rules():
    """Rules of ids in any order, in pieces and in one, joined in the ways of the host's models and in others; batch and N."""
    batch, N = int(torch.randint(1, 4, ())), int(torch.randint(1, 60, ()))
    lengths, others = torch.randint(1, 12, (2, batch, N))
    pictures = host.blockwise_overlay(torch.stack([torch.randint(-1, 3, (N,)).repeat_interleave(each)[:N] for each in lengths]))
    in_order, again = (torch.stack([number.repeat_interleave(each)[:N] for each in others]) for number in (torch.arange(N), torch.randint(0, 3, (N,))))
    count = torch.stack([torch.cat([torch.arange(n) for n in each])[:N] for each in others])
    causal, packed, window, both = host.causal_mask_function, host.packed_sequence_compatibility_function, any_window(), host.sliding_window_bidirectional_mask_function(any_window())
    return batch, N, {
        "pictures": host.or_masks(causal, pictures),
        "pictures in a window": host.and_masks(host.or_masks(causal, pictures), host.sliding_window_overlay(window)),
        "pictures and a window": host.or_masks(host.sliding_window_causal_mask_function(window), pictures),
        "pictures and chunks": host.or_masks(host.chunked_causal_mask_function(any_window(1), torch.randint(0, 5, (batch,))), pictures),
        "pictures in a window both ways": host.and_masks(both, pictures),
        "pictures alone": pictures,
        "packed, pictures": host.or_masks(packed(causal, count, in_order), pictures),
        "packed": packed(host.sliding_window_causal_mask_function(window), count, in_order),
        "pictures, packed": packed(host.or_masks(causal, pictures), count, in_order),
        "packed in pieces": packed(both, count, again),
        "packed, places in any order": packed(both, torch.randint(0, N, (batch, N)), in_order),
        "remapped alone": host.remap_positions_for_packed_sequence(both, count),
    }


@pytest.mark.parametrize("name", drawn_rules()[-1])
def test_rules_with_ids_in_any_order_are_told_exactly(name):
    torch.manual_seed(4)
    for _ in range(200):
        batch, N, rules = drawn_rules()
        first = int(torch.randint(0, N, ()))
        for q_length, q_offset in ((N, 0), (N - first, first)):
            few = torch.rand(batch, N) < 0.05  # as one key that is told otherwise is enough to ask all pairs
            arguments = dict(batch_size=batch, q_length=q_length, kv_length=N, q_offset=q_offset, mask_function=rules[name], attention_mask=few)
            mask = compat._mask(**arguments)
            dense = mask if mask.dtype is torch.bool else compat._as_mask(mask, q_length).dense()
            assert torch.equal(dense, host.sdpa_mask(**arguments, allow_is_causal_skip=False))


def test_pictures_in_one_piece_are_told_in_linear_memory():
    N = 3000
    arguments = dict(batch_size=2, q_length=N, kv_length=N, mask_function=with_pieces(N, *((n % 2, 20 * n, 20 * n + 10, n) for n in range(140)), items=2))
    mask = compat._mask(**arguments)
    assert mask.shape == (2, 1, N, 2) and torch.equal(compat._as_mask(mask, N).dense(), host.sdpa_mask(**arguments, allow_is_causal_skip=False))

@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_matrix_of_the_caller(dtype):
    """Four dimensions go to the layers as they are: True keeps, floats are added."""
    model = llama().eval()
    ids, keep = words(2, 8), torch.rand(2, 1, 8, 8) < 0.5
    keep |= torch.eye(8, dtype=torch.bool)
    bias = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
    ours = results(model, "modalign", {"input_ids": ids}, attention_mask=keep if dtype is torch.bool else bias)
    assert_alike(ours, results(model, "eager", {"input_ids": ids}, attention_mask=bias))


# -------------------------------------------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("make", [llama, gemma2])
def test_generation_is_that_of_eager(make, options):
    model = make().eval()
    written = []
    for implementation in ("modalign", "eager"):
        model.set_attn_implementation(implementation)
        written.append(model.generate(words(2, 9), attention_mask=padding("left", 9, 5), max_new_tokens=9, do_sample=False, **options))
    assert written[0].shape == (2, 18) and torch.equal(*written) and len(written[0][:, 9:].unique()) > 4


def test_a_prompt_in_chunks():
    model = llama().eval()
    model.set_attn_implementation("modalign")
    ids, cache = words(2, 13), DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split((6, 4, 1, 2), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, **CLOSE)


# ------------------------------------------------------------------------------------------------------------------------------------------- masks of ours

PUBLISHED = {
    "composite": masks.composite,
    "composite, ffn": lambda tokens: masks.composite(tokens, visual_update="ffn"),
    "modality_mutual": masks.modality_mutual,
    "neighbor_window": masks.neighbor_window,
    "no_visual_attention": masks.no_visual_attention,
    "image_prefix": masks.image_prefix,
}


def tokens_of(new=0):
    """13 tokens and room for new ones."""
    return masks.layout([("prefix", 2), ("visual", (2, 3)), ("question", 3), ("answer", 2 + new)])


def bias_of(mask):
    return torch.where(mask.dense(), 0.0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("rule", PUBLISHED)
def test_training_under_a_mask_is_that_of_eager_under_its_matrix(rule):
    """Three steps; a query that keeps nothing counts everything in eager, so its token stays out of the loss and of what others look at."""
    mask = PUBLISHED[rule](tokens_of())
    keep = mask.dense()[0, 0].any(1)
    losses, weights = [], []
    for implementation in ("modalign", "eager"):
        torch.manual_seed(3)
        model = llama(num_hidden_layers=1 if not keep.all() else 2).train()
        model.set_attn_implementation(implementation)
        step = torch.optim.SGD(model.parameters(), lr=0.5)
        losses.append([])
        for seed in range(3):
            ids = words(2, 13, seed=seed)
            if implementation == "modalign":
                with use_mask(model, mask):
                    logits = model(ids).logits
            else:
                logits = model(ids, attention_mask=bias_of(mask)).logits
            loss = torch.nn.functional.cross_entropy(logits[:, keep].flatten(0, 1), ids.roll(-1, 1)[:, keep].flatten())
            step.zero_grad()
            loss.backward()
            step.step()
            losses[-1].append(loss.item())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][2] != pytest.approx(losses[0][0], rel=1e-3)
    torch.testing.assert_close(*weights, **CLOSE)


def any_pairs(tokens):
    """What no rule says: new tokens look at some of what was before them."""
    N = len(tokens)
    return masks.from_dense(((torch.rand(N, N) < 0.6) & (torch.arange(N)[:, None] > torch.arange(N))) | torch.eye(N, dtype=torch.bool))


@pytest.mark.parametrize("rule", ["modality_mutual", "neighbor_window", "composite", "any_pairs"])
@pytest.mark.parametrize("make", [llama, gemma2])
def test_generation_under_a_mask_is_step_by_step_what_eager_does_under_its_matrix(make, rule):
    """With a cache on our side, from the beginning for every token on the other; layers with a window keep what mask and window keep."""
    model, mask = make().eval(), (PUBLISHED | {"any_pairs": any_pairs})[rule](tokens_of(new=8))
    ids = words(2, 13)
    model.set_attn_implementation("modalign")
    with use_mask(model, mask):
        written = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.set_attn_implementation("eager")
    full = mask.dense()
    place = torch.arange(21)
    window = full & (place[:, None] - place < 6)
    for _ in range(8):
        N = ids.shape[1]
        matrices = {name: torch.where(each[..., :N, :N], 0.0, torch.finfo(torch.float32).min) for name, each in (("full_attention", full), ("sliding_attention", window))}
        logits = model(ids, attention_mask=matrices if make is gemma2 else matrices["full_attention"], use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, ids)


def test_a_mask_and_padding():
    model, mask = llama().eval(), masks.modality_mutual(tokens_of())
    ids, keep = words(2, 13), padding("right", 13, 10)
    theirs = results(model, "eager", {"input_ids": ids}, keep, attention_mask=torch.where(mask.dense() & keep.bool()[:, None, None], 0.0, torch.finfo(torch.float32).min))
    model.set_attn_implementation("modalign")
    with use_mask(model, mask):
        ours = results(model, "modalign", {"input_ids": ids}, keep, attention_mask=keep)
    assert_alike(ours, theirs)


def test_masks_of_a_batch():
    """Every item its own spans; the mask has as many items as the batch."""
    spans = [[("prefix", 2), ("visual", (2, 2)), ("question", 3)], [("visual", (3, 2)), ("question", 3)]]
    mask, model = masks.modality_mutual(masks.layout(*spans)), llama().eval()
    theirs = results(model, "eager", {"input_ids": words(2, 9)}, attention_mask=bias_of(mask))
    model.set_attn_implementation("modalign")
    with use_mask(model, mask):
        assert_alike(results(model, "modalign", {"input_ids": words(2, 9)}), theirs)


def test_a_mask_of_an_encoder():
    model, mask = bert().eval(), masks.relation({(q, k): masks.band(3, 1) for q in range(4) for k in range(4)}, tokens_of())
    theirs = results(model, "eager", {"input_ids": words(2, 13)}, attention_mask=bias_of(mask))
    model.set_attn_implementation("modalign")
    with use_mask(model, mask):
        assert_alike(results(model, "modalign", {"input_ids": words(2, 13)}), theirs)


def test_a_mask_of_a_vision_language_model_is_its_decoders():
    model = llava().eval()
    mask, inputs = masks.neighbor_window(masks.layout([("prefix", 2), ("visual", (2, 2)), ("question", 6)]), 3), with_picture()
    theirs = results(model, "eager", inputs, attention_mask=bias_of(mask))
    model.set_attn_implementation("modalign")
    with use_mask(model, mask):
        assert_alike(results(model, "modalign", inputs), theirs)


def test_checkpointed_layers_keep_the_mask_when_they_are_run_again():
    model, mask, ids = llama().train(), masks.modality_mutual(tokens_of()), words(2, 13)
    model.set_attn_implementation("modalign")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with use_mask(model, mask):
            loss = model(ids, labels=ids).loss
        loss.backward()  # outside
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_within_use_mask_alone():
    model, ids = llama().eval(), words(2, 13)
    model.set_attn_implementation("modalign")
    before = model(ids).logits
    with use_mask(model, masks.composite(tokens_of())):
        other = llama().eval()
        other.load_state_dict(model.state_dict())
        other.set_attn_implementation("modalign")
        assert torch.equal(other(ids).logits, before)  # not its mask
        assert not torch.allclose(model(ids).logits, before, atol=1e-2)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_with_the_same_config_is_not_meant(compiled):
    """A student and a teacher of one config object, called in turn; also behind a call that raised."""
    torch._dynamo.reset()
    student, ids = llama().eval(), words(2, 13)
    student.set_attn_implementation("modalign")
    teacher = transformers.LlamaForCausalLM(student.config).eval()
    teacher.load_state_dict(student.state_dict())
    assert teacher.config is student.config
    before = teacher(ids).logits
    run = [torch.compile(model, fullgraph=True, backend="eager") if compiled else model for model in (student, teacher)]
    with use_mask(student, masks.composite(tokens_of())):
        first = run[0](ids, use_cache=False).logits
        torch.testing.assert_close(run[1](ids, use_cache=False).logits, before)
        with pytest.raises(ValueError, match="mask must be of at least 14"):
            student(words(2, 14))
        torch.testing.assert_close(teacher(ids).logits, before)
        torch.testing.assert_close(run[0](ids, use_cache=False).logits, first)
    assert not torch.allclose(first, before, atol=1e-2)


def test_threads_have_masks_of_their_own():
    """One model in three threads, that enter, run and leave in turn: each under its own mask or under none."""
    model, ids = llama().eval(), words(2, 13)
    model.set_attn_implementation("modalign")
    given = [masks.composite(tokens_of()), masks.modality_mutual(tokens_of()), None]

    def under(mask, barrier=None):
        wait = barrier.wait if barrier else int
        with torch.no_grad(), use_mask(model, mask) if mask else nullcontext():
            wait(60)
            logits = model(ids).logits
            wait(60)
        return logits

    alone = [under(mask) for mask in given]
    barrier = Barrier(len(given))
    with ThreadPoolExecutor(len(given)) as threads:
        together = list(threads.map(under, given, [barrier] * len(given)))
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2) and not torch.allclose(alone[1], alone[2], atol=1e-2)

# -------------------------------------------------------------------------------------------------------------------------------------------- what raises


def test_what_is_refused():
    model = llama(attention_dropout=0.1).train()
    model.set_attn_implementation("modalign")
    with pytest.raises(ValueError, match="modalign attention: dropout must be 0 .*, got 0.1"):
        model(words(1, 4))
    assert model.eval()(words(1, 4)).logits.isfinite().all()
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="modalign attention: s_aux must be None, it is not supported, got Tensor"):
        compat._attention(model, x, x, x, None, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match="modalign attention: output_attentions must be False"):
        compat._attention(model, x, x, x, None, output_attentions=True)


def test_another_version_of_the_host_is_refused(monkeypatch):
    monkeypatch.setattr(host, "sdpa_mask", lambda batch_size, cache_position: None)
    with pytest.raises(ImportError, match=f"transformers must tell masks of q_length and q_offset, as 5.23 does, got version {transformers.__version__}"):
        register()


def test_what_use_mask_refuses():
    model, ids, mask = llama().eval(), words(1, 13), masks.causal(13)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with pytest.raises(ValueError, match=f'use_mask: model must have attn_implementation="modalign", got "{implementation}"'), use_mask(model, mask):
            pass
    model.set_attn_implementation("modalign")
    with pytest.raises(TypeError, match="use_mask: model must be a PreTrainedModel of transformers, got Linear"), use_mask(torch.nn.Linear(1, 1), mask):
        pass
    with pytest.raises(TypeError, match="use_mask: mask must be of modalign.masks, got Tensor"), use_mask(model, mask.dense()):
        pass
    with pytest.raises(ValueError, match="use_mask: model must be an encoder or a decoder alone, got both in one"), use_mask(t5(), mask):
        pass
    with_cross_attention = transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True))
    with pytest.raises(ValueError, match="got both in one"), use_mask(with_cross_attention, mask):
        pass
    with pytest.raises(ValueError, match="use_mask: mask must be of at least 14 queries and 14 keys .*, got one of 13 and 13"), use_mask(model, mask):
        model.generate(ids, max_new_tokens=3, do_sample=False)
    with pytest.raises(ValueError, match="use_mask: .*past_key_values a DynamicCache"), use_mask(model, masks.causal(20)):
        model.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation="static")
    with pytest.raises(RuntimeError, match="use_mask: the model must ask transformers for its mask, got no call"), use_mask(model, mask):
        pass
    with pytest.raises(ValueError, match="mask must be of 1 or 2 items"), use_mask(model, masks.causal(13) & masks.from_dense(torch.ones(3, 1, 13, 13, dtype=torch.bool))):
        model(words(2, 13))
    assert compat._given.get() == ()


@pytest.mark.parametrize("rule", ["image_prefix", "modality_mutual"])
def test_a_prompt_in_chunks_that_looks_ahead_is_refused(rule):
    """Tokens 0 to 5 would keep tokens of the picture, or of the question, that the cache does not have yet; what looks back alone goes in chunks."""
    model, ids = llama().eval(), words(2, 13)
    model.set_attn_implementation("modalign")
    wanted = "use_mask: mask must keep no key that is not there yet.*, got query 2 that keeps one from 6 on"
    for batch in (masks.Mask.__and__, lambda mask, other: mask):  # also of two items
        mask = batch(PUBLISHED[rule](tokens_of(new=3)), masks.from_dense(torch.ones(2, 1, 16, 16, dtype=torch.bool)))
        with pytest.raises(ValueError, match=wanted), use_mask(model, mask):
            model(ids[:, :6], past_key_values=DynamicCache(config=model.config), use_cache=True)
        with pytest.raises(ValueError, match=wanted), use_mask(model, mask):
            model.generate(ids, max_new_tokens=3, do_sample=False, prefill_chunk_size=6)
    mask = masks.composite(tokens_of(new=3))
    with use_mask(model, mask):
        whole, cache = model(ids).logits, DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split((6, 4, 1, 2), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
    ahead = torch.eye(16, dtype=torch.bool)
    ahead[12, 15] = True  # the last token of the prompt a token that is to be written
    with pytest.raises(ValueError, match="got query 12 that keeps one from 13 on"), use_mask(model, masks.from_dense(torch.stack([torch.eye(16, dtype=torch.bool), ahead])[None])):
        model(ids)


def test_a_compiled_chunk_that_looks_ahead_is_refused():
    torch._dynamo.reset()
    model = llama(num_hidden_layers=1).eval()
    model.set_attn_implementation("modalign")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with use_mask(model, masks.causal(13)):
        assert torch.equal(compiled(words(2, 6), use_cache=False).logits, model(words(2, 6)).logits)
    with pytest.raises(RuntimeError, match="use_mask: mask must keep no key that is not there yet"), use_mask(model, masks.full(13)):
        compiled(words(2, 6), use_cache=False)


@pytest.mark.parametrize("make", [llama, gemma2])
def test_a_matrix_in_place_of_the_mask_is_refused(make):
    model, ids = make().eval(), words(2, 13)
    model.set_attn_implementation("modalign")
    keep = torch.ones(13, 13, dtype=torch.bool).tril()[None, None]
    for matrix in (keep, keep.expand(2, 1, 13, 13), torch.where(keep, 0.0, torch.finfo(torch.float32).min)):
        given = {"full_attention": matrix, "sliding_attention": matrix} if make is gemma2 else matrix
        with pytest.raises(ValueError, match="use_mask: attention_mask must be of two dimensions .*, got a mask that is made already, of four"), use_mask(model, masks.composite(tokens_of())):
            model(ids, attention_mask=given)
        with use_mask(model, masks.composite(tokens_of())):
            model(ids)
            with pytest.raises(ValueError, match="use_mask: attention_mask must be of two dimensions"):
                model(ids, attention_mask=given)
    assert model(ids, attention_mask=given).logits.isfinite().all()

# ------------------------------------------------------------------------------------------------------------------------------------- one graph, no matrix


@pytest.mark.parametrize("given", [False, True], ids=["causal", "modality_mutual"])
def test_compiled_with_one_graph(given):
    torch._dynamo.reset()
    model, counter = llama(num_hidden_layers=1).train(), CompileCounter()
    model.set_attn_implementation("modalign")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    counts = []

    def step(run, ids):
        model.zero_grad()
        if given:
            with use_mask(model, masks.modality_mutual(masks.layout([("prefix", 2), ("visual", (2, 2)), ("question", 3), ("answer", ids.shape[1] - 9)]))):
                loss = run(ids, labels=ids, use_cache=False).loss
        else:
            loss = run(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss, *(p.grad for p in model.parameters())

    for N in (11, 17, 23, 29):
        ids = words(2, N)
        for ours, theirs in zip(step(compiled, ids), step(model, ids), strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2]  # one graph for the first size, one for all sizes


def training_step(N, rule):
    """A step over N tokens and one over 64 for the memory probe."""
    model = llama(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, hidden_size=16, max_position_embeddings=N)
    model.set_attn_implementation("modalign")

    def run(n):
        ids = words(1, n)
        if rule is None:
            loss = model(ids, labels=ids, use_cache=False).loss
        else:
            tokens = masks.layout([("visual", (4, n // 8)), ("question", n // 4), ("answer", n // 4)])
            with use_mask(model, getattr(masks, rule)(tokens)):
                loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()

    return lambda: run(N), lambda: run(64)


@pytest.mark.parametrize("rule", [None, "modality_mutual"])
def test_nothing_of_all_pairs(rule):
    """A matrix of one byte a pair would be 67 MB."""
    N = 1 << 13
    peak = peak_memory("test_transformers:training_step", threads=1, N=N, rule=rule).peak
    assert peak < N * N / 2, peak


# ------------------------------------------------------------------------------------------------------------------------------------------ documentation


def test_the_page_runs():
    page = (Path(__file__).resolve().parents[2] / "docs/hosts.md").read_text()
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) > 2
    for block in blocks:
        exec(block, names)  # noqa: S102 the page's own examples
