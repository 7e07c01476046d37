"""Every op and what is promised about it, declared once. `test_ops.py` runs the battery over this list; adding an op means adding one entry here."""

from __future__ import annotations

from dataclasses import replace

import torch

from attention_cases import ATTENTION
from attention_score_cases import ATTENTION_SCORES
from contrastive_cases import CONTRASTIVE, DERIVED
from knn_values_cases import KNN_VALUES
from modalign import ops
from modalign.ops.gram_volume import formula_gram_volume, reference_gram_volume
from modalign.ops.paired_gram_volume import formula_paired_gram_volume, reference_paired_gram_volume
from modalign.ops.triangle_area import formula_triangle_area, reference_triangle_area
from modalign.testing import NOT_FINITE, BadInput, Maker, OpCase, Sample, degenerate_zoo
from dynamic_mask_cases import DYNAMIC_MASK_ATTENTION
from neighborhood_attention_cases import NEIGHBORHOODS
from segment_cases import SEGMENT_MAX_SIMILARITY
from structure_cases import STRUCTURE_LOSS
from token_cases import MERGE_TOKENS
from virtual_unmerge_cases import VIRTUAL_UNMERGE_ATTENTION

KERNEL, WIDE = "k<=8", "k>8"


def finite_zoo(make: Maker, count: int = 3) -> dict[str, list[torch.Tensor]]:
    return {name: vectors for name, vectors in degenerate_zoo(make, count).items() if name not in NOT_FINITE}


# -------------------------------------------------------------------------------------------------------------------------------------- gram_volume


def gram_volume_samples(make: Maker) -> list[Sample]:
    def call(name: str, B: int, C: int, D: int, m: int, *leading: int, **options: object) -> Sample:
        return Sample(name, (make.unit(*leading, B, D), [make.unit(*leading, C, D) for _ in range(m)]), options)

    others = [make.unit(7, 24), make.unit(4, 7, 24)]
    return [
        call("k=2", 5, 9, 16, 1),
        call("k=3, ragged", 37, 29, 67, 2),
        call("k=4, squared", 33, 65, 40, 3, squared=True),
        call("k=5, present", 11, 19, 33, 4, present=make.mask(19, 4)),
        call("k=8", 9, 17, 50, 7),
        # Unit vectors are rounded to the half type before the op and their gradients after it, and the division then takes out the large radial part.
        replace(call("k=3, normalize", 6, 7, 20, 2, normalize=True), slack=2),
        call("k=4, root, present", 6, 7, 20, 3, normalize="root", present=make.mask(7, 3)),
        call("k=3, batched", 5, 6, 18, 2, 3, 2),
        Sample("k=3, broadcast leading dimensions", (make.unit(3, 1, 5, 24), others), {"present": make.mask(3, 1, 7, 2)}),
        call("k=9, plain torch", 5, 6, 30, 8),
        call("k=10, present, squared", 5, 6, 30, 9, present=make.mask(6, 9), squared=True),
    ]


def gram_volume_tiny(make: Maker) -> list[Sample]:
    return [
        Sample("k=3", (make.randn(3, 5), [make.randn(4, 5), make.randn(4, 5)])),
        Sample("k=4, present, squared", (make.randn(2, 6), [make.randn(3, 6) for _ in range(3)]), {"present": make.mask(3, 3), "squared": True}),
        Sample("k=2, batched, normalize", (make.randn(2, 2, 4), [make.randn(2, 3, 4)]), {"normalize": True}),
        Sample("k=3, root", (make.randn(2, 5), [make.randn(3, 5), make.randn(3, 5)]), {"normalize": "root"}),
        Sample("k=9", (make.randn(2, 10), [make.randn(2, 10) for _ in range(8)])),
    ]


def gram_volume_sized(make: Maker, n: int) -> Sample:
    return Sample(f"n={n}", (make.randn(n, n + 9), [make.randn(n + 2, n + 9) for _ in range(3)]), {"present": make.mask(n + 2, 3)})


def gram_volume_degenerate(make: Maker) -> list[Sample]:
    found = [
        Sample(f"{name}{', squared' * squared}, {k}", (vectors[0], vectors[1:]), {"squared": squared})
        for k, count in ((KERNEL, 3), (WIDE, 9))
        for name, vectors in finite_zoo(make, count).items()
        for squared in (False, True)
        if not (name in ("huge", "tiny") and count == 9)  # their ninth power is out of range
    ]
    found += [
        Sample(f"{name}, {option}", (vectors[0], vectors[1:]), {"normalize": option})
        for name, vectors in finite_zoo(make).items()
        for option in (True, "root")
    ]
    found += [
        Sample("more vectors than dimensions", (make.randn(4, 2), [make.randn(5, 2), make.randn(5, 2)])),
        Sample("more vectors than dimensions, plain torch", (make.randn(4, 6), [make.randn(5, 6) for _ in range(9)])),
        Sample("as many vectors as dimensions", (make.unit(4, 3), [make.unit(5, 3), make.unit(5, 3)])),
        Sample(
            "nothing present",
            (make.randn(3, 8), [make.randn(4, 8), make.randn(4, 8)]),
            {"present": torch.zeros(4, 2, dtype=torch.bool, device=make.device)},
        ),
        Sample("eps=0", (make.unit(3, 8), [make.unit(3, 8)]), {"eps": 0.0}),
    ]
    return found


def gram_volume_empty(make: Maker) -> list[tuple[Sample, tuple[int, ...]]]:
    return [
        (Sample("no anchors", (make.randn(0, 8), [make.randn(3, 8)])), (0, 3)),
        (Sample("no candidates", (make.randn(4, 8), [make.randn(0, 8), make.randn(0, 8)])), (4, 0)),
        (Sample("no problems", (make.randn(0, 4, 8), [make.randn(0, 3, 8)])), (0, 4, 3)),
        (Sample("no candidates, plain torch", (make.randn(4, 10), [make.randn(0, 10) for _ in range(8)])), (4, 0)),
        (Sample("no candidates, present", (make.randn(4, 8), [make.randn(0, 8)]), {"present": make.mask(0, 1)}), (4, 0)),
    ]


def gram_volume_raw(make: Maker) -> list[tuple[object, tuple[object, ...]]]:
    found: list[tuple[object, tuple[object, ...]]] = []
    for name, m in (("gram_volume", 2), ("gram_volume_wide", 8)):
        forward, backward = (getattr(torch.ops.modalign, op).default for op in (name, name + "_bwd"))
        for present, squared in ((None, False), (make.mask(2, 5, m), True)):
            anchor, others = make.randn(2, 4, 12), [make.randn(2, 5, 12) for _ in range(m)]
            volume, basis, factor = forward(anchor, others, present, squared, 1e-12)
            found.append((forward, (anchor.clone().requires_grad_(), [other.clone().requires_grad_() for other in others], present, squared, 1e-12)))
            found.append((forward, (anchor, [others[0].clone().requires_grad_(), *others[1:]], present, squared, 1e-12)))
            for need in ((True, True), (True, False), (False, True)) if squared else ((True, True),):
                found.append((backward, (torch.ones_like(volume), anchor, basis, factor, squared, 1e-12, *need)))
    return found


def gram_volume_bad_inputs(make: Maker) -> list[BadInput]:
    a, r = make.randn(4, 8), make.randn(5, 8)
    huge = (a[:1].expand(100_000, 8), [r[:1].expand(100_000, 8)])

    def bad(name: str, error: type[Exception], message: str, *args: object, **kwargs: object) -> BadInput:
        return BadInput(Sample(name, args, kwargs), error, "^gram_volume: " + message)

    return [
        bad("anchor is a list", TypeError, r"anchor must be a tensor \[\.\.\., B, D\], got list", [1.0], [r]),
        bad("integer anchor", TypeError, "anchor must be float16, bfloat16, float32 or float64, got a int64 tensor", a.long(), [r]),
        bad("complex anchor", TypeError, "anchor must be float16, .* got a complex64 tensor", a.to(torch.complex64), [r]),
        bad("sparse anchor", TypeError, "anchor must be a dense", a.to_sparse(), [r]),
        bad("vector anchor", ValueError, "anchor must have 2 or more dimensions .* got a float32 tensor of shape", a[0], [r]),
        bad("D = 0", ValueError, "anchor must have a last dimension D of 1 or more", a[:, :0], [r[:, :0]]),
        bad("others is a tensor", TypeError, "others must be a sequence of tensors .* got a float32 tensor", a, r),
        bad("others is empty", ValueError, "others must hold at least one tensor, got an empty sequence", a, []),
        bad("others holds a number", TypeError, r"others\[1\] must be a tensor .* got float 2.0", a, [r, 2.0]),
        bad("mixed dtypes", TypeError, r"others\[0\] must have anchor's dtype torch.float32, got torch.float64", a, [r.double()]),
        bad("mixed devices", ValueError, r"others\[0\] must be on anchor's device .*, got meta", a, [r.to("meta")]),
        bad(
            "mixed widths",
            ValueError,
            r"others\[1\] must have anchor's width D = 8, got a float32 tensor of shape \(5, 7\)",
            a,
            [r, make.randn(5, 7)],
        ),
        bad("mixed candidates", ValueError, r"others\[1\] must have as many candidates C as others\[0\] = 5, got", a, [r, make.randn(6, 8)]),
        bad(
            "leading dimensions",
            ValueError,
            r"leading dimensions must broadcast .* anchor \[2\], others\[0\] \[3\]",
            make.randn(2, 4, 8),
            [make.randn(3, 5, 8)],
        ),
        bad("present of floats", TypeError, "present must be a bool tensor", a, [r], present=make.randn(5, 1)),
        bad(
            "present of the wrong shape",
            ValueError,
            r"present must have shape \[\.\.\., C, m\] = \[\.\.\., 5, 1\], got a bool tensor of shape \(5, 2\)",
            a,
            [r],
            present=make.mask(5, 2),
        ),
        bad("present is a list", TypeError, "present must be None or a bool tensor", a, [r], present=[True]),
        bad("present on another device", ValueError, "present must be on anchor's device", a, [r], present=make.mask(5, 1).to("meta")),
        bad("squared is a number", TypeError, "squared must be True or False, got int 1", a, [r], squared=1),
        bad("normalize is unknown", ValueError, 'normalize must be False, True or "root", got str', a, [r], normalize="unit"),
        bad("root of the square", ValueError, 'normalize must not be "root" together with squared', a, [r], normalize="root", squared=True),
        bad("eps is negative", ValueError, "eps must be finite and 0 or more, got -1.0", a, [r], eps=-1.0),
        bad("a huge result", ValueError, r"max_bytes must be at least 40000000000 for a result of shape \[100000, 100000\], got 8589934592", *huge),
        bad("max_bytes", ValueError, r"max_bytes must be at least 80 for a result of shape \[4, 5\], got 79", a, [r], max_bytes=79),
        bad("max_bytes is a float", TypeError, "max_bytes must be None or a whole number, got float 1000000000.0", a, [r], max_bytes=1e9),
        bad("eps is a string", TypeError, "eps must be None or a number, got str", a, [r], eps="small"),
    ]


GRAM_VOLUME = OpCase(
    name="gram_volume",
    call=ops.gram_volume,
    reference=reference_gram_volume,
    formula=formula_gram_volume,
    samples=gram_volume_samples,
    tiny=gram_volume_tiny,
    sized=gram_volume_sized,
    degenerate=gram_volume_degenerate,
    empty=gram_volume_empty,
    raw=gram_volume_raw,
    bad_inputs=gram_volume_bad_inputs,
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


# ------------------------------------------------------------------------------------------------------------------------------- paired_gram_volume


def paired_samples(make: Maker) -> list[Sample]:
    def call(name: str, k: int, D: int, *leading: int, **options: object) -> Sample:
        return Sample(name, ([make.unit(*leading, D) for _ in range(k)],), options)

    return [
        call("k=1", 1, 17, 9),
        call("k=2", 2, 16, 13),
        call("k=3, ragged", 3, 67, 37),
        call("k=5, squared, present", 5, 33, 21, squared=True, present=make.mask(21, 5)),
        call("k=8", 8, 50, 19),
        replace(call("k=3, normalize", 3, 20, 7, normalize=True), slack=2),  # see gram_volume
        call("k=4, root, present", 4, 20, 7, normalize="root", present=make.mask(7, 4)),
        call("k=3, batched", 3, 18, 2, 3, 2),
        Sample("one tensor", (make.unit(3, 5, 4, 18),), {"present": make.mask(5, 4)}),
        Sample("broadcast", ([make.unit(3, 1, 24), make.unit(7, 24)],)),
        call("k=9, plain torch", 9, 30, 6),
        call("k=10, present, squared", 10, 30, 6, present=make.mask(6, 10), squared=True),
    ]


def paired_tiny(make: Maker) -> list[Sample]:
    return [
        Sample("k=3", ([make.randn(3, 5) for _ in range(3)],)),
        Sample("k=4, present, squared", ([make.randn(3, 6) for _ in range(4)],), {"present": make.mask(3, 4), "squared": True}),
        Sample("one tensor, normalize", (make.randn(2, 3, 4),), {"normalize": True}),
        Sample("k=3, root", ([make.randn(3, 5) for _ in range(3)],), {"normalize": "root"}),
        Sample("k=9", ([make.randn(2, 10) for _ in range(9)],)),
    ]


def paired_sized(make: Maker, n: int) -> Sample:
    return Sample(f"n={n}", ([make.randn(n, n + 9) for _ in range(3)],), {"present": make.mask(n, 3)})


def paired_degenerate(make: Maker) -> list[Sample]:
    found = [
        Sample(f"{name}{', squared' * squared}, {k}", (vectors,), {"squared": squared})
        for k, count in ((KERNEL, 3), (WIDE, 9))
        for name, vectors in finite_zoo(make, count).items()
        for squared in (False, True)
        if not (name in ("huge", "tiny") and count == 9)
    ]
    found += [
        Sample(f"{name}, {option}", (vectors,), {"normalize": option}) for name, vectors in finite_zoo(make).items() for option in (True, "root")
    ]
    found += [
        Sample("more vectors than dimensions", (make.randn(4, 3, 2),)),
        Sample("more vectors than dimensions, plain torch", (make.randn(4, 10, 6),)),
        Sample("nothing present", (make.randn(4, 3, 8),), {"present": torch.zeros(4, 3, dtype=torch.bool, device=make.device)}),
        Sample(
            "nothing present, root", (make.randn(4, 3, 8),), {"present": torch.zeros(4, 3, dtype=torch.bool, device=make.device), "normalize": "root"}
        ),
    ]
    return found


def paired_empty(make: Maker) -> list[tuple[Sample, tuple[int, ...]]]:
    return [
        (Sample("no samples", ([make.randn(0, 8), make.randn(0, 8)],)), (0,)),
        (Sample("no samples, batched", (make.randn(3, 0, 2, 8),)), (3, 0)),
        (Sample("no samples, plain torch", (make.randn(0, 9, 12),)), (0,)),
    ]


def paired_raw(make: Maker) -> list[tuple[object, tuple[object, ...]]]:
    found: list[tuple[object, tuple[object, ...]]] = []
    for name, k in (("paired_gram_volume", 3), ("paired_gram_volume_wide", 9)):
        forward, backward = (getattr(torch.ops.modalign, op).default for op in (name, name + "_bwd"))
        for present, squared in ((None, False), (make.mask(5, k), True)):
            vectors = [make.randn(5, 12) for _ in range(k)]
            found.append((forward, ([vector.clone().requires_grad_() for vector in vectors], present, squared, 1e-12)))
            found.append((backward, (make.randn(5), vectors, present, squared, 1e-12)))
    return found


def paired_bad_inputs(make: Maker) -> list[BadInput]:
    a = make.randn(4, 8)

    def bad(name: str, error: type[Exception], message: str, *args: object, **kwargs: object) -> BadInput:
        return BadInput(Sample(name, args, kwargs), error, "^paired_gram_volume: " + message)

    return [
        bad("a number", TypeError, "vectors must be a sequence of tensors .* got float", 1.0),
        bad("empty", ValueError, "vectors must hold at least one tensor", []),
        bad("no vectors", ValueError, "vectors must hold at least one vector per sample", a[:0]),
        bad("one vector alone", ValueError, "vectors must have 2 or more dimensions", a[0]),
        bad("integers", TypeError, "vectors must be float16, .* got a int64 tensor", a.long()),
        bad("complex", TypeError, r"vectors\[1\] must be float16, .* got a complex64 tensor", [a, a.to(torch.complex64)]),
        bad("mixed dtypes", TypeError, r"vectors\[1\] must have vectors\[0\]'s dtype torch.float32, got torch.float16", [a, a.half()]),
        bad("mixed devices", ValueError, r"vectors\[1\] must be on vectors\[0\]'s device .*, got meta", [a, a.to("meta")]),
        bad("mixed widths", ValueError, r"vectors\[1\] must have vectors\[0\]'s width D = 8", [a, a[:, :7]]),
        bad("leading dimensions", ValueError, r"leading dimensions must broadcast .* vectors\[0\] \[4\], vectors\[1\] \[3\]", [a, a[:3]]),
        bad(
            "present of the wrong shape",
            ValueError,
            r"present must have shape \[\.\.\., k\] = \[\.\.\., 2\], got a bool tensor of shape \(4, 3\)",
            [a, a],
            present=make.mask(4, 3),
        ),
        bad("present of floats", TypeError, "present must be a bool tensor", [a, a], present=make.randn(4, 2)),
        bad("squared", TypeError, "squared must be True or False", [a, a], squared=None),
        bad("root of the square", ValueError, 'normalize must not be "root" together with squared', [a, a], normalize="root", squared=True),
        bad("eps", ValueError, "eps must be finite", [a, a], eps=float("nan")),
    ]


PAIRED_GRAM_VOLUME = OpCase(
    name="paired_gram_volume",
    call=ops.paired_gram_volume,
    reference=reference_paired_gram_volume,
    formula=formula_paired_gram_volume,
    samples=paired_samples,
    tiny=paired_tiny,
    sized=paired_sized,
    degenerate=paired_degenerate,
    empty=paired_empty,
    raw=paired_raw,
    bad_inputs=paired_bad_inputs,
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


# ------------------------------------------------------------------------------------------------------------------------------------ triangle_area


def triangle_samples(make: Maker) -> list[Sample]:
    def call(name: str, B: int, C: int, D: int, *leading: int, **options: object) -> Sample:
        return Sample(name, (make.unit(*leading, B, D), make.unit(*leading, C, D), make.unit(*leading, C, D)), options)

    return [
        call("plane", 5, 9, 2),
        call("ragged", 37, 29, 67),
        call("squared", 33, 65, 40, squared=True),
        call("batched", 5, 6, 18, 3, 2),
        Sample("broadcast leading dimensions", (make.unit(3, 1, 5, 24), make.unit(7, 24), make.unit(4, 7, 24))),
    ]


def triangle_tiny(make: Maker) -> list[Sample]:
    return [
        Sample("plain", (make.randn(3, 5), make.randn(4, 5), make.randn(4, 5))),
        Sample("squared", (make.randn(2, 4), make.randn(3, 4), make.randn(3, 4)), {"squared": True}),
        Sample("batched", (make.randn(2, 2, 4), make.randn(2, 3, 4), make.randn(2, 3, 4))),
    ]


def triangle_sized(make: Maker, n: int) -> Sample:
    return Sample(f"n={n}", (make.randn(n, n + 9), make.randn(n + 2, n + 9), make.randn(n + 2, n + 9)))


def triangle_degenerate(make: Maker) -> list[Sample]:
    found = [
        Sample(f"{name}{', squared' * squared}", tuple(vectors), {"squared": squared})
        for name, vectors in finite_zoo(make).items()
        for squared in (False, True)
    ]
    a, u = make.unit(4, 8), make.unit(5, 8)
    return found + [
        Sample("u = v", (a, u, u.clone())),
        Sample("on a line", (a, 2 * a, -a)),
        Sample("a line", (make.randn(3, 1), make.randn(4, 1), make.randn(4, 1))),
    ]


def triangle_empty(make: Maker) -> list[tuple[Sample, tuple[int, ...]]]:
    return [
        (Sample("no anchors", (make.randn(0, 8), make.randn(3, 8), make.randn(3, 8))), (0, 3)),
        (Sample("no candidates", (make.randn(4, 8), make.randn(0, 8), make.randn(0, 8))), (4, 0)),
        (Sample("no problems", (make.randn(0, 4, 8), make.randn(0, 3, 8), make.randn(0, 3, 8))), (0, 4, 3)),
    ]


def triangle_raw(make: Maker) -> list[tuple[object, tuple[object, ...]]]:
    forward, backward = torch.ops.modalign.triangle_area.default, torch.ops.modalign.triangle_area_bwd.default
    found: list[tuple[object, tuple[object, ...]]] = []
    for squared in (False, True):
        anchor, u, v = make.randn(2, 4, 12), make.randn(2, 5, 12), make.randn(2, 5, 12)
        area, basis, factor = forward(anchor, u, v, squared, 1e-12)
        found.append((forward, (anchor.clone().requires_grad_(), u.clone().requires_grad_(), v.clone().requires_grad_(), squared, 1e-12)))
        found.append((forward, (anchor, u.clone().requires_grad_(), v, squared, 1e-12)))
        for need in ((True, True), (True, False), (False, True)):
            found.append((backward, (torch.ones_like(area), anchor, basis, factor, squared, 1e-12, *need)))
    return found


def triangle_bad_inputs(make: Maker) -> list[BadInput]:
    a, u, v = make.randn(4, 8), make.randn(5, 8), make.randn(5, 8)

    def bad(name: str, error: type[Exception], message: str, *args: object, **kwargs: object) -> BadInput:
        return BadInput(Sample(name, args, kwargs), error, "^triangle_area: " + message)

    return [
        bad("a list", TypeError, "u must be a tensor", a, [u], v),
        bad("integers", TypeError, "v must be float16, .* got a int64 tensor", a, u, v.long()),
        bad("a vector", ValueError, "anchor must have 2 or more dimensions", a[0], u, v),
        bad("mixed candidates", ValueError, "v must have as many candidates C as u = 5, got", a, u, v[:4]),
        bad("mixed widths", ValueError, "u must have anchor's width D = 8", a, u[:, :7], v),
        bad("mixed dtypes", TypeError, "v must have anchor's dtype torch.float32, got torch.float64", a, u, v.double()),
        bad("mixed devices", ValueError, "u must be on anchor's device .*, got meta", a, u.to("meta"), v),
        bad("leading dimensions", ValueError, "leading dimensions must broadcast", make.randn(2, 4, 8), make.randn(3, 5, 8), v),
        bad("max_bytes", ValueError, r"max_bytes must be at least 80 for a result of shape \[4, 5\], got 0", a, u, v, max_bytes=0),
        bad("squared", TypeError, "squared must be True or False", a, u, v, squared="yes"),
        bad("eps", ValueError, "eps must be finite and 0 or more", a, u, v, eps=float("inf")),
    ]


TRIANGLE_AREA = OpCase(
    name="triangle_area",
    call=ops.triangle_area,
    reference=reference_triangle_area,
    formula=formula_triangle_area,
    samples=triangle_samples,
    tiny=triangle_tiny,
    sized=triangle_sized,
    degenerate=triangle_degenerate,
    empty=triangle_empty,
    raw=triangle_raw,
    bad_inputs=triangle_bad_inputs,
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

# The same promises for more vectors than a kernel takes.
WIDE = [
    replace(
        GRAM_VOLUME,
        label="gram_volume_wide",
        samples=lambda make: [s for s in gram_volume_samples(make) if "plain torch" in s.name or "k=10" in s.name],
        sized=lambda make, n: Sample(
            f"n={n}", (make.randn(n, n + 9), [make.randn(n + 2, n + 9) for _ in range(8)]), {"present": make.mask(n + 2, 8)}
        ),
        tiny=lambda make: gram_volume_tiny(make)[-1:],
        degenerate=None,
        empty=None,
        raw=None,
        bad_inputs=None,
    ),
    replace(
        PAIRED_GRAM_VOLUME,
        label="paired_gram_volume_wide",
        samples=lambda make: [s for s in paired_samples(make) if "plain torch" in s.name or "k=10" in s.name],
        sized=lambda make, n: Sample(f"n={n}", ([make.randn(n, n + 9) for _ in range(9)],), {"present": make.mask(n, 9)}),
        tiny=lambda make: paired_tiny(make)[-1:],
        degenerate=None,
        empty=None,
        raw=None,
        bad_inputs=None,
    ),
]

VOLUMES = [GRAM_VOLUME, PAIRED_GRAM_VOLUME, TRIANGLE_AREA, *WIDE]
CASES = [*VOLUMES, *CONTRASTIVE, *DERIVED, SEGMENT_MAX_SIMILARITY, KNN_VALUES, STRUCTURE_LOSS, *ATTENTION, DYNAMIC_MASK_ATTENTION, *NEIGHBORHOODS, VIRTUAL_UNMERGE_ATTENTION, *ATTENTION_SCORES, MERGE_TOKENS]

# Without a gradient, so not for the battery: what they promise is tested in test_volume_search.py, test_hard_negatives.py, test_knn.py,
# test_attention_scores.py, test_match_tokens.py and test_select_diverse.py.
SELECTIONS = [
    "attention_row_statistics",
    "clip_hard_negatives",
    "dual_softmax_matching",
    "gram_hard_negatives",
    "gram_target_rank",
    "gram_topk",
    "knn",
    "knn_graph",
    "match_tokens",
    "mine_hard_negatives",
    "mutual_nearest",
    "select_diverse",
    "target_rank",
]
