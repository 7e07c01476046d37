"""The entry of structure_loss in `cases.py`: all pairs. Lists of neighbours, levels and other distances are in test_structure_loss.py."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from modalign import ops
from modalign.ops.structure_loss import reference_structure_loss
from modalign.testing import NOT_FINITE, BadInput, Maker, OpCase, Sample, degenerate_zoo


def formula(source: Tensor, aligned: Tensor, *, temperature: float = 0.05, divergence: str = "js") -> Tensor:
    """The usual code: matrices, softmax, logarithms of what came out."""
    P, Q = (
        ((each - each.mean(0)) @ (each - each.mean(0)).mT / temperature).softmax(1) for each in (torch.nn.functional.normalize(z, dim=1) for z in (source, aligned))
    )
    M = (P + Q) / 2
    if divergence == "released":
        return ((M + 1e-12) * ((M + 1e-12).log() - (Q + 1e-12).log() / 2 - (P + 1e-12).log() / 2)).sum(1).mean()
    return (torch.special.xlogy(P, P) - torch.special.xlogy(P, M) + torch.special.xlogy(Q, Q) - torch.special.xlogy(Q, M)).sum(1).mean() / 2


def samples(make: Maker) -> list[Sample]:
    def call(name: str, B: int, D: int, A: int, **options: object) -> Sample:
        return Sample(name, (make.randn(B, D), make.randn(B, A)), options)

    return [
        call("small", 5, 16, 7, temperature=0.3),
        call("one block and a row", 97, 33, 20, temperature=0.2),
        call("released", 130, 24, 40, temperature=0.2, divergence="released"),
        # Nearly all of a row lies on its diagonal: the small rest is exp of a difference of logits of 20, which are known to 1e-6.
        replace(call("sharp", 70, 12, 12), slack=10),
        replace(call("sharp, released", 70, 12, 9, divergence="released"), slack=10),
        call("margin", 40, 8, 8, temperature=0.5, margin=0.001),
        call("one element", 9, 1, 3, temperature=0.5),
    ]


def tiny(make: Maker) -> list[Sample]:
    return [
        Sample(f"{divergence}, {centering}{', first' * first}", (make.randn(4, 5), make.randn(4, 3)), dict(temperature=0.4, divergence=divergence, centering=centering, centering_first=first))
        for divergence in ("js", "released")
        for centering, first in (("mean", False), ("none", False), ("standard", False), ("mean", True))
    ]


def sized(make: Maker, n: int) -> Sample:
    return Sample(f"n={n}", (make.randn(n, n + 9), make.randn(n, 6)), {"temperature": make.place(torch.tensor(0.3))})


def degenerate(make: Maker) -> list[Sample]:
    zoo = [(name, vectors[0], vectors[1]) for name, vectors in degenerate_zoo(make, 2).items() if name not in NOT_FINITE]
    rows = make.unit(6, 8)
    zoo += [("equal", rows, rows), ("all rows equal", rows[:1].expand(6, 8).contiguous(), rows), ("zero", torch.zeros_like(rows), rows), ("one row", rows[:1], rows[:1])]
    zoo += [("zero aligned", rows, torch.zeros_like(rows))]
    found = []
    for name, x, y in zoo:
        B = min(len(x), len(y))
        found += [Sample(f"{name}, {divergence}", (x[:B], y[:B]), {"divergence": divergence}) for divergence in ("js", "released")]
    return found


def raw(make: Maker) -> list[tuple[object, tuple[object, ...]]]:
    forward, backward = (getattr(torch.ops.modalign, name).default for name in ("structure_loss", "structure_loss_bwd"))
    x, y = make.unit(6, 12), make.unit(6, 5)
    found: list[tuple[object, tuple[object, ...]]] = []
    for released, workspace in ((False, 0), (True, 1 << 30)):
        loss, statistics, products = forward(x, y, released, workspace)
        found.append((forward, (x.clone().requires_grad_(), y.clone().requires_grad_(), released, workspace)))
        for need in ((True, True), (True, False), (False, True), (False, False)):
            found.append((backward, (torch.ones_like(loss), statistics, products, x, y, released, *need)))
    return found


def bad_inputs(make: Maker) -> list[BadInput]:
    x, y = make.randn(4, 8), make.randn(4, 3)

    def bad(name: str, error: type[Exception], message: str, *args: object, **options: object) -> BadInput:
        return BadInput(Sample(name, args, options), error, "structure_loss: " + message)

    return [
        bad("a list", TypeError, r"source must be a tensor \[B, D\], got list", [1.0], y),
        bad("integers", TypeError, "aligned must be float16, bfloat16, float32 or float64, got a int64 tensor", x, y.long()),
        bad("batched", ValueError, r"source must have 2 dimensions \[B, D\]", x[None], y),
        bad("other rows", ValueError, "aligned must have as many rows as source, one or more, got 3 and 4", x, y[:3]),
        bad("no rows", ValueError, "aligned must have as many rows as source, one or more, got 0 and 0", x[:0], y[:0]),
        bad("mixed dtypes", TypeError, "aligned must have source's dtype torch.float32, got torch.float64", x, y.double()),
        bad("mixed devices", ValueError, "aligned must be on source's device .*, got meta", x, y.to("meta")),
        bad("temperature", ValueError, "temperature must be positive and finite, got 0.0", x, y, temperature=0.0),
        bad("levels", ValueError, "levels must be 1 or more, got 0", x, y, levels=0),
        bad("levels", TypeError, "levels must be a whole number, got float 1.0", x, y, levels=1.0),
        bad("divergence", ValueError, "divergence must be one of js, released, got str 'kl'", x, y, divergence="kl"),
        bad("weighting", ValueError, "weighting must be one of inverse, none, got NoneType", x, y, weighting=None),
        bad("centering", ValueError, "centering must be one of mean, none, standard, got bool True", x, y, centering=True),
        bad("distance", ValueError, "distance must be one of cosine, rbf, spearman, got str 'l2'", x, y, distance="l2"),
        bad("margin", ValueError, "margin must be 0 or more, got -1", x, y, margin=-1),
        bad("gamma", ValueError, "gamma must be positive, got 0", x, y, gamma=0),
        bad("centering_first", TypeError, "centering_first must be True or False", x, y, centering_first=1),
        bad("neighbors", ValueError, "neighbors must be 1 or more, got 0", x, y, neighbors=0),
        bad("neighbors", TypeError, r"neighbors must be None, a whole number or an int64 tensor \[4, k\]", x, y, neighbors=torch.zeros(4, 2)),
        bad("neighbors", ValueError, r"neighbors must have shape \[4, k\]", x, y, neighbors=torch.zeros(3, 2, dtype=torch.int64)),
        bad("neighbors and levels", ValueError, "neighbors must be None with levels above 1", x, y, neighbors=2, levels=2),
        bad("implementation", ValueError, 'implementation must be "auto" or "dense" with levels above 1', x, y, levels=2, implementation="streaming"),
        bad("workspace", ValueError, "workspace_bytes must be at least 0", x, y, workspace_bytes=-1),
    ]


STRUCTURE_LOSS = OpCase(
    name="structure_loss",
    call=ops.structure_loss,
    reference=reference_structure_loss,
    formula=formula,
    samples=samples,
    tiny=tiny,
    sized=sized,
    degenerate=degenerate,
    raw=raw,
    bad_inputs=bad_inputs,
    accumulates=True,
    double_backward=False,
    func_grad=True,
    vmap=True,
    jvp=False,
    autocast=torch.float32,
    compile=True,
    export=True,
    checkpoint=True,
    strided=True,
    deterministic=True,
)
