"""One step of token merging, matching and weighted means, against the usual code with index_add and with scatter_reduce (releases of torch have been slow at one or the other: the JSON names
the version), and the floor: one copy of as many bytes.

merge_tokens   B items of N tokens with C channels, compared by D features, r merged: a ViT-L at 336 pixels, in a batch and alone; a ViT-S; a long sequence
"""

import torch

from modalign import bench, ops
from modalign.ops.merge_tokens import formula_merge_tokens, formula_merge_tokens_by_scatter, reference_merge_tokens


def flops(p, pass_, size):
    """Products of sources and destinations; what is moved does not count."""
    return p["B"] * p["N"] ** 2 // 2 * p["D"] if pass_ == "fwd" else 0


@bench.case(
    grid=[dict(B=8, N=577, C=1024, D=64, r=24), dict(B=1, N=577, C=1024, D=64, r=24), dict(B=64, N=197, C=384, D=64, r=13), dict(B=1, N=4096, C=1024, D=64, r=1024)],
    quick=[dict(B=2, N=37, C=64, D=16, r=9)],
    reference=lambda x, features, size, r: reference_merge_tokens(x, features, r, size=size).tokens,
    flops=flops,
)
def merge_tokens(maker, B, N, C, D, r):
    return maker.randn(B, N, C), maker.randn(B, N, D), maker.place(torch.arange(B * N).reshape(B, N) % 3 + 1.0), r


# ------------------------------------------------------------------------------------------------------------------------------------------ providers


bench.provider(merge_tokens, name="index_add")(lambda x, features, size, r: formula_merge_tokens(x, features, r, size=size).tokens)
bench.provider(merge_tokens, name="scatter_reduce")(lambda x, features, size, r: formula_merge_tokens_by_scatter(x, features, r, size=size).tokens)
bench.ours(merge_tokens, runs="modalign::match_tokens")(lambda x, features, size, r: ops.merge_tokens(x, features, r, size=size).tokens)


@bench.copy_floor(merge_tokens)
def tokens_once(p, pass_, size):
    """Tokens in and out; backward their gradients."""
    return size * p["B"] * (2 * p["N"] - p["r"]) * p["C"]
