"""The contrastive losses, forward and backward, against the formulas people use, the same idea in eager and compiled torch, and the floor: torch.mm of
the same products, 2 B C m D forward and 6 B C m D backward.

gram_contrastive_loss      k = 3, 4, 5 at 2048 x 2048 x 512; 16384 rows by `modalign bench sweep`
triangle_contrastive_loss
clip_loss, siglip_loss     8192 x 8192 x 512
"""

import functools

import torch
import torch.nn.functional as F

from modalign import bench, ops
from modalign.ops.gram_volume import formula_gram_volume

TEMPERATURE, SCALE, BIAS = 0.07, 1 / 0.07, -10.0


# ------------------------------------------------------------------------------------------------------------------------------------------- formulas


def real(values):
    """Half types in float32."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def two_entropies(logits):
    at, logits = torch.arange(logits.shape[0], device=logits.device), real(logits)
    return (F.cross_entropy(logits, at, label_smoothing=0.1) + F.cross_entropy(logits.T, at, label_smoothing=0.1)) / 2


def volume_whitened(anchor, others):
    """From one product with orthonormalised candidates; what a careful user would write in torch."""
    stacked = torch.stack(others, -1)
    q, upper = torch.linalg.qr(real(stacked))
    scale = upper.diagonal(dim1=-2, dim2=-1).prod(-1).abs()
    coefficients = anchor @ q.to(anchor.dtype).mT.reshape(-1, anchor.shape[-1]).mT
    residual = (anchor * anchor).sum(-1, keepdim=True) - coefficients.unflatten(-1, (-1, len(others))).square().sum(-1)
    return scale * residual.clamp(min=1e-12).sqrt()


def gram_formula(anchor, others):
    return two_entropies(-formula_gram_volume(anchor, others) / TEMPERATURE)


def gram_whitened(anchor, others):
    return two_entropies(-volume_whitened(anchor, others) / TEMPERATURE)


def triangle_projected(anchor, u, v):
    base = u - v
    length = base.norm(dim=-1)
    normal = base / length.unsqueeze(-1)
    along = anchor @ normal.mT - (u * normal).sum(-1)
    height = (anchor * anchor).sum(-1, keepdim=True) + (u * u).sum(-1) - 2 * anchor @ u.mT - along.square()
    return two_entropies(-length / 2 * height.clamp(min=1e-12).sqrt() / TEMPERATURE)


def clip_formula(x, y):
    return two_entropies(SCALE * x @ y.mT)


def siglip_formula(x, y):
    """The signs as a matrix, as the published code has it."""
    logits = SCALE * x @ y.mT + BIAS
    signs = 2 * torch.eye(logits.shape[0], dtype=logits.dtype, device=logits.device) - 1
    return -real(F.logsigmoid(signs * logits)).sum() / logits.shape[0]


# ---------------------------------------------------------------------------------------------------------------------------------------------- cases


def products(p, pass_, size=None):
    return (2 if pass_ == "fwd" else 6) * p["B"] * p["B"] * (p["k"] - 1) * p["D"]


def vectors(p, pass_, size):
    return size * p["k"] * p["B"] * p["D"] * (1 if pass_ == "fwd" else 2)


costs = dict(flops=products, bytes=vectors)


def modalities(count):
    return {f"k = {count}": lambda p: p["k"] == count}


def draw(maker, B, D, k):
    """Unit rows, the modalities of a sample with something in common."""
    shared = maker.unit(B, D).float()

    def close():
        rows = shared + 1.5 * maker.unit(B, D).float()
        return (rows / rows.norm(dim=-1, keepdim=True)).to(maker.dtype)

    return [close() for _ in range(k)]


@bench.case(
    grid=[dict(B=2048, D=512, k=k) for k in (3, 4, 5)],
    quick=[dict(B=160, D=64, k=3)],
    reference=gram_whitened,
    rules={"k at least 2": lambda p: p["k"] >= 2, "D at least k": lambda p: p["D"] >= p["k"]},
    targets=[bench.Target(1.05, pass_="fwd+bwd", where={"k": k}) for k in (3, 4, 5)],
    **costs,
)
def gram_contrastive_loss(maker, B, D, k):
    anchor, *others = draw(maker, B, D, k)
    return anchor, others


@bench.case(grid=[dict(B=2048, D=512, k=3)], quick=[dict(B=160, D=64, k=3)], reference=triangle_projected, rules=modalities(3), **costs)
def triangle_contrastive_loss(maker, B, D, k):
    return tuple(draw(maker, B, D, k))


@bench.case(grid=[dict(B=8192, D=512, k=2)], quick=[dict(B=160, D=64, k=2)], reference=clip_formula, rules=modalities(2), targets=[bench.Target(1.1, pass_="fwd+bwd")], **costs)
def clip_loss(maker, B, D, k):
    return tuple(draw(maker, B, D, k))


@bench.case(grid=[dict(B=8192, D=512, k=2)], quick=[dict(B=160, D=64, k=2)], reference=siglip_formula, rules=modalities(2), targets=[bench.Target(1.1, pass_="fwd+bwd")], **costs)
def siglip_loss(maker, B, D, k):
    return tuple(draw(maker, B, D, k))


# ------------------------------------------------------------------------------------------------------------------------------------------ providers

bench.provider(gram_contrastive_loss, name="formula", kind="formula")(gram_formula)
for case, eager in (
    (gram_contrastive_loss, gram_whitened),
    (triangle_contrastive_loss, triangle_projected),
    (clip_loss, clip_formula),
    (siglip_loss, siglip_formula),
):
    bench.provider(case, name="eager")(eager)
    bench.compiled(case)(eager)

bench.ours(gram_contrastive_loss, runs="modalign::gram_contrastive_loss")(functools.partial(ops.gram_contrastive_loss, temperature=TEMPERATURE, label_smoothing=0.1))
bench.ours(triangle_contrastive_loss, runs="modalign::triangle_contrastive_loss")(functools.partial(ops.triangle_contrastive_loss, temperature=TEMPERATURE, label_smoothing=0.1))
bench.ours(clip_loss, runs="modalign::clip_loss")(functools.partial(ops.clip_loss, logit_scale=SCALE, label_smoothing=0.1))
bench.ours(siglip_loss, runs="modalign::siglip_loss")(functools.partial(ops.siglip_loss, logit_scale=SCALE, logit_bias=BIAS))


@bench.matmul_floor(gram_contrastive_loss, triangle_contrastive_loss, clip_loss, siglip_loss)
def tiles(p, pass_):
    """[B, D] x [D, m B]; backward the same again, then T X and T^t A."""
    B, D, columns = p["B"], p["D"], (p["k"] - 1) * p["B"]
    return [(B, D, columns)] if pass_ == "fwd" else [(B, D, columns), (B, columns, D), (columns, B, D)]
