"""Search by volume, against the matrix of volumes and torch.topk: in eager and compiled torch, and from our own gram_volume. The floor: torch.mm of the
same products, 2 B C m D.

gram_topk   512 anchors, 8192 tuples of three modalities in all, k = 10
"""

import torch

from modalign import bench, ops


def whitened(anchor, others):
    """Volumes from one product with orthonormalised candidates; what a careful user would write in torch."""
    stacked = torch.stack(others, -1)
    q, upper = torch.linalg.qr(stacked if stacked.dtype in (torch.float32, torch.float64) else stacked.float())
    scale = upper.diagonal(dim1=-2, dim2=-1).prod(-1).abs().to(anchor.dtype)
    coefficients = anchor @ q.to(anchor.dtype).mT.reshape(-1, anchor.shape[-1]).mT
    residual = (anchor * anchor).sum(-1, keepdim=True) - coefficients.unflatten(-1, (-1, len(others))).square().sum(-1)
    return scale * residual.clamp(min=0).sqrt()


def topk_of_matrix(anchor, others, k):
    return whitened(anchor, others).topk(k, largest=False).values


@bench.case(
    grid=[dict(B=512, C=8192, D=512, m=2, k=10)],
    quick=[dict(B=100, C=300, D=64, m=2, k=10)],
    reference=topk_of_matrix,
    rules={"k from 1 to C": lambda p: 1 <= p["k"] <= p["C"], "m at least 1": lambda p: p["m"] >= 1, "D above m": lambda p: p["D"] > p["m"]},
    flops=lambda p, pass_, size: 2 * p["B"] * p["C"] * p["m"] * p["D"],
    bytes=lambda p, pass_, size: size * (p["B"] + p["m"] * p["C"]) * p["D"] + (size + 8) * p["B"] * p["k"],
    passes=["fwd"],
)
def gram_topk(maker, B, C, D, m, k):
    return maker.unit(B, D), [maker.unit(C, D) for _ in range(m)], k


bench.provider(gram_topk, name="eager")(topk_of_matrix)
bench.compiled(gram_topk)(topk_of_matrix)


@bench.provider(gram_topk, name="gram_volume and torch.topk", kind="ours", runs="modalign::gram_volume")
def topk_of_our_matrix(anchor, others, k):
    return ops.gram_volume(anchor, others).topk(k, largest=False).values


@bench.provider(gram_topk, name="ours", kind="ours", runs="modalign::gram_volume")
def selected(anchor, others, k):
    return ops.gram_topk(anchor, others, k).values


@bench.matmul_floor(gram_topk)
def products(p, pass_):
    """[B, D] x [D, m C]."""
    return [(p["B"], p["D"], p["m"] * p["C"])]
