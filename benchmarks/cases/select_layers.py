"""Mutual nearest neighbours of all pairs of layers of two encoders, against an evaluation of every pair on its own.

select_layers       12 x 6 layers, n items, D = 384, k by Rice's rule: 18 searches do the work of 144. By pairs with our own search ("pairs", at most 8 times as long) and with torch ("pairs, torch.topk")
select_layers_few   3 x 2 layers, beside the usual code too, which sorts both matrices of similarities for every pair and compares masks
"""

import torch

from modalign import bench, metrics


def by_pairs(source, aligned):
    """Both searches for every pair."""
    return torch.tensor([[float(metrics.mutual_knn(a, b, "rice")) for b in aligned] for a in source], device=source[0].device)


def by_topk(source, aligned):
    """For every pair both matrices of similarities and torch.topk."""
    n = len(source[0])
    k = metrics._neighbors.neighbor_count("select_layers", "rice", n)

    def chosen(x):
        x = torch.nn.functional.normalize(x, dim=1)
        return (x @ x.mT).fill_diagonal_(-torch.inf).topk(k).indices

    rows = [[(chosen(a)[:, :, None] == chosen(b)[:, None]).sum() / (n * k) for b in aligned] for a in source]
    return torch.tensor(rows, device=source[0].device)


def by_masks(source, aligned):
    """The usual code: for every pair both matrices of similarities, sorted, as masks."""
    n = len(source[0])
    k, rows = metrics._neighbors.neighbor_count("select_layers", "rice", n), []
    for a in source:
        rows.append([])
        for b in aligned:
            masks = []
            for x in (a, b):
                x = torch.nn.functional.normalize(x, dim=1)
                chosen = (x @ x.mT).fill_diagonal_(-torch.inf).argsort(dim=1, descending=True)[:, :k]
                masks.append(torch.zeros(n, n, device=x.device).scatter_(1, chosen, 1.0))
            rows[-1].append((masks[0] * masks[1]).sum() / (n * k))
    return torch.tensor(rows, device=source[0].device)


costs = dict(
    reference=by_pairs,
    flops=lambda p, pass_, size: 2 * p["n"] ** 2 * p["D"] * (p["L1"] + p["L2"]),
    bytes=lambda p, pass_, size: size * p["n"] * p["D"] * (p["L1"] + p["L2"]),
    passes=["fwd"],
    rules={"n of 5 or more": lambda p: p["n"] >= 5},
)


def layers(maker, n, D, L1, L2):
    shared = maker.randn(n, D)
    return tuple([shared + (layer + 1) * maker.randn(n, D) for layer in range(count)] for count in (L1, L2))


@bench.case(grid=[dict(n=5000, D=384, L1=12, L2=6)], quick=[dict(n=60, D=16, L1=3, L2=2)], **costs)
def select_layers(maker, n, D, L1, L2):
    return layers(maker, n, D, L1, L2)


@bench.case(grid=[dict(n=5000, D=384, L1=3, L2=2)], quick=[dict(n=60, D=16, L1=3, L2=2)], **costs)
def select_layers_few(maker, n, D, L1, L2):
    return layers(maker, n, D, L1, L2)


# ------------------------------------------------------------------------------------------------------------------------------------------ providers

both = (select_layers, select_layers_few)

bench.provider(*both, name="pairs")(by_pairs)
bench.provider(*both, name="pairs, torch.topk")(by_topk)
bench.provider(select_layers_few, name="masks")(by_masks)
bench.ours(*both, runs="modalign::knn")(lambda source, aligned: metrics.select_layers(source, aligned).scores.to(source[0].dtype))


@bench.matmul_floor(*both)
def products(p, pass_):
    """[n, D] x [D, n] for every layer."""
    return [(p["n"], p["D"], p["n"])] * (p["L1"] + p["L2"])
