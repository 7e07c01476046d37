"""Masks against brute force over pairs, their tiles, their algebra; every published rule against the table in its docstring; attention under them against attention under the matrix."""

from __future__ import annotations

import itertools

from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from typer.testing import CliRunner

from modalign import masks
from modalign.cli import app
from modalign.cli.mask import RULES
from modalign.ops import masked_attention
from modalign.ops.masked_attention import reference_masked_attention

PLAIN = [name for name in masks.NAMES if name not in masks.COUNTS]


def draw(seed):
    return torch.Generator().manual_seed(seed)


def random_tokens(N, seed, batch=1, grid=(3, 4, 5), local=True):
    """Spans of tokens of one type and segment, in several documents, with padding; or, with local=False, any numbers anywhere."""
    g = draw(seed)

    def number(high):
        return int(torch.randint(0, high, (), generator=g))

    rows = []
    for _ in range(batch):
        row = {name: [] for name in masks.FIELDS}
        last, document, position = -1, 0, 0
        while len(row["index"]) < N:
            span, kind = 1 + number(40 if local else 3), number(4)
            if number(4) == 0:
                document, position, last = document + 1, 0, -1
            segment = -1
            if kind == 1 or not local:
                last = segment = last + 1 if local else number(4) - 1
            for n in range(span):
                place = (n // 20 % grid[0], n // 5 % grid[1], n % grid[2]) if local else tuple(number(size) for size in grid)
                values = (position, kind if local else number(5), segment, last if local else number(4) - 1, document, *place, int(number(12) > 0))
                for name, value in zip(masks.FIELDS, values, strict=True):
                    row[name].append(value)
                position += 1 + number(2) * (not local)
        rows.append([row[name][:N] for name in masks.FIELDS])
    return masks.Tokens(torch.tensor(rows, dtype=torch.int32))


def random_rule(g):
    def number(high):
        return int(torch.randint(0, high, (), generator=g))

    name = masks.NAMES[number(len(masks.NAMES))]
    if name == "grid_shift":
        size = (3, 4, 5)
        kernel = [1 + number(n) for n in size]
        dilation = [1 + number(n // k) for n, k in zip(size, kernel, strict=True)]
        return masks.grid_shift(size, kernel, dilation=dilation, stride=[1 + number(k) for k in kernel], is_causal=[bool(number(2)) for _ in size])
    functions = {"causal_window": lambda: masks.causal_window(1 + number(30)), "band": lambda: masks.band(number(20), number(20)), "time_stride": lambda: masks.time_stride(1 + number(3))}
    functions["grid_clip"] = lambda: masks.grid_clip(number(2), number(3), number(3))
    return functions[name]() if name in functions else masks.Rule(name)


def random_table(seed, types=5):
    g = draw(seed)
    return {(q, k): random_rule(g) for q in range(types) for k in range(types) if int(torch.randint(0, 4, (), generator=g))}


def by_hand(rule, q, k):
    """One rule for one pair of tokens, in words of Python. The twin of csrc/ops/attention_mask.h and of Mask.dense, written from the definitions."""
    name, p = rule
    same = q["segment"] >= 0 and q["segment"] == k["segment"]
    causal = k["index"] <= q["index"]
    if name == "grid_shift":
        return same and all(neighborhood(q[c], k[c], *p[5 * n : 5 * n + 5]) for n, c in enumerate("tyx"))
    return {
        "never": lambda: False,
        "always": lambda: True,
        "causal": lambda: causal,
        "self": lambda: q["index"] == k["index"],
        "same_segment": lambda: same,
        "causal_or_same_segment": lambda: causal or same,
        "causal_window": lambda: causal and q["index"] - k["index"] < p[0],
        "band": lambda: -p[0] <= k["index"] - q["index"] <= p[1],
        "grid_clip": lambda: same and all(abs(q[c] - k[c]) <= r for c, r in zip("tyx", p, strict=True)),
        "last_segment": lambda: q["last"] >= 0 and k["segment"] == q["last"],
        "up_to_last_segment": lambda: 0 <= k["segment"] <= q["last"],
        "same_time": lambda: same and q["t"] == k["t"],
        "time_stride": lambda: same and (q["t"] - k["t"]) % p[0] == 0,
        "same_site": lambda: same and (q["y"], q["x"]) == (k["y"], k["x"]),
        "causal_not_same_segment": lambda: causal and not same,
    }[name]()


def neighborhood(i, j, L, kernel, dilation, stride, is_causal):
    """Tokens with the same residue, window of the leader of the stride."""
    if (i - j) % dilation:
        return False
    members = list(range(i % dilation, L, dilation))
    i, j, L = members.index(i), members.index(j), len(members)
    if is_causal:
        leader = min(i // stride * stride + stride - 1, L - 1)
        return max(leader - kernel + 1, 0) <= j <= i
    leader = min(i // stride * stride + stride // 2, L - 1)
    left = kernel // 2
    right = kernel - left - 1
    start = max(leader - left, 0) + (L - right - leader - 1 if leader + right >= L else 0)
    return start <= j < start + kernel


def brute_force(tables, queries, keys):
    B = max(len(queries.fields), len(keys.fields))
    keep = torch.zeros(B, len(tables), len(queries), len(keys), dtype=torch.bool)
    for b in range(B):
        q_rows, k_rows = ([dict(zip(masks.FIELDS, column, strict=True)) for column in each.fields[b % len(each.fields)].T.tolist()] for each in (queries, keys))
        for h, table in enumerate(tables):
            for (i, q), (j, k) in itertools.product(enumerate(q_rows), enumerate(k_rows)):
                if q["valid"] and k["valid"] and q["document"] == k["document"] and (q["type"], k["type"]) in table:
                    keep[b, h, i, j] = by_hand(table[q["type"], k["type"]], q, k)
    return keep


@pytest.mark.parametrize("seed", range(30))
def test_relations_are_what_their_rules_say(seed):
    queries, keys = random_tokens(23, seed, 2, local=False), random_tokens(31, seed + 100, 1 + seed % 2, local=False)
    tables = [random_table(seed + n) for n in range(1 + seed % 3)]
    assert torch.equal(masks.relation(tables, queries, keys).dense(), brute_force(tables, queries, keys))


def attend_like_the_matrix(mask, H=2, D=8, seed=0, B=None, **options):
    """Output, lse and gradients under the mask and under its matrix, in float64; what the kernel skips shows."""
    g = draw(seed)
    B = B or len(mask.dense())
    tensors = [torch.randn(B, H, n, D, generator=g, dtype=torch.float64).requires_grad_() for n in (mask.queries, mask.keys, mask.keys)]
    results = []
    for op in (masked_attention, reference_masked_attention):
        out, lse = op(*tensors, mask, return_lse=True, **options)
        total = (out * out.detach().sin()).sum() + torch.where(lse == -torch.inf, 0, lse).sum()
        results.append((out, lse, *torch.autograd.grad(total, tensors)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_attention_under_relations(seed, local):
    """Several tiles, whose coverage is told by ranges: what is skipped or taken whole must be so."""
    queries, keys = random_tokens(250, seed, 2, local=local), random_tokens(310, seed if local else seed + 50, 1, local=local)
    attend_like_the_matrix(masks.relation([random_table(seed), random_table(seed + 1)], queries, keys), seed=seed)


@pytest.mark.parametrize("items", [(1, 1), (1, 3), (3, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("tables", [1, 2, 4])
def test_heads_and_items_that_share_a_mask(tables, items):
    """Pairs are tested once for those that share them; items have lengths of their own."""
    queries, keys = random_tokens(110, 1, items[0], local=False), random_tokens(200, 2, items[1], local=False)
    mask = masks.relation([random_table(seed) for seed in range(tables)], queries, keys)
    attend_like_the_matrix(mask, B=3, H=4, key_lengths=torch.tensor([30, 200, 120]))
    if items == (3, 1):
        attend_like_the_matrix(mask & masks.causal(110, 200) | masks.from_dense(torch.rand(1, 4, 110, 200, generator=draw(3)) < 0.2), B=3, H=4)


def test_intervals_far_apart_in_a_block_of_keys():
    """What lies between them is seen by none; and empty intervals are no reason to keep a tile, but one against keeping it whole."""
    N = 600
    ends = torch.tensor([[0, 40], [500, 600], [300, 300], [0, 600]]).repeat(150, 1).int()
    for chosen in ([0, 1], [0, 2], [2], [3], [2, 3], [0, 1, 2, 3]):
        attend_like_the_matrix(masks.intervals(ends[torch.arange(N) % 4 == chosen[0]].repeat(4, 1)[:N] if len(chosen) == 1 else ends[chosen].repeat(300, 1)[:N], N))


def test_more_tiles_in_part_than_are_remembered():
    """Of two queries, and of two keys: 300 tiles on the way, of which 256 are."""
    N = 96 * 300 + 5
    row = torch.rand(1, 1, 2, N, generator=draw(0)) < 0.5
    long, two = masks.tokens([0] * N), masks.tokens([0] * 2)
    for mask in (masks.from_dense(row) & masks.relation({(0, 0): "always"}, two, long), masks.from_dense(row.mT) & masks.relation({(0, 0): "always"}, long, two)):
        attend_like_the_matrix(mask, H=2, D=2)


@pytest.mark.parametrize("rule", [*PLAIN, masks.causal_window(40), masks.band(30, 5), masks.grid_clip(0, 1, 1), masks.grid_shift((3, 4, 5), (1, 3, 3)), masks.time_stride(2)], ids=str)
def test_attention_under_one_rule(rule):
    """Long spans, so that whole tiles are kept and whole tiles are not."""
    spans = [("prefix", 150), ("visual", (3, 4, 5)), ("visual", (20, 4, 5)), ("question", 130)]
    tokens = masks.layout(spans)
    tokens = tokens.replace(t=tokens.t % 3)
    attend_like_the_matrix(masks.relation({(q, k): rule for q in masks.TYPE_NAMES for k in masks.TYPE_NAMES}, tokens))


def test_intervals_tiles_matrices_and_their_algebra():
    g = draw(0)
    N, M = 200, 250
    first = torch.randint(0, N, (2, M), generator=g)
    one = masks.intervals(torch.stack([first, (first + torch.randint(0, 90, (2, M), generator=g)).clamp(max=N)], -1), N)
    two = masks.blocks(torch.rand(2, 4, 8, generator=g) < 0.4, (64, 32), N, M)
    three = masks.from_dense(torch.rand(1, 1, 1, M, generator=g) < 0.8, N, M)
    for mask in (one, two, three, one & three, one | two, ~two & three, ~(one | two) | (two & ~three)):
        attend_like_the_matrix(mask)
    assert torch.equal((~(one | two) & three).dense(), ~(one.dense() | two.dense()) & three.dense())
    assert one.kept() == pytest.approx(one.dense().float().mean().item()) and (~one).sparsity() == pytest.approx(one.kept())
    with pytest.raises(ValueError, match="same queries and keys"):
        one & masks.full(N, M + 1)


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize(("N", "M"), [(5, 5), (200, 130), (130, 200)])
def test_causal_as_a_mask(N, M, align):
    i, j = torch.arange(N)[:, None] + (M - N if align == "bottom_right" else 0), torch.arange(M)
    assert torch.equal(masks.causal(N, M, align=align).dense()[0, 0], j <= i)
    assert torch.equal(masks.causal(N, M, align=align, window=7).dense()[0, 0], (j <= i) & (i - j < 7))
    attend_like_the_matrix(masks.causal(N, M, align=align, window=100))


def test_terms_of_a_mask_are_counted():
    mask = masks.full(4)
    for _ in range(7):
        mask = mask & masks.causal(4)
    with pytest.raises(ValueError, match="&: masks must have at most 16 steps, terms and signs, got 17"):
        mask & masks.causal(4)
    with pytest.raises(ValueError, match="~: masks must have at most 16 steps, terms and signs, got 17"):
        ~~mask


def test_rows_are_rows_and_columns_columns():
    tokens = random_tokens(200, 3)
    g = draw(1)
    for mask in (
        masks.relation(random_table(3), tokens),
        masks.causal(200, window=30),
        masks.blocks(torch.rand(7, 7, generator=g) < 0.5, 32, 200),
        masks.from_dense(torch.rand(200, 200, generator=g) < 0.5),
        masks.relation(random_table(3), tokens) & ~masks.causal(200),
    ):
        for start, stop in ((0, 200), (150, 151), (33, 150), (5, 5)):
            assert torch.equal(mask.rows(start, stop).dense(), mask.dense()[:, :, start:stop])
            assert torch.equal(mask.columns(start, stop).dense(), mask.dense()[..., start:stop])
        part = mask.rows(60, 101).columns(30, 160)
        assert (part.queries, part.keys) == (41, 130) and torch.equal(part.dense(), mask.dense()[:, :, 60:101, 30:160])
        attend_like_the_matrix(part)
    for cut in (mask.rows, mask.columns):
        with pytest.raises(ValueError, match=f"{cut.__name__}: start and stop must rise from 0 to 200, got 3 and 201"):
            cut(3, 201)


# ------------------------------------------------------------------------------------------------------------------------------------- published rules

LAYOUTS = {
    "one image": [[("prefix", 3), ("visual", (2, 3)), ("question", 4), ("answer", 3)]],
    "several images and turns": [
        [("prefix", 1), ("visual", (2, 2)), ("visual", (1, 3)), ("question", 2), ("answer", 2), ("visual", (2, 2)), ("question", 3), ("answer", 1)],
        [("question", 4), ("answer", 2)],
    ],
    "empty spans": [[("prefix", 0), ("visual", (1, 1)), ("question", 0), ("answer", 2)]],
    "no text": [[("visual", (3, 3))]],
}


def random_spans(seed):
    """Some hundred tokens: tiles of several spans, and spans of several tiles."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    spans = []
    for _ in range(number(6, 16)):
        kind = number(0, 4)
        spans.append(("visual", (number(1, 12), number(1, 12))) if kind == 1 else (masks.TYPE_NAMES[kind], number(0, 40)))
    return spans


LAYOUTS |= {f"random {n}": [random_spans(2 * n), random_spans(2 * n + 1)] for n in range(5)}


def pairs_of(tokens):
    """Fields by query and key, [B, N, 1] and [B, 1, N], and the names of the types."""
    of_query = {name: getattr(tokens, name)[:, :, None] for name in masks.FIELDS}
    of_key = {name: getattr(tokens, name)[:, None, :] for name in masks.FIELDS}
    return of_query, of_key


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_rules(name):
    tokens = masks.layout(*LAYOUTS[name])
    q, k = pairs_of(tokens)
    there = (q["valid"] == 1) & (k["valid"] == 1)
    causal = (k["index"] <= q["index"]) & there
    see, seen = ((each["type"] == masks.TYPE_NAMES.index("visual")) for each in (q, k))
    image = (q["segment"] == k["segment"]) & see & seen & there
    own = (q["index"] == k["index"]) & there
    of = {kind: k["type"] == n for n, kind in enumerate(masks.TYPE_NAMES)}
    turn = (tokens.type == 3).int().diff(prepend=tokens.type[:, :1] * 0).clamp(max=0).abs().cumsum(1)  # an answer that ends, ends a turn
    near = ((q["y"] - k["y"]).abs() <= 1) & ((q["x"] - k["x"]).abs() <= 1) & image
    wanted = {
        masks.image_prefix(tokens): causal | image,
        masks.composite(tokens): torch.where(see, own, causal),
        masks.composite(tokens, visual_update="ffn"): causal & ~see,
        masks.no_visual_attention(tokens): causal & ~see,
        masks.no_visual_attention(tokens, visual_to_text="causal"): causal & ~(see & seen),
        masks.modality_mutual(tokens): torch.where(see, (causal & ~of["answer"]) | (of["question"] & there), causal),
        masks.modality_mutual(tokens, turn): torch.where(
            see, (causal & ~of["answer"] & ~of["question"]) | (of["question"] & there & (turn[:, :, None] == turn[:, None, :])), causal
        ),
        masks.neighbor_window(tokens): torch.where(see & seen, near, causal),
    }
    for mask, want in wanted.items():
        assert torch.equal(mask.dense()[:, 0], want)
        attend_like_the_matrix(mask)


def test_what_rules_become_at_their_limits():
    tokens = masks.layout([("prefix", 2), ("visual", (4, 4)), ("question", 3)])
    single = masks.layout([("prefix", 2), ("visual", (1, 1)), ("question", 3)])
    assert torch.equal(masks.image_prefix(single).dense(), masks.causal(6).dense())
    assert torch.equal(masks.neighbor_window(tokens, 7).dense(), masks.image_prefix(tokens).dense())
    square = masks.neighbor_window(tokens, 1).dense()[0, 0, 2:18, 2:18]
    assert torch.equal(square, torch.eye(16, dtype=torch.bool))


def test_answers_do_not_leak_into_what_comes_before_them():
    tokens = masks.layout([("prefix", 2), ("visual", (4, 4)), ("question", 3), ("answer", 4)])
    for mask in (masks.image_prefix(tokens), masks.composite(tokens), masks.no_visual_attention(tokens), masks.modality_mutual(tokens), masks.neighbor_window(tokens)):
        keep = mask.dense()[0, 0]
        for at in range(21, 25):
            assert not keep[:at, at].any()


def test_keys_that_are_dropped_are_dropped_for_all():
    mask = masks.key_dropout(50, 1000, 0.3, generator=draw(0))
    keep = mask.dense()
    assert keep.shape == (1, 1, 50, 1000) and (keep == keep[:, :, :1]).all() and 0.65 < mask.kept() < 0.75
    assert masks.key_dropout(3, 4, 0).kept() == 1 and masks.key_dropout(3, 4, 1.0).kept() == 0


def test_masks_compile_into_one_graph():
    """With their tensors as inputs: another mask of the same kind and size needs no new graph."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(masked_attention, backend=counter, fullgraph=True)
    x = torch.randn(1, 2, 30, 8, requires_grad=True)
    for seed in (1, 2):
        mask = masks.relation({(0, 0): "causal", (1, 1): "same_segment", (1, 0): masks.band(5, 5)}, random_tokens(30, seed)) & masks.causal(30, window=9 + seed)
        out, want = compiled(x, x, x, mask), masked_attention(x, x, x, mask)
        assert torch.equal(out, want) and torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(want.sum(), x)[0])
    assert counter.frame_count == 1


def test_one_number_is_the_kernel_of_all_dimensions():
    assert masks.grid_shift((3, 4), 3) == masks.grid_shift((3, 4), (3, 3)) and masks.grid_shift((3, 4), 2, dilation=1) == masks.grid_shift((3, 4), [2, 2])


def test_masks_are_trees():
    mask = masks.relation(random_table(1), random_tokens(30, 1)) & masks.causal(30)
    leaves, spec = torch.utils._pytree.tree_flatten(mask)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert [torch.utils._pytree.keystr(path) for path, _ in torch.utils._pytree.tree_leaves_with_path(mask)] == [f".tensors[{n}]" for n in range(len(leaves))]
    assert torch.equal(again.dense(), mask.dense()) and torch.equal(mask.to("cpu").dense(), mask.dense()) and len(repr(mask.steps)) < 80


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: masks.relation({("text", "text"): "causal"}, masks.layout([("prefix", 2)])), ValueError, "table must have types from 0 to 15 or of prefix, visual"),
        (lambda: masks.relation({(0, 16): "causal"}, masks.layout([("prefix", 2)])), ValueError, "table must have types"),
        (lambda: masks.relation({(0, 0): "diagonal"}, masks.layout([("prefix", 2)])), ValueError, "table must hold names of rules"),
        (lambda: masks.relation({(0, 0): "band"}, masks.layout([("prefix", 2)])), ValueError, "table must hold names of rules"),
        (lambda: masks.relation({}, torch.ones(3)), TypeError, "queries must be Tokens"),
        (lambda: masks.tokens([0, 16]), ValueError, "type must be from 0 to 15, got 16"),
        (lambda: masks.tokens([0, 1], segment=[1, 2, 3]), ValueError, "segment must be whole numbers for 2 tokens"),
        (lambda: masks.tokens(torch.ones(3)), ValueError, "type must be whole numbers"),
        (lambda: masks.layout([("text", 3)]), ValueError, "spans must be of prefix, visual, question, answer, got 'text'"),
        (lambda: masks.causal_window(0), ValueError, "width must be 1 or more"),
        (lambda: masks.band(-1, 2), ValueError, "left must be 0 or more"),
        (lambda: masks.grid_clip(0, 1.0, 1), TypeError, "y must be a whole number"),
        (lambda: masks.grid_shift((4, 4), (5, 1)), ValueError, "kernel . dilation must be at most size"),
        (lambda: masks.grid_shift((4, 4), (2, 2), stride=3), ValueError, "stride at most kernel"),
        (lambda: masks.grid_shift((4,), (2, 2)), ValueError, "one to three dimensions"),
        (lambda: masks.grid_shift(4, 2), ValueError, "size must have one to three dimensions, got 4"),
        (lambda: masks.grid_shift((4, 4), "ab"), TypeError, "kernel must be a whole number, got 'a'"),
        (lambda: masks.grid_shift((4, 4), 2, is_causal=2), TypeError, "is_causal must be True or False, got 2"),
        (lambda: masks.intervals(torch.tensor([[3, 2]]), 5), ValueError, "0 <= first <= end <= queries"),
        (lambda: masks.intervals(torch.tensor([[3, 6]]), 5), ValueError, "0 <= first <= end <= queries"),
        (lambda: masks.blocks(torch.ones(2, 2, dtype=torch.bool), 64, 200), ValueError, r"keep must be a bool tensor \[..., 4, 4\]"),
        (lambda: masks.from_dense(torch.ones(3, 3)), TypeError, "keep must be a bool tensor"),
        (lambda: masks.from_dense(torch.ones(3, 3, dtype=torch.bool), 4, 3), ValueError, "keep must broadcast"),
        (lambda: masks.neighbor_window(masks.layout([("prefix", 1)]), 4), ValueError, "window must be odd"),
        (lambda: masks.composite(masks.layout([("prefix", 1)]), visual_update="all"), ValueError, "visual_update must be"),
        (lambda: masks.key_dropout(3, 3, 1.5), ValueError, "p must be from 0 to 1"),
        (lambda: masks.tokens(torch.zeros(2).int(), document=torch.tensor([0, 2**32])), ValueError, r"tokens: document must be from -1073741823 to 1073741823, got 4294967296"),
        (lambda: masks.tokens(torch.zeros(2).int(), index=[-(2**30), 0]), ValueError, r"tokens: index must be from -1073741823 to 1073741823, got -1073741824"),
        (lambda: masks.tokens(torch.zeros(2).int(), valid=[1, 2]), ValueError, r"tokens: valid must be 0 or 1, got 2"),
        (lambda: masks.layout([("visual", (-2, -3))]), ValueError, r"layout: a span must be 0 or more, got -2"),
        (lambda: masks.layout([("visual", ())]), ValueError, r"layout: a grid must have one to three dimensions, got \(\)"),
        (lambda: masks.layout([("visual", (2.0, 3))]), TypeError, r"layout: a span must be a whole number, got 2\.0"),
        (lambda: masks.from_flashmask(torch.full((1, 1, 3, 1), 4), 3, is_causal=True), ValueError, r"from_flashmask: startend_row_indices must be whole numbers from 0 to queries = 3, got .* from 4 to 4"),
        (lambda: masks.from_bsr(torch.tensor([0, 2]), torch.tensor([0, 0]), (4, 4), 4, 8), ValueError, "from_bsr: indices must be different in every row, got 1 again"),
        (lambda: masks.from_bsr(torch.tensor([0.0, 1.0]), torch.tensor([0]), (4, 4), 4, 8), TypeError, "from_bsr: indptr and indices must be whole numbers"),
        (lambda: masks.modality_mutual(masks.layout([("visual", (2, 2))]), torch.zeros(3).int()), ValueError, "modality_mutual: turn must be whole numbers for 4 tokens"),
        (lambda: masks.modality_mutual(masks.layout([("visual", (2, 2))]), torch.zeros(4)), ValueError, "modality_mutual: turn must be whole numbers for 4 tokens"),
        (lambda: masks.relation({}, masks.layout(*[[("visual", 2)]] * 2), masks.layout(*[[("visual", 2)]] * 3)), ValueError, "relation: queries and keys must be of as many items, or of one, got 2 and 3"),
        (lambda: masks.packed(torch.tensor([0, 2]), torch.tensor([0, 2]), 2.0, 2), TypeError, r"packed: queries must be a whole number, got 2\.0"),
        (lambda: masks.packed(torch.tensor([0, 2]), torch.tensor([0, 2]), 3, 2), ValueError, r"packed: cu_seqlens_q must rise from 0 to the number of rows 3, got \[0, 2\]"),
    ],
)
def test_masks_that_are_none_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_masks_that_do_not_fit_are_refused():
    q = torch.randn(2, 4, 6, 8)
    for mask, message in (
        (masks.causal(5, 6), "of 6 queries and 6 keys, got one of 5 and 6"),
        (masks.from_dense(torch.ones(1, 3, 6, 6, dtype=torch.bool)), "heads that divide 4"),
        (masks.relation({}, random_tokens(6, 0, 3)), "1 or 2 items"),
        (masks.causal(6).to("meta"), "query's device"),
    ):
        with pytest.raises(ValueError, match=message):
            masked_attention(q, q, q, mask)


@pytest.mark.parametrize(
    ("tensors", "steps", "message"),
    [
        ([], [4, 0, 0, 0], "combine what came before"),
        ([], [3, 0, 0, 0], "a tensor for every term"),
        ([], [9, 0, 0, 0], "kind 0 to 6"),
        ([], [3, 0, 0], "at most 16 steps"),
        ([torch.ones(1, 1, 6, 6, dtype=torch.bool)], [3, 0, 0, 0, 3, 0, 0, 0], "leave one answer"),
        ([torch.ones(1, 1, 6, 5, dtype=torch.bool)], [3, 0, 0, 0], r"end in \[6, 6\]"),
        ([torch.ones(1, 1, 6, 2)], [1, 0, 0, 0], "dtype"),
    ],
)
def test_raw_programs_that_are_none_are_refused(tensors, steps, message):
    q = torch.randn(1, 1, 6, 4)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.modalign.masked_attention(q, q, q, None, None, None, None, 6, 6, 0, 1.0, 0.0, tensors, steps)


@pytest.mark.parametrize(("field", "value"), [("type", 16), ("type", -1), ("t", -1), ("valid", 2)])
def test_tokens_out_of_range_are_refused_before_a_kernel_looks_them_up(field, value):
    q = torch.randn(1, 1, 6, 4)
    tokens = masks.layout([("prefix", 6)]).replace(**{field: value})
    with pytest.raises(RuntimeError, match="types from 0 to 15, valid 0 or 1 and coordinates of 0 or more"):
        masked_attention(q, q, q, masks.relation({(0, 0): "causal"}, tokens))


# --------------------------------------------------------------------------------------------------------------- published rules on other tokens than one's own


def test_masks_of_cross_attention():
    """Against pairs looked at one by one: text with media, pooled tokens with all, tags with tiles, cells."""
    g = draw(2)
    last = torch.tensor([-1, -1, 0, 0, 1, 1, 1, 2])
    segment = torch.arange(3).repeat_interleave(4)
    text, keys = masks.tokens([2] * 8, last=last, names=masks.TYPE_NAMES), masks.tokens([1] * 12, segment=segment, t=segment, names=masks.TYPE_NAMES)
    i, j = last[:, None], segment[None]
    assert torch.equal(masks.media(text, keys).dense()[0, 0], (i == j) & (i >= 0))
    assert torch.equal(masks.media(text, keys, immediate=False).dense()[0, 0], j <= i)
    attend_like_the_matrix(masks.media(text, keys))

    kinds, frame = torch.tensor([1] * 3 + [2] * 4), torch.tensor([0, 1, 2, 0, 0, 0, 0])
    queries = masks.tokens(kinds, segment=0, last=torch.tensor([0, 0, 0, -1, 0, 0, 0]), t=frame, names=masks.TYPE_NAMES)
    frames = masks.tokens([1] * 12, segment=0, t=torch.arange(12) // 4, names=masks.TYPE_NAMES)
    pooled, own = kinds[:, None] == 1, frame[:, None] == (torch.arange(12) // 4)[None]
    assert masks.dual_cross(queries, frames).dense().all()
    seen = masks.dual_cross(queries, frames, same_frame=True, causal_media=True).dense()[0, 0]
    assert torch.equal(seen, torch.where(pooled, own, (torch.arange(7) > 3)[:, None].expand(7, 12)))

    tags = masks.tokens([0, 1, 0, 1], segment=torch.tensor([-1, 0, -1, 2]), last=torch.tensor([-1, -1, 1, 1]), names=("text", "tag"))
    tiles = masks.tokens([0] * 12, segment=segment, names=("visual",))
    want = torch.stack([torch.zeros(12, dtype=torch.bool), segment == 0, segment <= 1, segment == 2])
    assert torch.equal(masks.tile_tags(tags, tiles).dense()[0, 0], want)

    cell = torch.randint(0, 4, (20,), generator=g)
    latents, map_ = masks.tokens([1] * 4, segment=torch.arange(4), names=masks.TYPE_NAMES), masks.tokens([1] * 20, segment=cell, names=masks.TYPE_NAMES)
    assert torch.equal(masks.cell_window(latents, map_).dense()[0, 0], torch.arange(4)[:, None] == cell)


def test_masks_of_encoders():
    tokens = masks.layout([("visual", (2, 3)), ("question", 4)])
    see, seen = (torch.arange(10) < 6)[:, None], (torch.arange(10) < 6)[None]
    assert torch.equal(masks.text_guided(tokens).dense()[0, 0], ~(see & ~seen)) and masks.text_guided(tokens, late=True).kept() == 1

    T, S, names = 8, 3, ("patch", "cls", "level 1", "level 2")
    kinds = torch.tensor([1] + [2] * 4 + [3] * 4 + [0] * (T * S))
    time = torch.cat([torch.zeros(9, dtype=torch.long), torch.arange(T).repeat_interleave(S)])
    keep = masks.temporal_hierarchy(masks.tokens(kinds, segment=0, t=time, names=names), 2).dense()[0, 0]
    for q in range(len(kinds)):
        for k in range(len(kinds)):
            a, b = int(kinds[q]), int(kinds[k])
            if a == 1 or b == 1:
                want = True
            elif a == 0:
                want = b != 0 or time[q] == time[k]
            else:
                want = b <= a if b else (time[k] - time[q]) % 2 ** (a - 1) == 0
            assert bool(keep[q, k]) == bool(want), (q, k)
    patches = masks.temporal_hierarchy(masks.tokens([0] * 5, segment=0, names=names), 0)
    assert patches.kept() == 1  # one frame, no levels: the attention of a picture


# --------------------------------------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("size", [(16, 16), (32, 16), 128])
def test_block_masks_there_and_back(size):
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    tokens = masks.layout([("prefix", 20), ("visual", (8, 8)), ("question", 40)], [("visual", (8, 8)), ("question", 10)])
    for mask in (masks.modality_mutual(tokens), masks.causal(200, 130, window=40), masks.full(50, 70), masks.from_dense(torch.zeros(1, 1, 50, 70, dtype=torch.bool))):
        block_mask = masks.to_block_mask(mask, size)
        dense = mask.dense()
        B, H = dense.shape[:2]
        assert torch.equal(create_mask(block_mask.mask_mod, B, H, mask.queries, mask.keys, device="cpu"), dense)
        again = masks.from_block_mask(block_mask)
        assert torch.equal(again.dense(), dense)
        attend_like_the_matrix(again)
    theirs = create_block_mask(lambda b, h, i, j: (i >= j) & (i // 50 == j // 50), None, None, 300, 300, device="cpu", BLOCK_SIZE=64)
    i, j = torch.arange(300)[:, None], torch.arange(300)
    assert torch.equal(masks.from_block_mask(theirs).dense()[0, 0], (i >= j) & (i // 50 == j // 50))


def test_block_sparse_rows_there_and_back():
    keep = torch.rand(5, 4, generator=draw(3)) < 0.5
    mask = masks.blocks(keep, (32, 64), 150, 250)
    indptr, indices = masks.to_bsr(mask, (32, 64))
    assert indptr.tolist() == [0, *keep.sum(1).cumsum(0).tolist()] and torch.equal(masks.from_bsr(indptr, indices, (32, 64), 150, 250).dense(), mask.dense())
    for wrong in (lambda: masks.to_bsr(masks.causal(150), (32, 64)), lambda: masks.from_bsr(indptr, indices + 9, (32, 64), 150, 250), lambda: masks.from_bsr(indptr[:-1], indices, (32, 64), 150, 250)):
        with pytest.raises(ValueError, match=r"to_bsr: mask must|from_bsr: ind"):
            wrong()


@pytest.mark.parametrize(("columns", "is_causal"), [(1, True), (2, True), (2, False), (4, False)])
def test_column_intervals_are_read_as_flashmask_means_them(columns, is_causal):
    N = 60
    g = draw(columns)
    given = torch.randint(0, N + 1, (2, 2, N, columns), generator=g).int()
    keep = masks.from_flashmask(given, N, is_causal=is_causal).dense()
    for b, h, j in itertools.product(range(2), range(2), range(N)):
        for i in range(N):
            x = given[b, h, j].tolist()
            if is_causal:
                masked = i < j or (x[0] <= i < (N if columns == 1 else x[1]))
            else:
                masked = (i >= x[0] or i < x[1]) if columns == 2 else (x[0] <= i < x[1] or x[2] <= i < x[3])
            assert bool(keep[b, h, i, j]) == (not masked)


def test_column_intervals_there_and_back():
    for mask in (masks.causal(60, 80, window=9), masks.full(50, 60), masks.from_dense(torch.zeros(1, 2, 20, 30, dtype=torch.bool))):
        assert torch.equal(masks.from_flashmask(masks.to_flashmask(mask), mask.queries, is_causal=False).dense(), mask.dense())
    with pytest.raises(ValueError, match="one range of queries"):
        masks.to_flashmask(~masks.causal(60, window=9))
    with pytest.raises(ValueError, match="startend_row_indices must have shape"):
        masks.from_flashmask(torch.zeros(1, 1, 5, 4).int(), 5, is_causal=True)


# ----------------------------------------------------------------------------------------------------------------------------------- the command line


def test_masks_are_drawn():
    runner = CliRunner()
    shown = runner.invoke(app, ["mask", "show", "modality_mutual", "--spans", "prefix 2, visual 2x2, question 2, answer 1"])
    page = (Path(__file__).parent.parent / "docs/masks.md").read_text()
    assert shown.exit_code == 0 and shown.output.strip() in page  # what the page shows
    for rule in RULES:
        drawn = runner.invoke(app, ["mask", "show", rule])
        assert drawn.exit_code == 0 and len(drawn.output.splitlines()) == 16 + 2
    for wrong, message in ((["diagonal"], "RULE must be one of"), (["causal", "--spans", "prefix two"], "spans must look like"), (["causal", "--spans", "prefix 200"], "1 to 96 tokens"), (["causal", "--spans", "text 2"], "spans must be of")):
        refused = runner.invoke(app, ["mask", "show", *wrong])
        assert refused.exit_code == 1 and message in refused.output + refused.stderr


def test_a_mask_draws_itself():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    axes = masks.causal(4).plot()
    assert torch.equal(torch.from_numpy(axes.images[0].get_array().data).bool(), masks.causal(4).dense()[0, 0])
    pyplot.close(axes.figure)
