"""match_tokens, merge_tokens and TokenMatch beyond the battery: who joins whom, in which order, sizes, packed items, ties, broken values, bits, memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modalign import _load, info
from modalign.compat import pitome, tome, tomesd
from modalign.nn.functional import energy_order, token_energy
from modalign.ops import TokenMatch, match_tokens, merge_tokens
from modalign.ops._groups import groups_of, reduce_groups, spread_groups
from modalign.ops.match_tokens import reference_match_tokens
from modalign.testing import peak_memory


def by_definition(features: list[list[float]], r: int, protected: int, keep_order: bool, threshold: float = -math.inf) -> list[list[int]]:
    """The tokens of every row of the output, for one item, in plain Python: the text of the paper."""
    N = len(features)

    def cosine(a: int, b: int) -> float:
        lengths = [math.sqrt(math.fsum(x * x for x in features[i])) for i in (a, b)]
        return math.fsum(x * y for x, y in zip(features[a], features[b], strict=True)) / (lengths[0] * lengths[1]) if min(lengths) > 0 else 0.0

    sources, targets = ([i for i in range(protected, N) if i % 2 == odd] for odd in (0, 1))
    best = {a: max(((cosine(a, b), -b) for b in targets), default=(-math.inf, 0)) for a in sources}
    ranked = sorted(sources, key=lambda a: (-best[a][0], a))
    joining = [a for a in ranked[: min(r, max(0, N - protected) // 2)] if best[a][0] > threshold]
    groups = {i: [i] for i in range(N) if i not in joining}
    for a in joining:
        groups[-best[a][1]].append(a)
    staying = ranked[len(joining) :]
    order = [*range(min(protected, N)), *(sorted(staying) if protected else staying), *targets]
    if keep_order or not joining:
        order = sorted(groups, key=lambda i: min(groups[i]))
    return [sorted(groups[i]) for i in order]


def rows_of(match: TokenMatch) -> list[list[int]]:
    """The tokens of every row of the output, counted over all items."""
    offsets, members = match.offsets.tolist(), match.members.tolist()
    return [members[begin:end] for begin, end in zip(offsets, offsets[1:], strict=False)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_who_joins_whom_is_what_the_paper_says(dtype):
    generator = torch.Generator().manual_seed(7)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for trial in range(250):
        B, N, D, protected = number(1, 4), number(1, (9, 40, 120)[trial % 3]), number(3, 70), number(0, 5) if trial % 2 else 0
        r, keep_order = number(0, N // 2 + 3), trial % 4 == 3
        features = draw(B, N, D, seed=trial).to(dtype)
        match = match_tokens(features, r, protected=protected, keep_order=keep_order)
        wanted = [by_definition(item.double().tolist(), r, protected, keep_order) for item in features]
        assert rows_of(match) == [[b * N + i for i in row] for b, item in enumerate(wanted) for row in item], (trial, B, N, D, r, protected, keep_order)
        M = N - min(r, max(0, N - protected) // 2)
        assert match.count.shape == (B, M) and match.count.sum() == B * N and torch.equal(match.source(), torch.tensor([_places(item, N) for item in wanted]))
        x = draw(B, N, 5, seed=trial + 1)
        torch.testing.assert_close(match.merge(x), torch.stack([torch.stack([x[b, row].mean(0) for row in item]) for b, item in enumerate(wanted)]), rtol=1e-12, atol=1e-12)


def _places(rows: list[list[int]], N: int) -> list[int]:
    place = [0] * N
    for at, row in enumerate(rows):
        for i in row:
            place[i] = at
    return place


def test_cases_by_hand():
    match = match_tokens(torch.tensor([[[1.0], [1.0], [-1.0], [-1.0]]]), 1)
    assert rows_of(match) == [[2], [0, 1], [3]]
    match = match_tokens(draw(1, 9, 4), 2, protected=2)
    assert rows_of(match)[:2] == [[0], [1]]
    assert rows_of(match_tokens(draw(1, 8, 4), 4)) == [[i, *more] if not more else sorted([i, *more]) for i, more in _joined_at_odd(draw(1, 8, 4))]


def _joined_at_odd(features: Tensor) -> list[tuple[int, list[int]]]:
    """With r = N / 2 only tokens at odd places remain."""
    unit = features[0] / features[0].norm(dim=1, keepdim=True)
    partner = (unit[::2] @ unit[1::2].T).argmax(1).tolist()
    return [(2 * t + 1, [2 * a for a, other in enumerate(partner) if other == t]) for t in range(len(partner))]


def test_ties_go_to_the_earlier_token():
    generator = torch.Generator().manual_seed(3)
    for trial in range(100):
        features = 2.0 * torch.randint(0, 2, (1, 30, 3 + trial % 5), generator=generator) - 1  # all of one length, products exact, ties by the dozen
        features[0, :: 7 + trial % 3] = 0
        r, keep_order = trial % 16, trial % 3 == 0
        assert rows_of(match_tokens(features, r, keep_order=keep_order)) == rows_of(reference_match_tokens(features, r, keep_order=keep_order))
    same = torch.ones(1, 10, 4)
    assert rows_of(match_tokens(same, 2)) == [[4], [6], [8], [0, 1, 2], [3], [5], [7], [9]]


def test_zero_vectors_are_like_nothing_and_nan_comes_last():
    features = draw(1, 40, 6)
    features[0, [4, 7]] = 0
    assert rows_of(match_tokens(features, 12)) == by_definition(features[0].tolist(), 12, 0, False)
    broken = features.clone()
    broken[0, [8, 11], 2] = torch.nan
    match = match_tokens(broken, 12)
    joined = {i for row in rows_of(match) if len(row) > 1 for i in row}
    assert not joined & {8, 11} and match.score[0, 8] == -torch.inf and match.score[0, 4] == 0
    everything = match_tokens(torch.full((1, 9, 3), torch.nan), 3)
    assert everything.count.sum() == 9 and everything.count.shape == (1, 6)
    x = draw(1, 40, 3)
    x[0, 5, 1] = torch.nan
    merged = match_tokens(features, 12).merge(x)
    assert merged.isnan().sum() == 1  # of one row and one element


def test_lengths_neither_overflow_nor_vanish():
    features = draw(1, 30, 8).float()
    want = match_tokens(features, 9)
    for scale in (1e-30, 1e30):
        assert torch.equal(match_tokens(features * scale, 9).group, want.group)


def test_sizes_are_kept_through_24_layers_of_a_ragged_batch_in_bfloat16():
    lengths = [900, 1, 2, 333, 1200]
    cu, longest = torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)
    x, size = draw(sum(lengths), 8).bfloat16(), None
    for _ in range(24):
        x, size, match = merge_tokens(x, x, 150, size=size, cu_seqlens=cu, longest=longest)
        cu, longest = match.cu_seqlens, int(match.cu_seqlens.diff().max())
    totals = [float(size[begin:end].sum()) for begin, end in zip(cu[:-1], cu[1:], strict=True)]
    assert totals == lengths and size.max() > 256 and size.dtype is torch.float32


def test_tokens_are_weighted_means_of_what_entered():
    x, origin = draw(2, 64, 5), torch.eye(64, dtype=torch.float64).repeat(2, 1, 1)
    tokens, size, source = x, None, None
    for r in (20, 12, 7):
        match = match_tokens(tokens, r, protected=1)
        tokens, origin, size, source = match.merge(tokens, size), match.merge(origin, size), match.merge_size(size), match.source(source)
    torch.testing.assert_close(origin.sum(2), torch.ones(2, 25, dtype=torch.float64))
    torch.testing.assert_close(tokens, origin @ x)
    torch.testing.assert_close(size.double(), 1 / origin.max(2).values)  # every origin counts the same
    assert torch.equal((origin > 0).int().argmax(1), source)


def test_class_token_passes_bit_for_bit_and_equal_tokens_merge_without_loss():
    x = draw(3, 21, 7).float()
    size = torch.rand(3, 21) + 1
    assert torch.equal(match_tokens(x, 8, protected=1).merge(x, size)[:, 0], x[:, 0])
    constant = torch.full((2, 30, 4), 0.1)
    for mode in ("mean", "amax"):
        assert torch.equal(match_tokens(draw(2, 30, 4), 13).merge(constant, mode=mode), constant[:, :17])
    pairs = draw(1, 10, 6).repeat_interleave(2, 1)
    match = match_tokens(pairs, 10)
    assert torch.equal(match.unmerge(match.merge(pairs)), pairs)


def test_unmerge_copies_and_items_do_not_matter_to_each_other():
    x = draw(4, 33, 6)
    match = match_tokens(x, 12)
    back = match.unmerge(match.merge(x))
    alone = match.count.flatten()[match.group.long()] == 1
    assert torch.equal(back[alone], x[alone]) and not torch.equal(back, x)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(match_tokens(x[order], 12).merge(x[order]), match.merge(x)[order])
    assert torch.equal(match.source_matrix().sum(1), torch.ones(4, 33, dtype=torch.int64))


@pytest.mark.parametrize("options", [{}, {"protected": 1}, {"keep_order": True}, {"threshold": 0.5}, {"threshold": 0.3, "keep_order": True, "protected": 2}])
def test_packed_is_one_item_at_a_time_bit_for_bit(options):
    lengths = [37, 0, 1, 200, 2, 98]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    features, x = draw(sum(lengths), 9).float(), draw(sum(lengths), 4, 3).float()
    size = torch.arange(len(x)) % 5 + 1
    r = 15 if "threshold" not in options else None
    tokens, sizes, match = merge_tokens(x, features, r, size=size, cu_seqlens=cu, longest=200, **options)
    parts = []
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        part = merge_tokens(x[None, begin:end], features[None, begin:end], r, size=size[None, begin:end], **options)
        parts.append((part.tokens.reshape(-1, 4, 3), part.size.reshape(-1), part.match.score.reshape(-1), part.match.source().reshape(-1)))
    for ours, theirs in zip((tokens, sizes, match.score, match.source()), (torch.cat(each) for each in zip(*parts, strict=True)), strict=True):
        assert torch.equal(ours, theirs)
    assert match.cu_seqlens.diff().tolist() == [len(part[0]) for part in parts]
    assert torch.equal(match.unmerge(tokens), tokens[match.group.long()])


def test_threshold_joins_what_is_more_similar():
    features = draw(3, 50, 5)
    before = 150
    for threshold in (-1.5, 0.2, 0.8, 0.99, 1.5):
        match = match_tokens(features, threshold=threshold)
        wanted = [by_definition(item.tolist(), 50, 0, False, threshold) for item in features]
        assert rows_of(match) == [[b * 50 + i for i in row] for b, item in enumerate(wanted) for row in item]
        assert match.packed and match.cu_seqlens.tolist() == torch.tensor([0, *map(len, wanted)]).cumsum(0).tolist()
        joined = 150 - len(match.count)
        assert joined <= before
        before = joined
    best = match_tokens(features, 4, threshold=-2.0)
    assert torch.equal(best.group.view(3, 50), match_tokens(features, 4).group)


def test_modes_and_their_gradients():
    x = draw(2, 20, 3).requires_grad_()
    match = match_tokens(x, 8)
    size = torch.arange(40).view(2, 20) % 3 + 1
    joined = match.source_matrix().double()
    expected = {"mean": (joined / joined.sum(2, keepdim=True)) @ x, "sum": joined @ x}
    for mode, want in expected.items():
        torch.testing.assert_close(match.merge(x, mode=mode), want)
    highest = torch.stack([torch.stack([x[b, row].max(0).values for row in joined[b].bool()]) for b in range(2)])
    assert torch.equal(match.merge(x, mode="amax"), highest)
    for call in (lambda x: match.merge(x), lambda x: match.merge(x, mode="sum"), lambda x: match.merge(x, mode="amax"), lambda x: match.merge(x, size), lambda x: match.unmerge(x[:, :12])):
        assert torch.autograd.gradcheck(call, x) and torch.autograd.gradgradcheck(call, x)
    tied = torch.ones(1, 4, 1, requires_grad=True)
    match_tokens(tied, 2).merge(tied, mode="amax").sum().backward()
    want = torch.ones(1, 4, 1, requires_grad=True)
    torch.stack([want[0, [0, 1, 2]].amax(0), want[0, 3]]).sum().backward()
    torch.testing.assert_close(tied.grad, want.grad)


def test_groups_of_rows():
    group = torch.tensor([3, 0, 3, 1, 3, 0])
    groups = groups_of(group, 5)
    assert groups.members.tolist() == [1, 5, 3, 0, 2, 4] and groups.offsets.tolist() == [0, 2, 3, 3, 6, 6]
    x, weight = draw(6, 4), torch.tensor([1.0, 2.0, 0.0, 0.0, 5.0, -2.0], dtype=torch.float64)
    for mode in ("sum", "mean"):
        for w in (None, weight):
            dense = torch.zeros(5, 6, dtype=torch.float64)
            dense[group, torch.arange(6)] = 1.0 if w is None else w
            total = dense.sum(1)
            if mode == "mean":
                alone = torch.tensor([(group == g).sum() == 1 for g in range(5)])
                dense = torch.where(total[:, None] == 0, 0.0, dense / total[:, None])
                dense[alone] = (group == torch.arange(5)[:, None])[alone].double()
            out, totals = reduce_groups(x, groups, w, mode)
            torch.testing.assert_close(out, dense @ x)
            torch.testing.assert_close(totals, total)
            y = draw(5, 4, seed=2)
            torch.testing.assert_close(spread_groups(y, groups, w, mode), dense.T @ y)
    assert (reduce_groups(x, groups, None, "max")[0][[2, 4]] == -torch.inf).all()
    bad = groups._replace(members=groups.members.clone().index_fill_(0, torch.tensor([1]), 1))
    with pytest.raises(RuntimeError, match="reduce_groups: members must hold every row once, got 1 at position 1"):
        reduce_groups(x, bad)
    with pytest.raises(RuntimeError, match="spread_groups: offsets must rise from 0 to the number of rows 6, got 6 at position 2"):
        spread_groups(x[:5], groups._replace(offsets=torch.tensor([0, 7, 6, 6, 6, 6]).int()))


def test_packed_items_that_are_none_are_refused():
    features = draw(10, 3)
    for cu, longest, message in (([0, 4, 9], 9, "number of tokens 10, got 0 to 9"), ([0, 6, 4, 10], 10, "got -2 at position 1"), ([0, 4, 10], 5, "longest = 5, got 6 at position 1")):
        with pytest.raises(RuntimeError, match=f"match_tokens: cu_seqlens must rise .*{message}"):
            match_tokens(features, 2, cu_seqlens=torch.tensor(cu).int(), longest=longest)
    with pytest.raises(TypeError, match="match_tokens: longest must be the length of the longest item, or more, with cu_seqlens, got NoneType"):
        match_tokens(features, 2, cu_seqlens=torch.tensor([0, 10]).int())
    with pytest.raises(TypeError, match=r"match_tokens: cu_seqlens must be an int32 tensor \[items \+ 1\], got a int64 tensor"):
        match_tokens(features, 2, cu_seqlens=torch.tensor([0, 10]), longest=10)
    with pytest.raises(ValueError, match=r"match_tokens: features must have shape \[T, D\], got"):
        match_tokens(features[None], 2, cu_seqlens=torch.tensor([0, 10]).int(), longest=10)


def test_bits_do_not_depend_on_threads_and_choices_not_on_instruction_sets():
    features, x = draw(3, 517, 64).float(), draw(3, 517, 33).float()
    want = merge_tokens(x, features, 100)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            got = merge_tokens(x, features, 100)
            assert torch.equal(got.tokens, want.tokens) and torch.equal(got.match.score, want.match.score)
    finally:
        torch.set_num_threads(threads)
    for name in info.collect()["instruction_sets"]["ran_here"]:
        with _load.use_instruction_set(name):
            assert torch.equal(match_tokens(features, 100).group, want.match.group), name


def probe(N: int) -> tuple[Callable[[], object], Callable[[], object]]:
    features, x = torch.randn(8, N, 48), torch.randn(8, N, 48)
    return lambda: merge_tokens(x, features, N // 4), lambda: merge_tokens(x[:1, :8], features[:1, :8], 1)


def test_nothing_n_times_n_is_stored():
    small, large = (peak_memory("test_match_tokens:probe", N=N).peak for N in (4096, 8192))
    assert large < 2.5 * small and large < 8 * 4096 * 4096 * 4 / 4  # the similarities of sources and destinations would take four times that


def test_strided_features_are_read_where_they_are():
    keys = draw(2, 4, 50, 16).float()
    assert torch.equal(match_tokens(keys[:, 1, :, ::2], 9).group, match_tokens(keys[:, 1, :, ::2].contiguous(), 9).group)


def test_any_two_sets_by_order_and_sources():
    for trial in range(30):
        B, N, sources = 2, 21, trial % 22
        features, order = draw(B, N, 6, seed=trial), torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(trial + b)) for b in range(2)])
        match, r = match_tokens(features, 7, sources=sources, order=order), min(7, sources) if sources < N else 0
        x = draw(B, N, 2, seed=trial + 100)
        for b in range(B):
            looking, others = order[b, :sources], order[b, sources:]
            unit = features[b] / features[b].norm(dim=1, keepdim=True)
            best, partner = (unit[looking] @ unit[others].T).max(1) if 0 < sources < N else (torch.zeros(sources), torch.zeros(sources).long())
            ranked = best.argsort(descending=True, stable=True)
            groups = [[int(i)] for i in (looking[ranked[r:]] if r else [])] + [[int(i)] for i in others]
            for a in ranked[:r].tolist():
                groups[sources - r + int(partner[a])].append(int(looking[a]))
            groups = groups if r else [[int(i)] for i in order[b]]
            torch.testing.assert_close(match.merge(x)[b], torch.stack([x[b, row].mean(0) for row in groups]))
            assert match.source()[b].tolist() == _places(groups, N)
    with pytest.raises(ValueError, match="match_tokens: order must hold every place of an item once"):
        match_tokens(draw(1, 4, 2), 1, order=torch.tensor([[0, 1, 1, 3]]))
    with pytest.raises(ValueError, match=r"match_tokens: order must have shape \[1, 4\] of a batch"):
        match_tokens(draw(1, 4, 2), 1, order=torch.tensor([[0, 1, 2]]))


def test_the_released_functions():
    x = draw(2, 23, 6)
    merge, unmerge = tome.bipartite_soft_matching(x, 7, class_token=True, distill_token=True)
    assert torch.equal(merge(x), match_tokens(x, 7, protected=2).merge(x)) and unmerge(merge(x)).shape == x.shape
    assert torch.equal(merge(x)[:, :2], x[:, :2])
    for r in (0, -3):
        merge, unmerge = tome.bipartite_soft_matching(x, r)
        assert merge(x, mode="sum") is x and unmerge(x) is x
    tokens, size = x, None
    source = None
    for r in (6, 4):
        merge, _ = tome.bipartite_soft_matching(tokens, r, class_token=True)
        source = tome.merge_source(merge, tokens, source)
        tokens, size = tome.merge_wavg(merge, tokens, size)
    assert size.shape == (2, 13, 1) and torch.equal(size, source.sum(2, keepdim=True)) and torch.equal(source.sum(1), torch.ones(2, 23))
    torch.testing.assert_close(tokens, (source.double() @ x) / size.double())
    by_formula = tome.merge_wavg(lambda x, mode: match_tokens(tokens, 3).merge(x, mode=mode), tokens, size)
    torch.testing.assert_close(by_formula[0], match_tokens(tokens, 3).merge(tokens, size))

    merge, unmerge = tome.kth_bipartite_soft_matching(x, 4)
    unit = x[:, :20] / x[:, :20].norm(dim=2, keepdim=True)
    stays = torch.arange(20) % 4 == 3
    partner = (unit[:, ~stays] @ unit[:, stays].mT).argmax(2)
    for b in range(2):
        rows = [[i, *torch.arange(20)[~stays][partner[b] == t].tolist()] for t, i in enumerate(torch.arange(20)[stays].tolist())]
        torch.testing.assert_close(merge(x)[b], torch.stack([x[b, row].mean(0) for row in rows]))
    assert unmerge(merge(x)).shape == (2, 20, 6) and tome.merge_wavg(merge, x)[1].sum() == 40

    merge, unmerge = tome.random_bipartite_soft_matching(x, 9)
    assert merge(x).shape == (2, 14, 6) and unmerge(merge(x)).shape == x.shape
    torch.testing.assert_close(merge(x, mode="sum").sum(1), x.sum(1))
    with pytest.raises(ValueError, match="random_bipartite_soft_matching: r must be less than the number of tokens 23, got 23"):
        tome.random_bipartite_soft_matching(x, 23)
    assert tome.parse_r(12, (8, 1.0))[0] == 0 and tome.parse_r(12, (8, 1.0))[-1] == 16 and tome.parse_r(1, (8, -1.0)) == [8]


def test_energies_protect_what_is_alone():
    x = draw(2, 31, 6)
    unit = x / x.norm(dim=2, keepdim=True)
    cosine = unit @ unit.mT
    torch.testing.assert_close(token_energy(x, 0.4), torch.nn.functional.elu(cosine - 0.4).mean(2))
    torch.testing.assert_close(token_energy(x, 0.4, kernel="gaussian"), torch.distributions.Normal(1.0, 0.6).log_prob(cosine).exp().mean(2))
    for first in (0, 1):
        merge, unmerge = pitome.pitome_vision(x, ratio=0.7, margin=0.4, class_token=bool(first))
        N = 31 - first
        r = int(N - N * 0.7)
        energy = torch.nn.functional.elu(cosine[:, first:, first:] - 0.4).mean(2)
        ranked = energy.argsort(1, descending=True) + first
        want = []
        for b in range(2):
            sources, targets, stays = ranked[b, : 2 * r : 2], ranked[b, 1 : 2 * r : 2], ranked[b, 2 * r :]
            partner = cosine[b, sources][:, targets].argmax(1)
            rows = [*([i] for i in range(first)), *([i] for i in stays.tolist()), *([t, *sources[partner == n].tolist()] for n, t in enumerate(targets.tolist()))]
            want.append(torch.stack([x[b, row].mean(0) for row in rows]))
        torch.testing.assert_close(merge(x).sort(1)[0], torch.stack(want).sort(1)[0])
        torch.testing.assert_close(merge(x)[:, : 31 - 2 * r], torch.stack(want)[:, : 31 - 2 * r])  # class token, then the protected by falling energy
        assert unmerge(merge(x)).shape == x.shape
    assert pitome.pitome_text(x, ratio=0.6)[0](x).shape == (2, 31 - int(31 - 31 * 0.6), 6)
    merge, unmerge = pitome.pitome_vision(x, ratio=1.0)
    assert merge(x) is x and unmerge(x) is x
    spread = torch.eye(8, dtype=torch.float64).repeat(1, 1, 1)
    crowd = torch.cat([spread, spread[:, :1].expand(1, 8, 8)], 1)  # nine that are alike, seven that are alone
    merged = match_tokens(crowd, 4, order=energy_order(token_energy(crowd, 0.5), 4), protected=8)
    assert {i for row in rows_of(merged) if len(row) > 1 for i in row} <= {0, *range(8, 16)}
    with pytest.raises(ValueError, match=r"pitome: ratio must be above 0 and at most 1, got 1\.5"):
        pitome.pitome_vision(x, ratio=1.5)
    with pytest.raises(ValueError, match="energy_order: r must be a whole number from 0 to half of 31, got int 16"):
        energy_order(torch.zeros(1, 31), 16)
    with pytest.raises(ValueError, match="token_energy: margin must be a number below 1, got int 1"):
        token_energy(x, 1)


def test_one_token_of_every_cell():
    x = draw(2, 48, 5)
    merge, unmerge = tomesd.bipartite_soft_matching_random2d(x, 8, 6, 4, 3, 20, no_rand=True)
    stays = torch.tensor([y * 8 + c for y in (0, 3) for c in (0, 4)])
    assert merge(x).shape == (2, 28, 5) and unmerge(merge(x)).shape == x.shape
    match = match_tokens(x, 20, sources=44, order=torch.cat([torch.tensor([i for i in range(48) if i not in stays]), stays]).expand(2, -1))
    assert torch.equal(merge(x), match.merge(x)) and torch.equal(match.source()[:, stays], torch.arange(24, 28).expand(2, -1))
    draws = [tomesd.bipartite_soft_matching_random2d(x, 8, 6, 2, 2, 36, generator=torch.Generator().manual_seed(4))[0](x) for _ in range(2)]
    assert torch.equal(*draws) and draws[0].shape == (2, 12, 5)  # every source joins, one token a cell is left
    with pytest.raises(ValueError, match="metric must have h w = 42 tokens"):
        tomesd.bipartite_soft_matching_random2d(x, 7, 6, 2, 2, 3)
