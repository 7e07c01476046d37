"""knn where points are not one tensor at hand: chunks, files, generators, batches, several processes. The same bits as one call; and CSLS, which asks twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modalign.ops import knn, target_rank
from modalign.ops.knn import METRICS
from modalign.testing import Maker, peak_memory
from ranks import run_ranks
from test_knn import whole_numbers

F64 = torch.float64
EVERY = (*METRICS, "csls")


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def options_for(metric, N, M, dtype=torch.float32):
    """Nothing, what is left out, and a bias where there can be one."""
    generator = torch.Generator().manual_seed(5)
    skip = torch.randint(-1, M, (N,), generator=generator)
    yield {"query_ids": skip, "exclude_labels": (torch.arange(N) % 7, torch.arange(M) % 7)}
    yield {} if metric in ("euclidean", "sqeuclidean", "csls") else {"bias": torch.randn(M, generator=generator).to(dtype)}


class Again:
    """Chunks that can be read more than once."""

    def __init__(self, chunks):
        self.chunks = chunks

    def __iter__(self):
        return iter(self.chunks)


# ---------------------------------------------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("metric", EVERY)
def test_seven_chunkings(metric, tmp_path, monkeypatch):
    """Random vectors far from the origin, so that the mean matters, with equal rows in different chunks."""
    monkeypatch.setattr("modalign.ops._knn_search.LEAST_ROWS", 64)
    monkeypatch.setattr("modalign.ops._knn_search.CENTER_BLOCK", 100)
    make = Maker(torch.float32, seed=1)
    points, queries = make.randn(1000, 17) + 5, make.randn(130, 17) + 5
    points[900:] = points[:100]
    file = np.memmap(tmp_path / "points", dtype=np.float32, mode="w+", shape=(1000, 17))
    file[:] = points.numpy()
    cuts = [1, 2, 64, 65, 500, 999]
    ragged = list(points.tensor_split(cuts))
    chunkings = [
        points.numpy(),
        file,
        Again(points.split(1)),
        Again(points.split(333)),
        [part.numpy() for part in points.split(100)],
        Again([points[:0], *ragged, points[:0]]),
        [points[:7], file[7:]],
    ]
    for options in options_for(metric, 130, 1000):
        for k in (1, 20, 150):
            expected = knn(queries, points, k, metric=metric, **options)
            assert same(knn(queries, points, k, metric=metric, workspace_bytes=0, **options), expected)
            for n, chunks in enumerate(chunkings if k == 20 else chunkings[-2:]):
                assert same(knn(queries, chunks, k, metric=metric, **options), expected), (n, k)
                assert same(knn(queries, chunks, k, metric=metric, workspace_bytes=200 * 17 * 8, **options), expected), (n, k)
    among = knn(points, k=999, metric=metric, exclude_self=True)
    assert same(knn(points, k=999, metric=metric, exclude_self=True, workspace_bytes=0), among)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F64])
def test_chunks_of_other_dtypes(dtype):
    points, queries = (whole_numbers(rows, 6, rows).to(dtype) for rows in (700, 40))
    for metric in EVERY:
        assert same(knn(queries, list(points.split(90)), 15, metric=metric), knn(queries, points, 15, metric=metric))


def test_an_iterator_is_read_once():
    points, queries = Maker(torch.float32, seed=2).randn(300, 5), Maker(torch.float32, seed=3).randn(9, 5)
    for options in ({}, {"metric": "dot"}, {"metric": "euclidean", "center": False}):
        assert same(knn(queries, (part for part in points.split(50)), 4, **options), knn(queries, points, 4, **options))
    with pytest.raises(ValueError, match="knn: points must be readable twice with center='auto', got an iterator"):
        knn(queries, iter(points.split(50)), 4, metric="euclidean")
    with pytest.raises(ValueError, match='knn: points must be readable twice with metric "csls", got an iterator'):
        knn(queries, iter(points.split(50)), 4, metric="csls")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (dict(points=[torch.ones(5, 3)]), ValueError, "knn: k must be from 1 to M = 5, the number of points, got 6"),
        (dict(points=[]), ValueError, "knn: k must be from 1 to M = 0, the number of points, got 6"),
        (dict(points=np.ones((5, 3), np.float32)), ValueError, "knn: k must be from 1 to M = 5"),
        (dict(points=[torch.ones(9, 4)]), ValueError, r"knn: points must be chunks \[rows, D\] with D = 3, got \[9, 4\]"),
        (dict(points=[torch.ones(9)]), ValueError, r"knn: points must be chunks \[rows, D\] with D = 3, got \[9\]"),
        (dict(points=[torch.ones(9, 3, dtype=F64)]), TypeError, "knn: points must have queries's dtype torch.float32 and device cpu, got a float64 tensor"),
        (dict(points=np.ones((9, 3))), TypeError, "knn: points must have queries's dtype torch.float32 and device cpu, got a float64 tensor"),
        (dict(points=["rows"]), TypeError, "knn: points must be an iterable of tensors or arrays .* got one that holds str 'rows'"),
        (dict(points="rows"), TypeError, "knn: points must be a tensor, an array or an iterable of chunks"),
        (dict(points=7), TypeError, "knn: points must be a tensor, an array or an iterable of chunks"),
        (dict(points=[torch.ones(9, 3)], bias=torch.ones(8)), ValueError, "knn: bias must have one entry for each point, got 8 for 9 points"),
        (dict(points=[torch.ones(9, 3)], bias=torch.ones(10)), ValueError, "knn: bias must have one entry for each point, got 10 for 9 points"),
        (dict(points=[torch.ones(9, 3)], exclude_labels=(torch.arange(4), torch.arange(8))), ValueError, r"knn: exclude_labels\[1\] must have one entry"),
        (dict(workspace_bytes=-1), ValueError, "knn: workspace_bytes must be 0 or more, got -1"),
        (dict(workspace_bytes=1.0), TypeError, "knn: workspace_bytes must be None or a whole number, got float 1.0"),
        (dict(exchange="mail"), ValueError, 'knn: exchange must be "gather" or "ring", got str'),
    ],
)
def test_chunks_refused(change, kind, message):
    given = dict(queries=torch.ones(4, 3), points=torch.ones(9, 3), k=6) | change
    with pytest.raises(kind, match=message):
        knn(given.pop("queries"), given.pop("points"), given.pop("k"), **given)


def probe(M):
    queries = Maker(torch.float32, seed=0).randn(700, 32)

    def search():
        generator = torch.Generator().manual_seed(0)
        knn(queries, (torch.randn(1000, 32, generator=generator) for _ in range(M // 1000)), 10, metric="dot", workspace_bytes=1 << 20)

    return search, lambda: knn(queries[:64], [queries[:600]], 10, metric="dot")


def test_memory_does_not_grow_with_the_points():
    small, large = (peak_memory("test_knn_layouts:probe", M=m).peak for m in (10_000, 80_000))
    assert large < 1.3 * small + (1 << 20)


# ---------------------------------------------------------------------------------------------------------------------------------------- csls


def csls(queries, points, k, own=False):
    """[N, M] in float64, from the formula."""
    x, y = (torch.nn.functional.normalize(each.to(F64), dim=1) for each in (queries, points))
    cosine = x @ y.T
    of_others = cosine.clone().fill_diagonal_(-torch.inf) if own else cosine
    return 2 * cosine - of_others.topk(k, dim=1).values.mean(1)[:, None] - of_others.topk(k, dim=0).values.mean(0)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("neighbors", [1, 10, 59])
def test_csls_is_its_formula(neighbors, own):
    make = Maker(F64, seed=8)
    queries = make.randn(60, 7)
    points = queries if own else make.randn(80, 7)
    score = csls(queries, points, neighbors, own)
    score = score.fill_diagonal_(-torch.inf) if own else score
    values, indices = score.sort(1, descending=True)
    found = knn(queries, None if own else points, 12, metric="csls", csls_neighbors=neighbors, exclude_self=own)
    assert torch.equal(found.indices, indices[:, :12])
    torch.testing.assert_close(found.values, values[:, :12])
    rank = target_rank(queries, None if own else points, indices[:, 5], metric="csls", csls_neighbors=neighbors, exclude_self=own)
    assert (rank == 5).all()


def test_csls_has_fewer_hubs():
    """A point in the middle is everyone's nearest by cosine; CSLS spreads the neighbours."""
    make = Maker(F64, seed=9)
    points = torch.cat([make.unit(200, 20), torch.ones(1, 20, dtype=F64)]) + torch.tensor([0.3] * 20, dtype=F64)
    queries = make.unit(200, 20) + 0.3
    hubs = [knn(queries, points, 1, metric=metric).indices.flatten().bincount(minlength=201).max() for metric in ("cosine", "csls")]
    assert hubs[1] < hubs[0] / 2


def test_csls_refuses_and_stays_finite():
    points = Maker(torch.float32, seed=10).randn(9, 3)
    with pytest.raises(ValueError, match="knn: csls_neighbors must be from 1 to 4, the fewer of queries and points, got 10"):
        knn(points[:4], points, 2, metric="csls")
    with pytest.raises(TypeError, match="knn: csls_neighbors must be a whole number, got float 2.0"):
        knn(points, k=2, metric="csls", csls_neighbors=2.0)
    with pytest.raises(ValueError, match="knn: bias must go with a similarity, got csls as metric"):
        knn(points, k=2, metric="csls", csls_neighbors=2, bias=torch.zeros(9))
    broken = points.clone()
    broken[3], broken[4] = torch.nan, 0
    found = knn(broken, k=8, metric="csls", csls_neighbors=8, exclude_self=True)
    kept = found.indices >= 0
    assert kept.sum(1).tolist() == [7, 7, 7, 0, 7, 7, 7, 7, 7] and not (found.indices == 3).any() and found.values[kept].isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("metric", EVERY)
@pytest.mark.parametrize("among", [True, False])
def test_padded_and_packed_items(metric, among):
    """Each item alone; padding is never a neighbour and has none."""
    make, k = Maker(torch.float32, seed=11), 6
    sizes, others = [9, 0, 4, 7], ([9, 0, 4, 7] if among else [5, 3, 0, 30])
    items = [make.randn(n, 5) for n in sizes], [make.randn(m, 5) for m in others]
    items = (items[0], items[0]) if among else items
    means = {"csls_neighbors": 1}
    lengths = torch.tensor(sizes) if among else (torch.tensor(sizes), torch.tensor(others))
    queries, points = (torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=torch.nan) for each in items)
    padded = knn(queries, None if among else points, k, metric=metric, lengths=lengths, exclude_self=among, **means)
    packed = knn(torch.cat(items[0]), None if among else torch.cat(items[1]), k, metric=metric, lengths=lengths, exclude_self=among, **means)
    assert padded.values.shape == padded.indices.shape == (4, 9, k) and packed.values.shape == (20, k)
    first = query = 0
    for b, (n, m) in enumerate(zip(sizes, others, strict=True)):
        most = min(k, m - among)
        if most > 0 and n > 0:
            alone = knn(items[0][b], None if among else items[1][b], most, metric=metric, exclude_self=among, **means)
            assert same((padded.values[b, :n, :most], padded.indices[b, :n, :most]), alone)
            assert same((packed.values[query : query + n, :most], packed.indices[query : query + n, :most] - first), alone)
        filled = padded.indices[b, :n, max(most, 0) :], packed.indices[query : query + n, max(most, 0) :], padded.indices[b, n:]
        assert all((part == -1).all() for part in filled)
        assert (padded.values[b, n:] == (torch.inf if "euclidean" in metric else -torch.inf)).all()
        first, query = first + m, query + n


def test_what_goes_with_the_rows_of_items():
    make = Maker(torch.float32, seed=12)
    queries, points, bias = make.randn(3, 4, 6), make.randn(3, 10, 6), make.randn(3, 10)
    ids, labels = torch.randint(-1, 10, (3, 4)), (torch.arange(12).view(3, 4) % 3, torch.arange(30).view(3, 10) % 3)
    alone = [knn(q, p, 5, bias=b, query_ids=i) for q, p, b, i in zip(queries, points, bias, ids, strict=True)]
    found = knn(queries, points, 5, bias=bias, query_ids=ids)
    assert same(found, [torch.stack(parts) for parts in zip(*alone, strict=True)])
    both = torch.tensor([4] * 3), torch.tensor([10] * 3)
    moved = torch.where(ids < 0, -1, ids + 10 * torch.arange(3)[:, None])
    packed = knn(queries.flatten(0, 1), points.flatten(0, 1), 5, lengths=both, bias=bias.flatten(), query_ids=moved.flatten())
    assert torch.equal(packed.indices, found.indices.flatten(0, 1) + 10 * torch.arange(3).repeat_interleave(4)[:, None])
    alone = [knn(q, p, 5, metric="dot", exclude_labels=(a, b)) for q, p, a, b in zip(queries, points, *labels, strict=True)]
    assert same(knn(queries, points, 5, metric="dot", exclude_labels=labels), [torch.stack(parts) for parts in zip(*alone, strict=True)])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (dict(points=torch.ones(9, 3)), ValueError, r"knn: points must be \[B, N, D\], or \[N, D\] with lengths"),
        (dict(points=torch.ones(3, 9, 3)), ValueError, "knn: queries and points must have as many items, got 2 and 3"),
        (dict(lengths=torch.ones(2)), TypeError, r"knn: lengths must be an int64 tensor \[B\], got a float32 tensor"),
        (dict(points=None, lengths=torch.tensor([4, 5])), ValueError, r"knn: lengths must be 2 numbers from 0 to 4, got \[4, 5\] for the queries"),
        (dict(queries=torch.ones(8, 3), points=None, lengths=torch.tensor([4, 5])), ValueError, r"knn: lengths must be 0 or more and add up to 8, got \[4, 5\]"),
        (dict(queries=torch.ones(8, 3), points=torch.ones(8, 3), lengths=torch.tensor([8])), TypeError, r"knn: lengths must be .* a pair of them with points"),
        (dict(bias=torch.ones(2, 8)), ValueError, r"knn: bias must have shape \[2, 9\], got a float32 tensor of shape \(2, 8\)"),
        (dict(workspace_bytes=1), ValueError, "knn: a batch must be of tensors in one process and without workspace_bytes"),
        (dict(k=0), ValueError, "knn: k must be from 1 to M"),
    ],
)
def test_batches_refused(change, kind, message):
    given = dict(queries=torch.ones(2, 4, 3), points=torch.ones(2, 9, 3), k=2) | change
    with pytest.raises(kind, match=message):
        knn(given.pop("queries"), given.pop("points"), given.pop("k"), **given)


# -------------------------------------------------------------------------------------------------------------------------------------- processes

QUERY_SIZES = {1: [23], 2: [0, 23], 3: [11, 5, 7]}
POINT_SIZES = {1: [600], 2: [237, 363], 3: [350, 0, 250]}


def problem():
    make = Maker(torch.float32, seed=13)
    queries, points = make.randn(23, 9) + 6, make.randn(600, 9) + 6
    points[500:] = points[:100]
    return queries, points


def searches(process_group=None, rank=0, world=1, exchange="gather"):
    """What one process finds alone, or each rank its part of it."""
    queries, points = problem()
    q, p = (sum(sizes[world][:rank]) for sizes in (QUERY_SIZES, POINT_SIZES))
    here, there = slice(q, q + QUERY_SIZES[world][rank]), slice(p, p + POINT_SIZES[world][rank])
    layout = {} if process_group is None else {"process_group": process_group, "exchange": exchange, "workspace_bytes": 0}
    found = {}
    for metric in EVERY:
        for n, options in enumerate(options_for(metric, 23, 600)):
            mine = {
                name: value[here] if name == "query_ids" else value[there] if name == "bias" else (value[0][here], value[1][there])
                for name, value in options.items()
            }
            for k in (1, 12, 300):
                found[metric, n, k] = knn(queries[here], points[there], k, metric=metric, **mine, **layout)
        if metric == "sqeuclidean":  # in double the order of the sums of the mean would show
            found["double"] = knn(queries[here].double() / 3, points[there].double() / 3, 12, metric=metric, **layout)
        found[metric, "among"] = knn(points[there], k=9, metric=metric, exclude_self=True, **layout)
    return found


def refusals(group):
    """One rank's mistake is everyone's error, so that nobody waits."""
    rank = torch.distributed.get_rank(group)
    queries, points = problem()
    for change, message in (
        (dict(k=3 + rank), "k must be the same on every rank, got another on rank 1"),
        (dict(metric="dot" if rank else "cosine"), "metric must be the same on every rank"),
        (dict(bias=torch.zeros(600) if rank else None), "bias must be the same on every rank"),
        (dict(k=1201), "k must be from 1 to M = 1200"),
    ):
        with pytest.raises(ValueError, match=f"knn: {message}"):
            knn(queries, points, **({"k": 3} | change), process_group=group)
    with pytest.raises(ValueError, match="knn: D must be the same on every rank"):
        knn(queries[:, : 8 + rank], points[:, : 8 + rank], 3, process_group=group)
    with pytest.raises((ValueError, TypeError), match="knn: query_ids must be an int64" if rank else "arguments must be valid on every rank, got a refusal on rank 1"):
        knn(queries, points, 3, query_ids=queries[:, 0] if rank else None, process_group=group)


def worker(rank, world):
    import torch.distributed as dist

    import modalign.ops._knn_search as search

    search.CENTER_BLOCK, search.LEAST_ROWS = 100, 64
    if world == 2:
        refusals(dist.group.WORLD)
    return {exchange: searches(dist.group.WORLD, rank, world, exchange) for exchange in ("gather", "ring")}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes(world, monkeypatch, tmp_path):
    monkeypatch.setattr("modalign.ops._knn_search.CENTER_BLOCK", 100)
    expected = searches()
    results = run_ranks(world, "test_knn_layouts:worker", str(tmp_path))
    for exchange in ("gather", "ring"):
        for case, whole in expected.items():
            sizes = (POINT_SIZES if "among" in case else QUERY_SIZES)[world]
            for found, *parts in zip((rank[exchange][case] for rank in results), *(part.split(sizes) for part in whole), strict=True):
                assert same(found, parts), (exchange, case)
