"""The Gramian volume family against the determinant formula, the same idea in eager and compiled torch, and the floor: torch.mm of the same products.

gram_volume            k = 3, 4, 5, and k = 2: the tile engine with its square-sum epilogue at 2048 x 2048 x 512
gram_volume_near_zero  0, 1 and 100 % of the pairs nearly collinear, so recomputed from their vectors
triangle_area, paired_gram_volume
"""

import torch

from modalign import bench, ops

# ------------------------------------------------------------------------------------------------------------------------------------------- formulas


def formula(anchor, others):
    """The determinant as people write it: every k x k Gram matrix, det, abs, sqrt."""
    vectors = [anchor, *others]
    k, shape = len(vectors), (anchor.shape[0], others[0].shape[0])
    entries = [[None] * k for _ in range(k)]
    for p in range(k):
        for q in range(p, k):
            if p == 0:
                entry = (anchor * anchor).sum(-1, keepdim=True).expand(shape) if q == 0 else anchor @ vectors[q].mT
            else:
                entry = (vectors[p] * vectors[q]).sum(-1).expand(shape)
            entries[p][q] = entries[q][p] = entry
    gram = torch.stack([torch.stack(row, -1) for row in entries], -2)
    return torch.det(gram if gram.dtype in (torch.float32, torch.float64) else gram.float()).abs().sqrt().to(anchor.dtype)


def whitened(anchor, others):
    """The same volume from one product with orthonormalised candidates; what a careful user would write in torch."""
    m = len(others)
    stacked = torch.stack(others, -1)
    q, upper = torch.linalg.qr(stacked if stacked.dtype in (torch.float32, torch.float64) else stacked.float())
    scale = upper.diagonal(dim1=-2, dim2=-1).prod(-1).abs().to(anchor.dtype)
    coefficients = anchor @ q.to(anchor.dtype).mT.reshape(-1, anchor.shape[-1]).mT
    residual = (anchor * anchor).sum(-1, keepdim=True) - coefficients.unflatten(-1, (-1, m)).square().sum(-1)
    return scale * residual.clamp(min=0).sqrt()


def triangle_formula(anchor, u, v):
    """Both edges from the anchor for every pair, [B, C, D] twice."""
    p, q = anchor.unsqueeze(-2) - v, anchor.unsqueeze(-2) - u
    return ((p * p).sum(-1) * (q * q).sum(-1) - (p * q).sum(-1) ** 2).clamp(min=0).sqrt() / 2


def triangle_projected(anchor, u, v):
    """Base times height from two products."""
    base = u - v
    length = base.norm(dim=-1)
    normal = base / length.unsqueeze(-1)
    along = anchor @ normal.mT - (u * normal).sum(-1)
    height = (anchor * anchor).sum(-1, keepdim=True) + (u * u).sum(-1) - 2 * anchor @ u.mT - along.square()
    return length / 2 * height.clamp(min=0).sqrt()


def paired_formula(vectors):
    gram = vectors @ vectors.mT
    return torch.det(gram if gram.dtype in (torch.float32, torch.float64) else gram.float()).abs().sqrt().to(vectors.dtype)


def paired_whitened(vectors):
    return (
        torch.linalg.qr(vectors.mT if vectors.dtype in (torch.float32, torch.float64) else vectors.mT.float())[1]
        .diagonal(dim1=-2, dim2=-1)
        .prod(-1)
        .abs()
        .to(vectors.dtype)
    )


# ---------------------------------------------------------------------------------------------------------------------------------------------- cases


def matmul_flops(p, pass_, size):
    """2 B C m D forward; backward makes the coefficients again and uses them twice."""
    return (2 if pass_ == "fwd" else 6) * p["B"] * p["C"] * (p["k"] - 1) * p["D"]


def volume_bytes(p, pass_, size):
    vectors, volumes = (p["B"] + (p["k"] - 1) * p["C"]) * p["D"], p["B"] * p["C"]
    return size * (vectors + volumes if pass_ == "fwd" else 2 * vectors + volumes)


VOLUMES = {"k at least 2": lambda p: p["k"] >= 2, "D at least k": lambda p: p["D"] >= p["k"]}
TRIANGLES = {"k = 3": lambda p: p["k"] == 3}


@bench.case(
    grid=[dict(B=2048, C=2048, D=512, k=k) for k in (3, 4, 5, 2)],
    quick=[dict(B=192, C=160, D=64, k=3), dict(B=192, C=160, D=64, k=2)],
    reference=whitened,
    rules=VOLUMES,
    flops=matmul_flops,
    bytes=volume_bytes,
    # The tile engine alone (k = 2) keeps up with torch.mm; more modalities share one packing of the anchors and leave less to write than the
    # products themselves.
    targets=[*(bench.Target(0.95, where={"k": k}) for k in (3, 4, 5)), bench.Target(1.0, where={"k": 2})],
)
def gram_volume(maker, B, C, D, k):
    return maker.randn(B, D), [maker.randn(C, D) for _ in range(k - 1)]


@bench.case(
    grid=[dict(B=512, C=512, D=512, k=3, near_zero=share) for share in (0, 1, 100)],
    quick=[dict(B=100, C=100, D=64, k=3, near_zero=share) for share in (0, 1, 100)],
    reference=whitened,
    rules=VOLUMES,
    flops=matmul_flops,
    bytes=volume_bytes,
)
def gram_volume_near_zero(maker, B, C, D, k, near_zero):
    """Rows fall into groups with a direction in common: 100 groups make 1 % of the pairs nearly collinear, one group all of them, independent rows
    none."""
    if near_zero == 0:
        return maker.unit(B, D), [maker.unit(C, D) for _ in range(k - 1)]
    groups = round(100 / near_zero)
    directions = maker.unit(groups, D)

    def close(rows):
        member = torch.arange(rows, device=directions.device) % groups
        vectors = directions[member].float() + 0.03 * maker.unit(rows, D).float()  # residual / |a|^2 about 1e-3
        return (vectors / vectors.norm(dim=-1, keepdim=True)).to(maker.dtype)

    return close(B), [close(C) for _ in range(k - 1)]


@bench.case(
    grid=[dict(B=512, C=512, D=256, k=3)],
    quick=[dict(B=64, C=96, D=32, k=3)],
    reference=triangle_projected,
    rules=TRIANGLES,
    flops=matmul_flops,
    bytes=volume_bytes,
)
def triangle_area(maker, B, C, D, k):
    return maker.randn(B, D), maker.randn(C, D), maker.randn(C, D)


@bench.case(
    grid=[dict(N=16384, D=512, k=k) for k in (3, 5)],
    quick=[dict(N=256, D=64, k=3)],
    reference=paired_whitened,
    rules=VOLUMES,
    bytes=lambda p, pass_, size: size * p["N"] * ((1 if pass_ == "fwd" else 2) * p["k"] * p["D"] + 1),
)
def paired_gram_volume(maker, N, D, k):
    return (maker.randn(N, k, D),)


# ------------------------------------------------------------------------------------------------------------------------------------------ providers

volume_cases = (gram_volume, gram_volume_near_zero)

bench.provider(*volume_cases, name="formula", kind="formula")(formula)
bench.provider(*volume_cases, name="eager")(whitened)
bench.compiled(gram_volume)(whitened)
bench.provider(triangle_area, name="formula", kind="formula")(triangle_formula)
bench.provider(paired_gram_volume, name="formula", kind="formula")(paired_formula)
for case, eager in ((triangle_area, triangle_projected), (paired_gram_volume, paired_whitened)):
    bench.provider(case, name="eager")(eager)
    bench.compiled(case)(eager)

bench.ours(*volume_cases, runs="modalign::gram_volume")(ops.gram_volume)
bench.ours(triangle_area, runs="modalign::triangle_area")(ops.triangle_area)
bench.ours(paired_gram_volume, runs="modalign::paired_gram_volume")(ops.paired_gram_volume)


@bench.matmul_floor(gram_volume, gram_volume_near_zero, triangle_area)
def products(p, pass_):
    """[B, D] x [D, m C]; backward the same again, then T X and T^t A."""
    B, D, columns = p["B"], p["D"], (p["k"] - 1) * p["C"]
    coefficients = (B, D, columns)
    return [coefficients] if pass_ == "fwd" else [coefficients, (B, columns, D), (columns, B, D)]


bench.copy_floor(paired_gram_volume)(paired_gram_volume.bytes)
