"""select_diverse: the greedy definition by brute force, prefixes, ties, duplicates, broken tokens, warm starts, bits, memory, and what greedy max-min promises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modalign import _load, info
from modalign.ops import select_diverse
from modalign.ops.select_diverse import reference_select_diverse
from modalign.testing import peak_memory


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(features: Tensor, n: int, start: list[int]) -> list[int]:
    """The text of the paper, for one item in plain Python; equal distances: the lower index."""
    rows = features.tolist()
    lengths = [math.sqrt(math.fsum(x * x for x in row)) for row in rows]

    def distance(i: int, j: int) -> float:
        return 1 - math.fsum(x * y for x, y in zip(rows[i], rows[j], strict=True)) / (lengths[i] * lengths[j]) if lengths[i] * lengths[j] > 0 else 1.0

    taken = start[:n]
    N = len(rows)
    while len(taken) < n:
        among = taken or None
        taken = [*taken, max((i for i in range(N) if i not in taken), key=lambda i: (min((distance(i, j) for j in (among or range(N)) if j != i), default=math.inf), -i))]
    return taken


@pytest.mark.parametrize("workspace", [None, 0])
def test_the_greedy_definition(workspace):
    generator = torch.Generator().manual_seed(5)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for trial in range(120):
        B, N, D = number(1, 4), number(1, (8, 30)[trial % 2]), number(2, 40)
        n, starts = number(0, N + 1), number(0, 3) if trial % 3 == 0 else 0
        features = draw(B, N, D, seed=trial)
        start = torch.stack([torch.randperm(N, generator=generator)[: min(starts, n)] for _ in range(B)])
        found = select_diverse(features.float() if trial % 4 else features, n, start=start if start.shape[1] else None, workspace_bytes=workspace)
        assert found.indices.tolist() == [by_definition(item, n, chosen) for item, chosen in zip(features, start.tolist(), strict=True)], (trial, B, N, D, n, starts)


def test_larger_sizes_ragged_batches_and_half_types():
    for trial in range(40):
        B, N, D, n = 3, 60 + 37 * trial % 700, 5 + trial % 50, 1 + trial % 40
        features = draw(B, N, D, seed=trial)
        lengths = torch.randint(n, N + 1, (B,), generator=torch.Generator().manual_seed(trial)) if trial % 2 else None
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            given = features.to(dtype)
            want = reference_select_diverse(given.double(), n, lengths=lengths)
            found = select_diverse(given, n, lengths=lengths)
            assert torch.equal(found.indices, want.indices), (trial, dtype)
            torch.testing.assert_close(found.radii.double(), want.radii, rtol=1e-5, atol=1e-5)
            assert found.radii.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        if lengths is not None:
            alone = [select_diverse(features[b : b + 1, : lengths[b]], n) for b in range(B)]
            whole = select_diverse(features, n, lengths=lengths)
            assert torch.equal(whole.indices, torch.cat([one.indices for one in alone])) and torch.equal(whole.radii, torch.cat([one.radii for one in alone]))


def test_prefixes_radii_and_scale():
    features = draw(2, 90, 12)
    found = select_diverse(features, 90)
    assert torch.equal(found.indices.sort(1)[0], torch.arange(90).expand(2, -1))
    assert (found.radii.diff(dim=1)[:, 1:] <= 0).all() and (found.radii[:, 0] == torch.inf).all()
    for n in (0, 1, 7, 40):
        assert torch.equal(select_diverse(features, n).indices, found.indices[:, :n])
    scaled = features * torch.rand(2, 90, 1, dtype=torch.float64).add(0.1)
    assert torch.equal(select_diverse(scaled, 30).indices, found.indices[:, :30])
    for scale in (1e-30, 1e30):
        assert torch.equal(select_diverse((features * scale).float(), 30).indices, found.indices[:, :30])
    again = select_diverse(features, 30, start=found.indices[:, :11])
    assert torch.equal(again.indices, found.indices[:, :30]) and torch.equal(again.radii, found.radii[:, :30])


def test_within_a_factor_of_two_of_the_best():
    """Greedy max-min is a 2-approximation in the metric of chords, whose square is twice d."""
    for seed in range(20):
        features = draw(1, 11, 3, seed=seed)
        unit = features[0] / features[0].norm(dim=1, keepdim=True)
        chord = (2 - 2 * unit @ unit.T).clamp(min=0).sqrt()
        for n in (2, 3, 4):
            least = [min(chord[i, j] for i, j in itertools.combinations(some, 2)) for some in itertools.combinations(range(11), n)]
            mine = select_diverse(features, n).indices[0].tolist()
            assert min(chord[i, j] for i, j in itertools.combinations(mine, 2)) >= max(least) / 2 - 1e-9


def test_duplicates_zeros_and_what_is_not_finite():
    points = draw(1, 13, 6).repeat_interleave(3, 1)
    found = select_diverse(points, 39)
    assert torch.equal(found.indices[0].sort()[0], torch.arange(39)) and (found.indices[0, :13] % 3 == 0).all()  # each once, the first of its like
    assert (found.radii[0, 13:] < 1e-12).all() and (found.radii[0, 13:] >= 0).all()
    features = draw(1, 20, 4)
    features[0, [3, 8]] = 0
    assert select_diverse(features, 20).indices.tolist() == [by_definition(features[0], 20, [])]
    features[0, 5, 1], features[0, 11, 0] = torch.nan, torch.inf
    found = select_diverse(features, 20)
    assert found.indices[0, -2:].tolist() == [5, 11] and found.radii[0, -2:].isnan().all() and found.radii[0, :-2].isnan().sum() == 0
    rest = [i for i in range(20) if i not in (5, 11)]
    assert [rest[i] for i in by_definition(features[0, rest], 18, [])] == found.indices[0, :18].tolist()
    assert select_diverse(torch.full((2, 4, 3), torch.nan), 4).indices.tolist() == [[0, 1, 2, 3]] * 2
    assert select_diverse(torch.ones(1, 1, 3), 1).indices.tolist() == [[0]]
    assert select_diverse(torch.ones(0, 5, 3), 2).indices.shape == (0, 2) and select_diverse(torch.ones(2, 0, 3), 0).radii.shape == (2, 0)


def test_ties_go_to_the_lower_index():
    for seed in range(30):
        features = 2 * torch.randint(0, 2, (2, 40, 3 + seed % 6), generator=torch.Generator().manual_seed(seed)).double() - 1  # of one length: products are exact
        for given in (features, features.float(), features.half()):
            assert torch.equal(select_diverse(given, 25).indices, reference_select_diverse(features, 25).indices)


def test_bits_do_not_depend_on_threads_and_choices_not_on_instruction_sets():
    features = draw(2, 1500, 40).float()
    want = select_diverse(features, 120)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = select_diverse(features, 120)
            assert torch.equal(found.indices, want.indices) and torch.equal(found.radii, want.radii)
    finally:
        torch.set_num_threads(before)
    for name in info.collect()["instruction_sets"]["ran_here"]:
        with _load.use_instruction_set(name):
            assert torch.equal(select_diverse(features, 120).indices, want.indices), name
    assert torch.equal(select_diverse(features, 120, workspace_bytes=0).indices, want.indices)
    assert torch.equal(select_diverse(features.mT.contiguous().mT[:, :, ::2], 30).indices, select_diverse(features[:, :, ::2].contiguous(), 30).indices)


def probe(N: int) -> tuple[Callable[[], object], Callable[[], object]]:
    features = torch.randn(1, N, 32)
    return lambda: select_diverse(features, 40, workspace_bytes=0), lambda: select_diverse(features[:, :40], 4)


def test_nothing_n_times_n_is_stored():
    small, large = (peak_memory("test_select_diverse:probe", N=N).peak for N in (8192, 16384))
    assert large < 2.5 * small and large < 16384 * 16384 * 4 / 16


def test_it_compiles_and_batches():
    features = draw(3, 2, 30, 8).float()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: select_diverse(x, 7).indices, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(features[0]), select_diverse(features[0], 7).indices)
    many = torch.vmap(lambda x: select_diverse(x, 7).indices)(features)
    assert torch.equal(many, torch.stack([select_diverse(one, 7).indices for one in features]))
    torch.library.opcheck(torch.ops.modalign.select_diverse.default, (features[0], torch.tensor([30, 12]), torch.tensor([[1], [2]]), 5, 0))


def test_bad_arguments():
    features = draw(2, 6, 3)
    for call, error, message in (
        (lambda: select_diverse(features, 7), ValueError, "n must be from 0 to N = 6, got 7"),
        (lambda: select_diverse(features, 2.0), TypeError, r"n must be a whole number, got float 2\.0"),
        (lambda: select_diverse(features[0], 2), ValueError, r"features must have"),
        (lambda: select_diverse(features.long(), 2), TypeError, "features must be float16, bfloat16, float32 or float64"),
        (lambda: select_diverse(features, 2, lengths=torch.tensor([6, 6, 6])), ValueError, r"lengths must have shape \[2\]"),
        (lambda: select_diverse(features, 2, start=torch.tensor([1.0, 2.0])), TypeError, "start must be an int64 tensor"),
        (lambda: select_diverse(features, 1, start=torch.tensor([[1, 2], [1, 2]])), ValueError, "start must have at most n = 1 tokens, got 2"),
        (lambda: select_diverse(features, 3, lengths=torch.tensor([2, 6])), RuntimeError, "lengths must be from n = 3 to N = 6, got 2 of item 0"),
        (lambda: select_diverse(features, 3, start=torch.tensor([[1, 2], [3, 3]])), RuntimeError, "start must hold different tokens below 6, got 3 of item 1"),
        (lambda: select_diverse(features, 3, start=torch.tensor([0, 6])), RuntimeError, "start must hold different tokens below 6, got 6 of item 1"),
        (lambda: select_diverse(features, 3, workspace_bytes=-1), ValueError, "workspace_bytes must be None or a whole number of 0 or more"),
    ):
        with pytest.raises(error, match=f"select_diverse: {message}"):
            call()
