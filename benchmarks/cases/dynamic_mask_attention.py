"""Dynamic masks against torch's fused attention with the mask and the scores as one matrix, which is made outside the timed call, and against its causal attention, which drops nothing. The floor:
torch.mm of the kept pairs, 4 N keep D in the forward and 10 N keep D in the backward, per head. The scores are whole numbers of thousandths, without a gradient: torch would
make it as a matrix."""

import torch
import torch.nn.functional as F

from modalign import bench, masks, ops
from modalign.ops.dynamic_mask_attention import _intervals

ROWS = 1024  # of the matrix that the reference has at a time

_made = {}


def _real(scores, like):
    return scores.to(like.dtype) / 1000


def _bias(scores, keep):
    """The matrix: scores of the kept keys, -inf elsewhere. Made when scores are first seen: that is before anything is timed."""
    key = (keep, scores.dtype, scores.cpu().numpy().tobytes())
    if key not in _made:
        _made.clear()  # 4 GB at N = 32768
        N = scores.shape[3]
        kept = masks.intervals(_intervals(scores[:, :, 0], N, keep, True, "causal"), N)
        matrix = torch.full((1, scores.shape[1], N, N), -torch.inf, dtype=scores.dtype, device=scores.device)
        for first in range(0, N, ROWS):
            rows = kept.rows(first, min(N, first + ROWS)).dense()
            matrix[:, :, first : first + ROWS] = torch.where(rows, scores, -torch.inf)
        _made[key] = matrix
    return _made[key]


def by_rows(query, key, value, scores, keep):
    """The definition, some queries at a time: the keys of each sorted by score and age."""
    scores, N, parts = _real(scores, query), query.shape[2], []
    for first in range(0, N, ROWS):
        stop = min(N, first + ROWS)
        seen = torch.ones(stop - first, stop, dtype=torch.bool, device=query.device).tril(first)
        chosen_from = scores[..., :stop].expand(1, scores.shape[1], stop - first, stop).masked_fill(~seen, -torch.inf)
        best = stop - 1 - chosen_from.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :keep]
        mask = torch.zeros_like(chosen_from, dtype=torch.bool).scatter(-1, best, True) & seen
        z = query[:, :, first:stop] @ key[:, :, :stop].mT / query.shape[-1] ** 0.5 + scores[..., :stop]
        parts.append(z.masked_fill(~mask, -torch.inf).softmax(-1) @ value[:, :, :stop])
    return torch.cat(parts, 2)


@bench.case(
    grid=[dict(H=1, N=8192, D=64, keep=512), dict(H=1, N=32768, D=64, keep=1024)],
    quick=[dict(H=2, N=300, D=16, keep=20)],
    flops=lambda p, pass_, size: (4 if pass_ == "fwd" else 10) * p["N"] * p["keep"] * p["D"] * p["H"],
    bytes=lambda p, pass_, size: size * (4 if pass_ == "fwd" else 9) * p["N"] * p["D"] * p["H"],
    reference=by_rows,
    rules={"keep from 1 to N": lambda p: 1 <= p["keep"] <= p["N"]},
)
def dynamic_mask_attention(maker, H, N, D, keep):
    return *(maker.randn(1, H, N, D) for _ in range(3)), (maker.randn(1, H, 1, N) * 1000).int(), keep


bench.ours(dynamic_mask_attention, runs="modalign::masked_attention")(lambda query, key, value, scores, keep: ops.dynamic_mask_attention(query, key, value, _real(scores, query), keep))


@bench.provider(dynamic_mask_attention, name="eager")
def with_a_matrix(query, key, value, scores, keep):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=_bias(_real(scores, query), keep))


bench.provider(dynamic_mask_attention, name="formula", kind="formula")(by_rows)


@bench.matmul_floor(dynamic_mask_attention)
def products(p, pass_):
    """Two of [N, D] x [D, keep] forward, five backward, for every head."""
    return [(p["N"], p["D"], p["keep"])] * ((2 if pass_ == "fwd" else 5) * p["H"])
