"""The rungs of the CPU ladder, the library's kernel above them, and the floor: python benchmarks/run.py ladder_gram_volume --out
benchmarks/results/ladder_gram_volume.json"""

import sys
from pathlib import Path

import torch

from modalign import bench, ops

sys.path.insert(0, str(Path(__file__).parent))
import build


def reference(anchor, others):
    q, upper = torch.linalg.qr(others.mT)
    residual = (anchor * anchor).sum(-1, keepdim=True) - (anchor @ q.mT.flatten(0, 1).mT).unflatten(-1, (-1, others.shape[1])).square().sum(-1)
    return upper.diagonal(dim1=-2, dim2=-1).prod(-1).abs() * residual.clamp(min=0).sqrt()


@bench.case(
    grid=[dict(B=2048, C=2048, D=256, k=3)],
    quick=[dict(B=130, C=67, D=40, k=3), dict(B=65, C=33, D=24, k=5)],
    passes=("fwd",),
    reference=reference,
    flops=lambda p, pass_, size: 2 * p["B"] * p["C"] * (p["k"] - 1) * p["D"],
    bytes=lambda p, pass_, size: size * ((p["B"] + (p["k"] - 1) * p["C"]) * p["D"] + p["B"] * p["C"]),
)
def ladder_gram_volume(maker, B, C, D, k):
    return maker.randn(B, D), maker.randn(C, k - 1, D)


def unavailable():
    return None if build.compiler() else "the ladder needs a C++ compiler on PATH"


def add(rung):
    bench.provider(ladder_gram_volume, name=rung, kind="ours", unavailable=unavailable)(
        lambda anchor, others: build.run(rung, anchor.detach(), others.detach())
    )


for name in build.RUNGS:
    add(name)


@bench.provider(ladder_gram_volume, name="modalign.ops.gram_volume", kind="ours")
def library_op(anchor, others):
    return ops.gram_volume(anchor, others.unbind(1))


@bench.matmul_floor(ladder_gram_volume)
def products(p, pass_):
    return [(p["B"], p["D"], (p["k"] - 1) * p["C"])]
