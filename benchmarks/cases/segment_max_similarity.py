"""The largest product of every segment of rows with every candidate, against the matrix of products with a scatter of its maxima and with a loop over
segments, and the floor: torch.mm of the same products, 2 S L A D forward and 4 S A D backward.

segment_max_similarity   S segments of L rows on average: 64 images of 196 patches and 1024 tokens; 2048 images of 8 regions and 512 attributes
"""

import torch

from modalign import bench, ops
from modalign.ops.segment_max_similarity import formula_segment_max_similarity


def loop(x, offsets, y):
    """The matrix of products, cut into segments."""
    return torch.stack([part.max(0).values for part in (x @ y.mT).split(offsets.diff().tolist())])


def flops(p, pass_, size):
    return 2 * p["S"] * p["L"] * p["A"] * p["D"] if pass_ == "fwd" else 4 * p["S"] * p["A"] * p["D"]


def traffic(p, pass_, size):
    """Rows and candidates, and what is chosen; backward also their gradients."""
    return size * (p["S"] * p["L"] + p["A"]) * p["D"] * (1 if pass_ == "fwd" else 2) + (size + 8) * p["S"] * p["A"]


@bench.case(
    grid=[dict(S=64, L=196, A=1024, D=512), dict(S=2048, L=8, A=512, D=512)],
    quick=[dict(S=9, L=22, A=70, D=64)],
    reference=loop,
    flops=flops,
    bytes=traffic,
)
def segment_max_similarity(maker, S, L, A, D):
    """Lengths grow and fall around L, between a fifth and nine fifths of it."""
    weights = 1 + 0.8 * torch.sin(torch.arange(S, dtype=torch.float64))
    ends = (weights.cumsum(0) / weights.sum() * S * L).round().long()
    return maker.unit(S * L, D), torch.cat([ends.new_zeros(1), ends]).to(maker.device), maker.unit(A, D)


# ------------------------------------------------------------------------------------------------------------------------------------------ providers


bench.provider(segment_max_similarity, name="formula", kind="formula")(lambda x, offsets, y: formula_segment_max_similarity(x, offsets, y).values)
bench.provider(segment_max_similarity, name="eager")(loop)
bench.ours(segment_max_similarity, runs="modalign::segment_max_similarity")(lambda x, offsets, y: ops.segment_max_similarity(x, offsets, y).values)


@bench.matmul_floor(segment_max_similarity)
def tiles(p, pass_):
    """[S L, D] x [D, A]; backward a row of D added twice for every segment and candidate."""
    S, L, A, D = (p[name] for name in "SLAD")
    return [(S * L, D, A)] if pass_ == "fwd" else [(S, D, A), (S, A, D)]
