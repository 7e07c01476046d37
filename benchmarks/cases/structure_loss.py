"""The STRUCTURE regularizer in training, gradient to the aligned side, against eager and compiled torch. The floor: torch.mm of both products and of the
gradient, 2 B^2 (D + 2 A).

structure_loss            products kept for the backward where the workspace holds them
structure_loss_streaming  nothing kept
"""

import torch

from modalign import bench, ops


def eager(source, aligned):
    """The usual code. The source is frozen, here and everywhere below."""
    logs = []
    for z in (source.detach(), aligned):
        z = torch.nn.functional.normalize(z, dim=1)
        z = z - z.mean(0)
        logs.append((z @ z.mT / 0.05).log_softmax(1))
    P, Q = (each.exp() for each in logs)
    M = ((P + Q) / 2).clamp(min=torch.finfo(P.dtype).tiny).log()
    return (P * (logs[0] - M) + Q * (logs[1] - M)).sum(1).mean() / 2


costs = dict(
    flops=lambda p, pass_, size: 2 * p["B"] ** 2 * (p["D"] + p["A"] if pass_ == "fwd" else p["A"]),
    bytes=lambda p, pass_, size: size * p["B"] * (p["D"] + p["A"] if pass_ == "fwd" else 2 * p["A"]),
    reference=eager,
    rules={"B of 2 or more": lambda p: p["B"] >= 2},
)


def problem(maker, B, D, A):
    """Clusters, so that a row sees more than itself; the source is frozen."""
    groups = maker.unit(max(1, B // 64), D).float()
    source = (groups[torch.arange(B, device=groups.device) % len(groups)] + 0.6 * maker.unit(B, D).float()).to(maker.dtype)
    head = maker.randn(D, A).float() / D**0.5
    return source, (source.float() @ head).to(maker.dtype)


@bench.case(
    grid=[dict(B=B, D=1024, A=512) for B in (1024, 4096)], quick=[dict(B=130, D=40, A=24)], **costs
)
def structure_loss(maker, B, D, A):
    return problem(maker, B, D, A)


@bench.case(grid=[dict(B=4096, D=1024, A=512)], quick=[dict(B=130, D=40, A=24)], **costs)
def structure_loss_streaming(maker, B, D, A):
    return problem(maker, B, D, A)


# ------------------------------------------------------------------------------------------------------------------------------------------ providers

both = (structure_loss, structure_loss_streaming)

bench.provider(*both, name="eager")(eager)
bench.compiled(*both)(eager)
bench.ours(structure_loss, runs="modalign::structure_loss")(lambda source, aligned: ops.structure_loss(source.detach(), aligned))
bench.ours(structure_loss_streaming, runs="modalign::structure_loss")(
    lambda source, aligned: ops.structure_loss(source.detach(), aligned, implementation="streaming")
)


@bench.matmul_floor(*both)
def products(p, pass_):
    """[B, D] x [D, B], [B, A] x [A, B], and backward [B, B] x [B, A]."""
    B, D, A = p["B"], p["D"], p["A"]
    return [(B, D, B), (B, A, B)] if pass_ == "fwd" else [(B, B, A)]
