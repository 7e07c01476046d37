"""Attention under masks, against torch's fused attention with the mask as a matrix, and FlexAttention, which has no backward on the CPU and therefore cases of its own. The floor: torch.mm
of the kept pairs, 4 N^2 D kept in the forward and 10 N^2 D kept in the backward, per head.

masked_attention         a share of the tiles of 96 x 96 kept, drawn at random; 1: no mask
masked_attention_ragged  a sliding window, both ways, that keeps the share of pairs: most tiles at its edges are kept in part
masked_attention_causal  causal
masked_attention_flex, masked_attention_flex_ragged    the first two, forward alone
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex

from modalign import bench, masks, ops

TILE = 96


_made = {}


def _once(what, mask, make):
    """What a mask becomes elsewhere, made when its like is first seen: that is before anything is timed, though every set of inputs has a mask of its own."""
    key = (what, mask.queries, mask.keys, mask.steps, *(each.cpu().numpy().tobytes() for each in mask.tensors))
    if key not in _made:
        if len(_made) > 8:
            _made.clear()
        _made[key] = make()
    return _made[key]


def _matrix(mask):
    return _once("matrix", mask, mask.dense)


def by_matrix(query, key, value, mask):
    """The mask as a matrix, as is usual; queries that keep nothing give 0."""
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value)
    dense = _matrix(mask)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=dense)
    return out if query.dtype is torch.float32 else out.masked_fill(~dense.any(-1, keepdim=True), 0)


def operands(maker, H, N, D):
    return tuple(maker.randn(1, H, N, D) for _ in range(3))


def pairs(p):
    """Per head."""
    return p["N"] ** 2 * p["kept"]


costs = dict(
    flops=lambda p, pass_, size: (4 if pass_ == "fwd" else 10) * pairs(p) * p["D"] * p["H"],
    bytes=lambda p, pass_, size: size * (4 if pass_ == "fwd" else 9) * p["N"] * p["D"] * p["H"],
    reference=by_matrix,
    rules={"kept from 0 to 1": lambda p: 0 < p["kept"] <= 1},
)
SIZES = dict(H=8, N=4096, D=64)
SHARES = (1.0, 0.5, 0.25, 0.1, 0.05)
QUICK = [dict(H=2, N=300, D=16, kept=0.5)]


@bench.case(grid=[dict(**SIZES, kept=kept) for kept in SHARES], quick=QUICK, **costs)
def masked_attention(maker, H, N, D, kept):
    tiles = -(-N // TILE)
    keep = torch.zeros(tiles**2, dtype=torch.bool)
    keep[torch.randperm(tiles**2, generator=torch.Generator().manual_seed(0))[: round(kept * tiles**2)]] = True
    keep = keep.view(tiles, tiles)
    return *operands(maker, H, N, D), None if kept == 1 else masks.blocks(keep.to(maker.device), TILE, N)


def window(N, kept):
    """A width either way such that the share of kept pairs of N x N is as asked."""
    return max(1, round(N * (1 - (1 - kept) ** 0.5)))


@bench.case(grid=[dict(**SIZES, kept=kept) for kept in SHARES[1:]], quick=QUICK, **costs)
def masked_attention_ragged(maker, H, N, D, kept):
    place, width = torch.arange(N, dtype=torch.int32, device=maker.device), window(N, kept)
    return *operands(maker, H, N, D), masks.intervals(torch.stack([(place - width + 1).clamp(min=0), (place + width).clamp(max=N)], -1), N)


@bench.case(grid=[dict(**SIZES, kept=0.5)], quick=QUICK, **costs)
def masked_attention_causal(maker, H, N, D, kept):
    return *operands(maker, H, N, D), masks.causal(N, device=maker.device)


@bench.case(grid=[dict(**SIZES, kept=kept) for kept in SHARES], quick=QUICK, passes=["fwd"], **costs)
def masked_attention_flex(maker, H, N, D, kept):
    return masked_attention.make(maker, H, N, D, kept)


@bench.case(grid=[dict(**SIZES, kept=kept) for kept in SHARES[1:]], quick=QUICK, passes=["fwd"], **costs)
def masked_attention_flex_ragged(maker, H, N, D, kept):
    return masked_attention_ragged.make(maker, H, N, D, kept)


# ------------------------------------------------------------------------------------------------------------------------------------------ providers

both = (masked_attention, masked_attention_ragged, masked_attention_causal, masked_attention_flex, masked_attention_flex_ragged)

bench.ours(*both, runs="modalign::masked_attention")(lambda query, key, value, mask: ops.masked_attention(query, key, value, mask))
bench.provider(*both, name="eager")(by_matrix)


@bench.provider(*both, name="formula", kind="formula")
def formula(query, key, value, mask):
    """The matrix of scores."""
    z = query @ key.mT / query.shape[-1] ** 0.5
    if mask is not None:
        z = z.masked_fill(~_matrix(mask), -torch.inf)
    return z.softmax(-1).nan_to_num(0) @ value


bench.provider(masked_attention_causal, name="torch causal")(lambda query, key, value, mask: F.scaled_dot_product_attention(query, key, value, is_causal=True))

_flex = torch.compile(flex.flex_attention)


@bench.provider(masked_attention_flex, masked_attention_flex_ragged, name="FlexAttention", compiled=True)
def flex_attention(query, key, value, mask):
    return _flex(query.detach(), key.detach(), value.detach(), block_mask=None if mask is None else _block_mask(mask))


def _block_mask(mask):
    def make():
        dense = mask.dense()[0, 0]
        return flex.create_block_mask(lambda b, h, i, j: dense[i, j], None, None, mask.queries, mask.keys, device=dense.device)

    return _once("block mask", mask, make)


@bench.matmul_floor(*both)
def products(p, pass_):
    """Two of [N, D] x [D, kept N] forward, five backward, for every head: those with values too, whose operand of N kept N numbers for every set of inputs would not fit."""
    return [(p["N"], p["D"], max(1, round(p["N"] * p["kept"])))] * ((2 if pass_ == "fwd" else 5) * p["H"])
