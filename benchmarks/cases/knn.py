"""Exact search, against the matrix of products and torch.topk in eager and compiled torch, and against faiss and scikit-learn. The floor: torch.mm of the same products, 2 N M D.

knn          20000 queries and points, D = 384, k = 10 and 100, by dot product
knn_sorted   the same with points sorted worst first: every one is better than all before it
"""

import torch

from modalign import bench, ops

ROWS = 4096  # what eager code takes at once


def topk_of_products(queries, points, k):
    """Chunks of queries, since the whole matrix would not fit where this is used."""
    return torch.cat([(chunk @ points.mT).topk(k).values for chunk in queries.split(ROWS)])


costs = dict(
    flops=lambda p, pass_, size: 2 * p["N"] * p["M"] * p["D"],
    bytes=lambda p, pass_, size: size * (p["N"] + p["M"]) * p["D"] + (size + 8) * p["N"] * p["k"],
    passes=["fwd"],
    reference=topk_of_products,
    rules={"k from 1 to M": lambda p: 1 <= p["k"] <= p["M"]},
)
SIZES = dict(N=20000, M=20000, D=384)


@bench.case(
    grid=[dict(**SIZES, k=k) for k in (10, 100)],
    quick=[dict(N=300, M=500, D=32, k=10)],
    targets=[bench.Target(0.85, where={"k": 10}), bench.Target(0.95, where={"k": 100})],
    **costs,
)
def knn(maker, N, M, D, k):
    return maker.unit(N, D), maker.unit(M, D), k


@bench.case(
    grid=[dict(**SIZES, k=k) for k in (10, 100)],
    quick=[dict(N=300, M=500, D=32, k=10)],
    targets=[bench.Target(0.85, where={"k": 10}), bench.Target(0.95, where={"k": 100})],
    **costs,
)
def knn_sorted(maker, N, M, D, k):
    """Points are one direction, ever longer, with some noise; queries lie near that direction."""
    direction = maker.unit(1, D).float()
    points = torch.arange(1, M + 1, device=direction.device)[:, None] / M * direction + 1e-4 * maker.unit(M, D).float()
    return (direction + 0.1 * maker.unit(N, D).float()).to(maker.dtype), points.to(maker.dtype), k


# ------------------------------------------------------------------------------------------------------------------------------------------ providers

searches = (knn, knn_sorted)

bench.provider(*searches, name="eager")(topk_of_products)
bench.compiled(*searches)(topk_of_products)


@bench.provider(*searches, name="faiss", requires="faiss", install="faiss-cpu")
def faiss_flat(queries, points, k):
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return torch.from_numpy(faiss.knn(queries.numpy(), points.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)[0])


@bench.provider(knn, name="scikit-learn", requires="sklearn", install="scikit-learn")   # it has no inner product; rows of `knn` have unit length
def brute_force(queries, points, k):
    from sklearn.neighbors import NearestNeighbors
    from threadpoolctl import threadpool_limits

    with threadpool_limits(torch.get_num_threads()):
        found = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="sqeuclidean").fit(points.numpy()).kneighbors(queries.numpy())[0]
    return 1 - torch.from_numpy(found).to(queries.dtype) / 2


bench.ours(*searches, runs="modalign::knn")(lambda queries, points, k: ops.knn(queries, points, k, metric="dot").values)


@bench.matmul_floor(*searches)
def products(p, pass_):
    """[N, D] x [D, M]."""
    return [(p["N"], p["D"], p["M"])]
