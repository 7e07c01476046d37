"""The contrastive losses' entries of `cases.py`: one family, one shape of call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from modalign import ops
from modalign.ops.clip_loss import formula_clip_loss, reference_clip_loss
from modalign.ops.cosine_sum_contrastive_loss import formula_cosine_sum_contrastive_loss, reference_cosine_sum_contrastive_loss
from modalign.ops.gram_contrastive_loss import formula_gram_contrastive_loss, reference_gram_contrastive_loss
from modalign.ops.pairwise_logsumexp import formula_pairwise_logsumexp, reference_pairwise_logsumexp
from modalign.ops.siglip_loss import formula_siglip_loss, reference_siglip_loss
from modalign.ops.triangle_contrastive_loss import formula_triangle_contrastive_loss, reference_triangle_contrastive_loss
from modalign.testing import NOT_FINITE, BadInput, Maker, OpCase, Sample, degenerate_zoo


def scalar(make: Maker, value: float) -> Tensor:
    return make.place(torch.tensor(value, dtype=torch.float64))


def targets(make: Maker, B: int, C: int) -> Tensor:
    """Some rows ignored, some candidates shared, some nobody's."""
    at = (torch.arange(B) * 5 + 2) % C
    at[3 % B] = -100
    at[6 % B] = -1
    at[-1] = at[0]
    return make.place(at)


def positive_ids(make: Maker, B: int, C: int) -> tuple[Tensor, Tensor]:
    """Several of some ids on both sides, one of others; some have no positive, some take no part."""
    rows, columns = torch.arange(B) * 3 % 7, torch.arange(C) * 2 % 9 + 1
    rows[2 % B], rows[4 % B], columns[1 % C], columns[-1] = -100, -1, -100, -1
    return make.place(rows), make.place(columns)


def others_of(form: str, make: Maker, *shape: int, m: int = 2, draw: str = "unit") -> tuple:
    """The arguments after the anchor: a list of candidates' vectors, u and v, or y."""
    vectors = [getattr(make, draw)(*shape) for _ in range({"gram": m, "triangle": 2, "product": 1}[form])]
    return (vectors,) if form == "gram" else tuple(vectors)


def options_of(name: str, make: Maker, value: float | None = None) -> dict[str, object]:
    if name not in ("clip_loss", "siglip_loss"):
        return {"temperature": scalar(make, 0.25 if value is None else value)}
    options: dict[str, object] = {"logit_scale": scalar(make, 8.0 if value is None else 1 / value)}
    return options | {"logit_bias": scalar(make, -4.0)} if name == "siglip_loss" else options


def samples(name: str, form: str, make: Maker) -> list[Sample]:
    softmax = name != "siglip_loss"

    def call(label: str, B: int, C: int, D: int, m: int = 2, value: float | None = None, **options: object) -> Sample:
        # The gradient of a temperature is a difference of means that nearly agree: the plain formula in float32 has three times this error.
        return Sample(label, (make.unit(B, D), *others_of(form, make, C, D, m=m)), options_of(name, make, value) | options, slack=3)

    found = [
        call("one tile", 9, 9, 16),
        call("ragged", 67, 67, 33, 1),
        call("a sharp temperature", 33, 33, 40, 3, value=0.0625),
        call("targets", 23, 41, 35, 2, target=targets(make, 23, 41)),
        call("sum", 19, 19, 24, 2, reduction="sum"),
        call("none, targets", 19, 33, 24, 2, reduction="none", target=targets(make, 19, 33)),
        call("B = 1", 1, 1, 12),
    ]
    if softmax:
        found += [call("smoothing", 40, 40, 20, 2, label_smoothing=0.1), call("smoothing, targets", 17, 30, 20, 4, label_smoothing=0.1, target=targets(make, 17, 30))]
        found += [call(way, 20, 31, 24, 2, direction=way, label_smoothing=0.1, target=targets(make, 20, 31)) for way in ("rows", "columns")]
    if form == "gram":
        some = make.mask(29, 4)
        some[7] = False
        found += [
            call("present", 29, 29, 40, 4, present=some),
            call("present, smoothing, targets", 13, 29, 40, 4, present=some, label_smoothing=0.2, target=targets(make, 13, 29)),
            call("k=8", 15, 15, 50, 7),
        ]
    if form == "product":
        found += [call("negatives", 12, 12, 24, negatives=make.unit(21, 24)), call("negatives, targets", 12, 17, 24, negatives=make.unit(9, 24), target=targets(make, 12, 17))]
        both = make.unit(8, 24), make.unit(11, 24)
        found += [
            call("negatives of both sides", 13, 21, 24, negatives=both, target=targets(make, 13, 21)),
            call("positives", 27, 19, 24, positive_ids=positive_ids(make, 27, 19)),
            call("positives, negatives, sum", 14, 18, 24, positive_ids=positive_ids(make, 14, 18), negatives=both, reduction="sum"),
            call("positives, one tensor of ids", 25, 25, 24, positive_ids=positive_ids(make, 25, 25)[0]),
        ]
        if softmax:
            found += [
                call("positives, smoothing", 16, 22, 24, positive_ids=positive_ids(make, 16, 22), negatives=(both[0], None), label_smoothing=0.1),
                call("positives, columns, none", 16, 22, 24, positive_ids=positive_ids(make, 16, 22), direction="columns", reduction="none"),
            ]
    return found


def tiny(name: str, form: str, make: Maker) -> list[Sample]:
    def call(label: str, B: int, C: int, D: int, m: int = 2, **options: object) -> Sample:
        return Sample(label, (make.randn(B, D), *others_of(form, make, C, D, m=m, draw="randn")), options_of(name, make, 1.0) | options)

    found = [call("square", 3, 3, 5), call("targets, sum", 4, 3, 6, target=torch.tensor([2, -100, 0, 2]), reduction="sum"), call("none, normalize", 2, 2, 4, reduction="none", normalize=True)]
    if form == "gram":
        found += [
            call("present, smoothing", 3, 3, 6, 3, present=torch.tensor([[True, False, True], [False] * 3, [True] * 3]), label_smoothing=0.1),
        ]
    return found


def sized(name: str, form: str, make: Maker, n: int) -> Sample:
    options = options_of(name, make, 1.0)
    if form == "gram":
        options["present"] = make.mask(n, 2, probability=0.9)
    return Sample(f"n={n}", (make.randn(n, n + 9), *others_of(form, make, n, n + 9, draw="randn")), options)


def degenerate(name: str, form: str, make: Maker) -> list[Sample]:
    def call(label: str, anchor: Tensor, *rest: Tensor, **options: object) -> Sample:
        vectors = (list(rest),) if form == "gram" else rest[: {"triangle": 2, "product": 1}[form]]
        return Sample(label, (anchor, *vectors), options_of(name, make) | options)

    found = [call(label, *vectors, **options) for label, vectors in degenerate_zoo(make, 3).items() if label not in (*NOT_FINITE, "huge") for options in ({}, {"normalize": True})]
    same, twice, zero = make.unit(6, 12), make.unit(6, 12), make.unit(6, 12)
    twice[3] = twice[1]
    zero[2] = 0
    found += [
        call("everything aligned", same, same.clone(), same.clone()),
        call("a duplicated row", twice, twice.clone(), make.unit(6, 12)),
        call("a zero row", zero, zero.clone(), zero.clone()),
        call("one modality copies the other", make.unit(6, 12), same, same.clone()),
        call("nobody has a label", make.unit(6, 12), make.unit(6, 12), make.unit(6, 12), target=torch.full((6,), -100, device=make.device)),
        call("saturated", same, -same, -same, **options_of(name, make, 0.0625)),
    ]
    if form == "gram":
        nothing = torch.zeros(6, 2, dtype=torch.bool, device=make.device)
        found.append(call("nothing present", make.unit(6, 12), make.unit(6, 12), make.unit(6, 12), present=nothing))
    return found


def empty(name: str, form: str, make: Maker) -> list[tuple[Sample, tuple[int, ...]]]:
    def call(label: str, B: int, C: int, **options: object) -> Sample:
        return Sample(label, (make.randn(B, 8), *others_of(form, make, C, 8, draw="randn")), options_of(name, make) | options)

    none = torch.full((3,), -100, device=make.device)
    return [
        (call("nothing at all", 0, 0), ()),
        (call("no rows, sum", 0, 5, target=none[:0], reduction="sum"), ()),
        (call("no candidates", 3, 0, target=none), ()),
        (call("nothing at all, none", 0, 0, reduction="none"), (0,)),
    ]


def raw(name: str, form: str, make: Maker) -> list[tuple[object, tuple[object, ...]]]:
    forward, backward = (getattr(torch.ops.modalign, op).default for op in (name, name + "_bwd"))
    B, C, D = 4, 5, 12
    vectors = others_of(form, make, C, D)[0] if form == "gram" else list(others_of(form, make, C, D))
    scale = make.place(torch.tensor(4.0 if form == "product" else -4.0))
    bias = make.place(torch.tensor(-1.0)) if form == "product" else None
    smoothing = 0.0 if name == "siglip_loss" else 0.1
    given = (make.unit(B, D), vectors, scale, bias, targets(make, B, C), make.mask(C, 2) if form == "gram" else None, smoothing, 0.5, 0.5, 1e-12)
    budget = 0  # products that are kept have padding that nobody fills
    loss, row_lse, column_lse, *_, classes, basis, factor, products = forward(*given, budget)
    wanting = (given[0].clone().requires_grad_(), [vector.clone().requires_grad_() for vector in vectors], scale.clone().requires_grad_(), *given[3:], budget)
    found: list[tuple[object, tuple[object, ...]]] = [(forward, wanting)]
    for need in ((True, True), (True, False), (False, True), (False, False)):
        found.append((backward, (torch.ones_like(loss), loss.new_ones(C), row_lse, column_lse, classes, basis, factor, products, *given, *need)))
    return found


def bad_inputs(name: str, form: str, make: Maker) -> list[BadInput]:
    a, r = make.randn(4, 8), make.randn(4, 8)
    anchor, other = {"gram": ("anchor", r"others\[0\]"), "triangle": ("anchor", "u"), "product": ("x", "y")}[form]
    scale = "logit_scale" if form == "product" else "temperature"
    options = {key: 1.0 for key in options_of(name, make)}

    def rest(vector: object) -> tuple:
        return ([vector],) if form == "gram" else (vector, vector) if form == "triangle" else (vector,)

    def bad(label: str, error: type[Exception], message: str, first: object, then: tuple, **more: object) -> BadInput:
        start = "" if error is RuntimeError else "^"  # raised by the raw op, which puts its place in front
        return BadInput(Sample(label, (first, *then), options | more), error, f"{start}{name}: {message}")

    found = [
        bad("a list", TypeError, rf"{anchor} must be a tensor \[B, D\], got list", [1.0], rest(r)),
        bad("integers", TypeError, f"{anchor} must be float16, .* got a int64 tensor", a.long(), rest(r)),
        bad("three dimensions", ValueError, rf"{anchor} must have 2 dimensions \[B, D\], got", a[None], rest(r)),
        bad("mixed widths", ValueError, f"{other} must have {anchor}'s width D = 8, got", a, rest(make.randn(4, 7))),
        bad("mixed dtypes", TypeError, f"{other} must have {anchor}'s dtype torch.float32, got torch.float64", a, rest(r.double())),
        bad("no target", ValueError, "target must be given where there are not as many candidates as rows, got 4 rows and 5 candidates", a, rest(make.randn(5, 8))),
        bad("float target", TypeError, r"target must be None or an int64 tensor \[B\], got", a, rest(r), target=a[:, 0]),
        bad("short target", ValueError, r"target must have shape \[B\] = \[4\], got", a, rest(r), target=torch.zeros(3, dtype=torch.long, device=make.device)),
        bad("reduction", ValueError, 'reduction must be "mean", "sum" or "none", got str', a, rest(r), reduction="average"),
        bad("return_accuracy", TypeError, "return_accuracy must be True or False, got int 1", a, rest(r), return_accuracy=1),
        bad("implementation", ValueError, 'implementation must be "auto", "streaming" or "dense", got str', a, rest(r), implementation="fast"),
        bad("workspace_bytes", ValueError, "workspace_bytes must be at least 0", a, rest(r), workspace_bytes=-1),
        bad("workspace_bytes of streaming", ValueError, 'workspace_bytes must be at least 0 and go with implementation="auto"', a, rest(r), workspace_bytes=1, implementation="streaming"),
        bad("workspace_bytes is a float", TypeError, "workspace_bytes must be None or a whole number", a, rest(r), workspace_bytes=1e6),
        bad("normalize", TypeError, "normalize must be True or False, got str", a, rest(r), normalize="root"),
        *[bad(f"{scale} = {value}", ValueError, f"{scale} must be positive and finite, got {value}", a, rest(r), **{scale: value}) for value in (0.0, -1.0, float("inf"), float("nan"))],
        bad(f"{scale} is a string", TypeError, f"{scale} must be a number or a floating-point tensor of one element, got str", a, rest(r), **{scale: "low"}),
        bad(f"{scale} of two", TypeError, f"{scale} must be a number or .* got a float32 tensor of shape", a, rest(r), **{scale: a[0, :2]}),
    ]
    if make.device.type == "cpu":  # on a GPU values are not looked at
        found += [
            bad(f"a tensor {scale} of 0", RuntimeError, f"{scale} must be positive and finite, got", a, rest(r), **{scale: scalar(make, 0.0)}),
            bad("target out of range", RuntimeError, "target must hold indices from 0 to C - 1 = 3, -1 or -100, got 4 at row 3", a, rest(r), target=torch.arange(1, 5)),
        ]
    if name != "siglip_loss":
        found += [
            bad("label_smoothing", ValueError, "label_smoothing must be at least 0 and below 1, got 1.0", a, rest(r), label_smoothing=1.0),
            bad("direction", ValueError, 'direction must be "both", "rows" or "columns", got str', a, rest(r), direction="left"),
            bad("label_smoothing is a string", TypeError, "label_smoothing must be a number, got str", a, rest(r), label_smoothing="some"),
        ]
    if form == "gram":
        found += [
            bad("others is empty", ValueError, "others must hold at least one tensor", a, ([],)),
            bad("mixed candidates", ValueError, r"others\[1\] must have as many candidates C as others\[0\] = 4, got", a, ([r, make.randn(5, 8)],)),
            bad("present of the wrong shape", ValueError, r"present must have shape \[C, m\]", a, ([r],), present=make.mask(4, 2)),
            bad("streaming k=9", ValueError, "implementation must not be 'streaming' for more than 7 others, got 8", a, ([r] * 8,), implementation="streaming"),
            bad("accuracy of k=9", ValueError, "return_accuracy must be False for more than 7 others, got 8", a, ([r] * 8,), return_accuracy=True),
            bad("eps", ValueError, "eps must be finite and 0 or more, got -1.0", a, ([r],), eps=-1.0),
        ]
    if form == "triangle":
        found.append(bad("mixed candidates", ValueError, "v must have as many candidates C as u = 4, got", a, (r, make.randn(5, 8))))
    if form == "product":
        found += [
            bad("negatives", ValueError, "negatives must have x's width D = 8, got", a, (r,), negatives=make.randn(3, 7)),
            bad("logit_bias", ValueError, "logit_bias must be finite, got nan", a, (r,), logit_bias=float("nan")),
            bad("negatives of three sides", TypeError, "negatives must be None, a tensor .* got tuple", a, (r,), negatives=(r, r, r)),
            bad("negatives of x", ValueError, r"negatives\[0\] must have x's width D = 8, got", a, (r,), negatives=(make.randn(3, 7), None)),
            bad("negatives is a number", TypeError, "negatives must be None, a tensor .* got int 3", a, (r,), negatives=3),
        ]
        ids = torch.arange(4, device=make.device)
        dense = [("implementation", "dense"), ("workspace_bytes", 1)] if name == "clip_loss" else []
        found += [
            bad("ids and target", ValueError, "positive_ids must be None together with target, got a int64 tensor", a, (r,), positive_ids=ids, target=ids),
            bad("ids of floats", TypeError, "positive_ids must be None, an int64 tensor", a, (r,), positive_ids=a[:, 0]),
            bad("ids of one side", TypeError, "positive_ids must be None, an int64 tensor .* got list", a, (r,), positive_ids=[ids]),
            bad("ids of rows", ValueError, r"positive_ids must have shape \[B\] = \[4\] for x, got", a, (r,), positive_ids=(ids[:3], ids)),
            bad("ids of candidates", ValueError, r"positive_ids must have shape \[C\] = \[5\] for y, got", a, (make.randn(5, 8),), positive_ids=ids),
            bad("ids elsewhere", ValueError, "positive_ids must be on the device of the other arguments", a, (r,), positive_ids=ids.to("meta")),
            *[
                bad(f"ids and {option}", ValueError, f"{option} must be left out together with positive_ids, got", a, (r,), positive_ids=ids, **{option: value})
                for option, value in [("return_accuracy", True), *dense]
            ],
        ]
        if name == "clip_loss":
            found.append(bad("ids, both directions, none", ValueError, 'reduction must be "mean" or "sum" for both', a, (r,), positive_ids=ids, reduction="none"))
        else:
            found += [
                bad("negatives of x, none", ValueError, 'reduction must be "mean" or "sum" together', a, (r,), negatives=(r, None), reduction="none"),
                bad("negatives of x, accuracy", ValueError, "return_accuracy must be False together", a, (r,), negatives=(r, None), return_accuracy=True),
            ]
    return found


def case(name: str, form: str, call: Callable, reference: Callable, formula: Callable) -> OpCase:
    def of(function: Callable) -> Callable:
        return partial(function, name, form)

    return OpCase(
        name=name,
        call=call,
        reference=reference,
        formula=formula,
        samples=of(samples),
        tiny=of(tiny),
        sized=of(sized),
        degenerate=of(degenerate),
        empty=of(empty),
        raw=of(raw),
        bad_inputs=of(bad_inputs),
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


CONTRASTIVE = [
    case("gram_contrastive_loss", "gram", ops.gram_contrastive_loss, reference_gram_contrastive_loss, formula_gram_contrastive_loss),
    case("triangle_contrastive_loss", "triangle", ops.triangle_contrastive_loss, reference_triangle_contrastive_loss, formula_triangle_contrastive_loss),
    case("clip_loss", "product", ops.clip_loss, reference_clip_loss, formula_clip_loss),
    case("siglip_loss", "product", ops.siglip_loss, reference_siglip_loss, formula_siglip_loss),
]


# ----------------------------------------------------------------------------------------------------------------- made of the kernels of the product form


def cosine_sum_samples(make: Maker) -> list[Sample]:
    def call(label: str, **options: object) -> Sample:
        given = options_of("cosine_sum_contrastive_loss", make) | options
        return Sample(label, (make.unit(15, 24), [make.unit(15, 24) for _ in range(3)]), given, slack=3)

    some = make.mask(15, 3)
    some[7] = False
    return [
        *samples("cosine_sum_contrastive_loss", "gram", make),
        call("as they are", normalize=False),
        call("mean", mean=True),
        call("mean, present", mean=True, present=some, target=targets(make, 15, 15)),
    ]


def cosine_sum_bad_inputs(make: Maker) -> list[BadInput]:
    a, r, name = make.randn(4, 8), make.randn(4, 8), "cosine_sum_contrastive_loss"
    of_volumes = ("streaming k=9", "accuracy of k=9", "eps", "target out of range")
    return [
        *(bad for bad in bad_inputs(name, "gram", make) if bad.sample.name not in of_volumes),
        BadInput(Sample("mean", (a, [r]), {"mean": "yes"}), TypeError, f"^{name}: mean must be True or False, got str"),
    ]


COSINE_SUM = replace(
    case(
        "cosine_sum_contrastive_loss",
        "gram",
        ops.cosine_sum_contrastive_loss,
        reference_cosine_sum_contrastive_loss,
        formula_cosine_sum_contrastive_loss,
    ),
    samples=cosine_sum_samples,
    raw=partial(raw, "cosine_sum_contrastive_loss", "product"),
    bad_inputs=cosine_sum_bad_inputs,
)


def rows_and_columns(op: Callable) -> Callable:
    """Both results one behind the other."""

    def joined(x: Tensor, y: Tensor, *, logit_scale: float | Tensor, logit_bias: float | Tensor | None = None) -> Tensor:
        return torch.cat(op(x, y, logit_scale=logit_scale, logit_bias=logit_bias))

    joined.__doc__ = op.__doc__
    return joined


def pairwise_samples(make: Maker) -> list[Sample]:
    def call(label: str, B: int, C: int, D: int, **options: object) -> Sample:
        return Sample(label, (make.unit(B, D), make.unit(C, D)), {"logit_scale": scalar(make, 8.0)} | options, slack=3)

    return [
        call("one tile", 9, 9, 16),
        call("ragged, bias", 67, 41, 33, logit_bias=scalar(make, -4.0)),
        call("B = 1", 1, 5, 12),
        call("a sharp scale", 33, 50, 40, logit_scale=scalar(make, 64.0)),
    ]


def pairwise_call(label: str, make: Maker, B: int, C: int, D: int, *, scale: float = 1.0) -> Sample:
    return Sample(label, (make.randn(B, D), make.randn(C, D)), {"logit_scale": scalar(make, scale), "logit_bias": scalar(make, 0.5)})


def pairwise_degenerate(make: Maker) -> list[Sample]:
    zoo = [Sample(name, (vectors[0], vectors[1]), {"logit_scale": scalar(make, 3.0)}) for name, vectors in degenerate_zoo(make, 2).items() if name not in (*NOT_FINITE, "huge")]
    return [*zoo, Sample("saturated", (make.unit(6, 12), make.unit(6, 12)), {"logit_scale": scalar(make, 1e4)})]


def pairwise_raw(make: Maker) -> list[tuple[object, tuple[object, ...]]]:
    forward, backward = (getattr(torch.ops.modalign, op).default for op in ("pairwise_logsumexp", "pairwise_logsumexp_bwd"))
    sums = [getattr(torch.ops.modalign, op).default for op in ("sum_of_equal_ids", "sum_of_equal_ids_bwd")]
    found: list[tuple[object, tuple[object, ...]]] = []
    x, y, scale, bias = make.unit(4, 12), make.unit(5, 12), scalar(make, 4.0), scalar(make, -1.0)
    for masks, b in (((None, None), None), ((make.mask(4), make.mask(5)), bias)):
        rows, columns = forward(x, y, scale, b, *masks)
        wanting = [None if tensor is None else tensor.clone().requires_grad_() for tensor in (x, y, scale, b)]
        found.append((forward, (*wanting, *masks)))
        for need in ((True, True), (True, False), (False, True), (False, False)):
            found.append((backward, (torch.ones_like(rows), torch.ones_like(columns), rows, columns, x, y, scale, b, *need)))
    ids = positive_ids(make, 6, 9)
    found.append((sums[0], (make.randn(9, 12).requires_grad_(), ids[1], ids[0])))
    found.append((sums[1], (make.randn(6, 12), ids[0], ids[1])))
    return found


def pairwise_bad_inputs(make: Maker) -> list[BadInput]:
    x, y = make.randn(4, 8), make.randn(5, 8)

    def bad(label: str, error: type[Exception], message: str, *args: object, **more: object) -> BadInput:
        return BadInput(Sample(label, args, {"logit_scale": 1.0} | more), error, "^pairwise_logsumexp: " + message)

    found = [
        bad("a list", TypeError, r"x must be a tensor \[B, D\], got list", [1.0], y),
        bad("integers", TypeError, "x must be float16, .* got a int64 tensor", x.long(), y),
        bad("three dimensions", ValueError, r"y must have 2 dimensions \[C, D\], got", x, y[None]),
        bad("mixed widths", ValueError, "y must have x's width D = 8, got", x, make.randn(5, 7)),
        bad("mixed dtypes", TypeError, "y must have x's dtype torch.float32, got torch.float64", x, y.double()),
        bad("a scale of 0", ValueError, "logit_scale must be positive and finite, got 0.0", x, y, logit_scale=0.0),
        bad("a scale of two", TypeError, "logit_scale must be a number or .* got a float32 tensor of shape", x, y, logit_scale=x[0, :2]),
        bad("a bias that is no number", ValueError, "logit_bias must be finite, got nan", x, y, logit_bias=float("nan")),
    ]
    if make.device.type == "cpu":
        message = "clip_loss: logit_scale must be positive and finite, got"
        found.append(BadInput(Sample("a tensor scale of 0", (x, y), {"logit_scale": scalar(make, 0.0)}), RuntimeError, message))
    return found


PAIRWISE_LOGSUMEXP = OpCase(
    name="pairwise_logsumexp",
    call=rows_and_columns(ops.pairwise_logsumexp),
    reference=rows_and_columns(reference_pairwise_logsumexp),
    formula=rows_and_columns(formula_pairwise_logsumexp),
    samples=pairwise_samples,
    tiny=lambda make: [pairwise_call("tiny", make, 3, 4, 5), pairwise_call("one row", make, 1, 3, 4)],
    sized=lambda make, n: pairwise_call(f"n={n}", make, n, n + 2, n + 9),
    degenerate=pairwise_degenerate,
    empty=lambda make: [(pairwise_call("nothing at all", make, 0, 0, 8), (0,)), (pairwise_call("no rows", make, 0, 5, 8), (5,)), (pairwise_call("no candidates", make, 3, 0, 8), (3,))],
    raw=pairwise_raw,
    bad_inputs=pairwise_bad_inputs,
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

DERIVED = [COSINE_SUM, PAIRWISE_LOGSUMEXP]
