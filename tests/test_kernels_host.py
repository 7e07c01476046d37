"""The CUDA kernels of the volume family and every form of the tile engine, run by the emulator with the launch plans of the device.

References are float64 numpy from the definitions (QR of the stacked vectors, the triangle's two edges), not the kernels' own formulas. An operand is
first rounded to the kernel's dtype, so that only the kernel's arithmetic is measured. Every launch also passes the emulator's checks: races between
blocks and threads, bounds, alignment, uninitialised words, barriers and lanes.
"""

import functools
import itertools

import numpy as np
import pytest

from modalign import _host
from mutations import SCHEDULES, check_mutations

DTYPES = ["f32", "f64", "f16", "bf16"]
EPSILON = {"f32": 1.2e-7, "f64": 2.3e-16, "f16": 1.2e-7, "bf16": 1.2e-7}  # of the arithmetic, not of the storage
# Largest deviation allowed, in units of the root mean square of the reference: what the operands' and the result's rounding can do with these sizes
# and with candidates of condition 200.
FORWARD = {"f32": 5e-6, "f64": 1e-13, "f16": 5e-3, "bf16": 4e-2}
BACKWARD = {"f32": 1e-4, "f64": 5e-12, "f16": 1e-2, "bf16": 8e-2}


def encode(dtype, x):
    if dtype == "bf16":
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.ascontiguousarray(x, {"f32": np.float32, "f64": np.float64, "f16": np.float16}[dtype])


def decode(dtype, x):
    if dtype == "bf16":
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def rounded(dtype, x):
    return decode(dtype, encode(dtype, x))


def deviation(got, want):
    """max |got - want| in units of the RMS of `want`; inf where one is NaN and the other not."""
    if want.size == 0:
        return 0.0
    if not np.array_equal(np.isnan(got), np.isnan(want)):
        return np.inf
    scale = np.sqrt(np.nanmean(want**2)) or 1.0
    return float(np.nanmax(np.abs(got - want))) / scale


# ----------------------------------------------------------------------------------------------------------------------------------------- references


def volume_reference(anchor, others, present, squared, upstream=None):
    """[N, B, D], [N, C, m, D], bool [N, C, m] -> value [N, B, C], d anchor, d others."""
    n, b, d = anchor.shape
    c, m = others.shape[1:3]
    stack = np.concatenate(
        [np.broadcast_to((others * present[..., None])[:, None], (n, b, c, m, d)), np.broadcast_to(anchor[:, :, None, None], (n, b, c, 1, d))], 3
    )
    # an absent vector becomes a direction of its own, outside the space
    stack = np.concatenate([stack, np.zeros((n, b, c, m + 1, m))], -1)
    for p in range(m):
        stack[..., p, d + p] = ~present[:, None, :, p]
    q, r = np.linalg.qr(stack.swapaxes(-1, -2))
    value = np.abs(np.prod(np.diagonal(r, axis1=-2, axis2=-1), -1))
    if upstream is None:
        return value**2 if squared else value
    gradient = np.linalg.solve(r, q.swapaxes(-1, -2))[..., :d] * (upstream * (2 * value**2 if squared else value))[..., None, None]
    return gradient[..., m, :].sum(2), gradient[..., :m, :].sum(1) * present[..., None]


def triangle_reference(anchor, others, present, squared, upstream=None):
    """Half the volume of (a - u, u - v) and its chain rule: QR here too, for the usual difference of products loses digits."""
    n, b, d = anchor.shape
    c = others.shape[1]
    p = np.broadcast_to(anchor[:, :, None] - others[:, None, :, 0], (n, b, c, d))
    q = np.broadcast_to((others[:, :, 0] - others[:, :, 1])[:, None], (n, b, c, d))
    q_factor, r = np.linalg.qr(np.stack([q, p], -1))
    area = np.abs(np.prod(np.diagonal(r, axis1=-2, axis2=-1), -1)) / 2
    if upstream is None:
        return area**2 if squared else area
    gradient = np.linalg.solve(r, q_factor.swapaxes(-1, -2)) * (upstream * (2 * area**2 if squared else area))[..., None, None]
    dq, dp = gradient[..., 0, :], gradient[..., 1, :]
    return dp.sum(2), np.stack([(dq - dp).sum(1), -dq.sum(1)], 2)


REFERENCE = {"gram_volume": volume_reference, "triangle_area": triangle_reference}


# ---------------------------------------------------------------------------------------------------------------------------------------------- pairs


def nearly_dependent(vectors, rng):
    """[..., m, D]: vector 1 becomes vector 0 and a small part where vector 0 is zero, so that rounding to a short dtype keeps the small angle."""
    vectors = vectors.copy()
    vectors[..., 0, ::2] = 0
    vectors[..., 1, :] = vectors[..., 0, :]
    vectors[..., 1, ::2] = 0.005 * rng.standard_normal(vectors[..., 1, ::2].shape)
    return vectors


class Pairs:
    """One random problem: some candidates nearly dependent, some anchors nearly in the span of their candidate (recomputed pairs)."""

    def __init__(self, op, dtype, N=1, B=1, C=1, D=8, m=2, seed=0, absent=False, squared=False, near=True):
        rng = np.random.default_rng([seed, N, B, C, D, m])
        self.op, self.dtype, self.N, self.B, self.C, self.D, self.squared = op, dtype, N, B, C, D, squared
        self.m = m = 2 if op == "triangle_area" else m
        anchor, others = rng.standard_normal((N, B, D)), rng.standard_normal((N, C, m, D))
        if near and m + 1 < D:
            small = 0.005 if dtype == "f64" else 0.05
            for i in range(0, min(B, C), 3):
                inside = others[:, i].sum(1) if op == "gram_volume" else others[:, i, 0] * 2 - others[:, i, 1]
                anchor[:, i] = inside + small * rng.standard_normal((N, D))
            if op == "gram_volume" and m > 1:
                others[:, 1::5] = nearly_dependent(others[:, 1::5], rng)
        scale = 1.3 / np.sqrt(max(D, 1))
        self.anchor, self.others = rounded(dtype, scale * anchor), rounded(dtype, scale * others)
        self.present = rng.random((N, C, m)) < 0.6 if absent else np.ones((N, C, m), bool)
        self.masked = absent
        self.upstream = rounded(dtype, rng.standard_normal((N, B, C)))

    def sizes(self):
        return dict(N=self.N, B=self.B, C=self.C, D=self.D, m=self.m, squared=self.squared, eps=1e-24 if self.dtype == "f64" else 1e-12)

    def forward_arguments(self):
        arguments = dict(self.sizes(), anchor=encode(self.dtype, self.anchor))
        for p in range(self.m):
            arguments[f"other{p}"] = encode(self.dtype, self.others[:, :, p])
        if self.masked:
            arguments["present"] = self.present
        return arguments

    def backward_arguments(self, saved, need_anchor=True, need_others=True, workspace_bytes=1 << 26):
        return dict(
            self.sizes(),
            anchor=encode(self.dtype, self.anchor),
            grad=encode(self.dtype, self.upstream),
            basis=saved["basis"],
            factor=saved["factor"],
            need_anchor=need_anchor,
            need_others=need_others,
            workspace_bytes=workspace_bytes,
        )

    def want_value(self):
        return REFERENCE[self.op](self.anchor, self.others, self.present, self.squared)

    def want_gradients(self):
        return REFERENCE[self.op](self.anchor, self.others, self.present, self.squared, self.upstream)

    def forward(self, key=None, arguments=None, **options):
        return _host.run(key or f"{self.op}.forward.{self.dtype}", arguments or self.forward_arguments(), **options)

    def backward(self, saved, key=None, arguments=None, **options):
        return _host.run(key or f"{self.op}.coefficients.{self.dtype}", arguments or self.backward_arguments(saved), **options)

    def forward_deviation(self, outputs):
        """Worst deviation over value and saved tensors, in units of what is allowed."""
        worst = deviation(decode(self.dtype, outputs["value"]), self.want_value()) / FORWARD[self.dtype]
        if self.op == "gram_volume" and self.m <= self.D:
            q = outputs["basis"].astype(np.float64)
            gram = q @ q.swapaxes(-1, -2)
            unit = np.eye(self.m) * self.present[..., None]
            worst = max(worst, float(np.abs(gram - unit).max(initial=0)) / (24 * EPSILON[self.dtype]))
            rebuilt = outputs["factor"].astype(np.float64) @ q
            worst = max(worst, float(np.abs(rebuilt - self.others * self.present[..., None]).max(initial=0)) / (24 * EPSILON[self.dtype]))
        return worst

    def backward_deviation(self, outputs):
        want = dict(zip(("grad_anchor", "grad_others"), self.want_gradients(), strict=True))
        return max(deviation(decode(self.dtype, got), want[name]) for name, got in outputs.items()) / BACKWARD[self.dtype]


SHAPES = {
    "one tile": dict(B=5, C=7, D=11, m=3),
    "3x2 tiles": dict(N=2, B=2 * 128 + 8, C=48, D=16, m=4),
    "ragged": dict(N=2, B=141, C=53, D=19, m=3),
}


@functools.cache
def solved(op, dtype, shape):
    """Forward and backward of one shape, checked against the reference; the keys that were launched."""
    pairs = Pairs(op, dtype, **SHAPES[shape], absent=shape == "ragged" and op == "gram_volume", squared=shape == "one tile")
    forward = pairs.forward()
    assert pairs.forward_deviation(forward.outputs) <= 1
    backward = pairs.backward(forward.outputs)
    assert pairs.backward_deviation(backward.outputs) <= 1
    return {launch["key"] for launch in [*forward.launches, *backward.launches]}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", REFERENCE)
def test_pairs_match_the_definition(op, dtype, shape):
    assert len(solved(op, dtype, shape)) == 2 + 7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", range(1, 8))
def test_every_number_of_modalities(dtype, m):
    pairs = Pairs("gram_volume", dtype, B=37, C=45, D=23, m=m, seed=m, absent=m % 2 == 0, squared=m % 3 == 0)
    forward = pairs.forward(**SCHEDULES["random"])
    assert pairs.forward_deviation(forward.outputs) <= 1
    assert pairs.backward_deviation(pairs.backward(forward.outputs, **SCHEDULES["random"]).outputs) <= 1


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_orders_and_seeds_give_the_same_bits(dtype):
    pairs = Pairs("gram_volume", dtype, N=2, B=137, C=44, D=13, m=3)
    first = None
    for options in SCHEDULES.values():
        forward = pairs.forward(**options)
        outputs = {**forward.outputs, **pairs.backward(forward.outputs, **options).outputs}
        first = first or outputs
        for name, array in outputs.items():
            assert array.tobytes() == first[name].tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", REFERENCE)
def test_misaligned_arrays(op, dtype):
    pairs = Pairs(op, dtype, N=2, B=19, C=21, D=24, m=2)
    forward = pairs.forward(offsets=dict(anchor=1, other0=1, other1=3))
    assert pairs.forward_deviation(forward.outputs) <= 1
    backward = pairs.backward(forward.outputs, offsets=dict(anchor=1, grad=1, basis=1, factor=1, grad_anchor=1))
    assert pairs.backward_deviation(backward.outputs) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_arrays(dtype):
    pairs = Pairs("gram_volume", dtype, N=2, B=9, C=12, D=16, m=2, absent=True)
    B, C, D = pairs.B, pairs.C, pairs.D
    transposed = dict(anchor=encode(dtype, pairs.anchor.swapaxes(1, 2)), anchor_batch_stride=B * D, anchor_row_stride=1, anchor_element_stride=B)
    wide = np.full((2, C, 3, D), np.nan)
    wide[:, :, 1] = pairs.others[:, :, 0]
    arguments = dict(
        pairs.forward_arguments(),
        **transposed,
        other0=encode(dtype, wide).reshape(-1)[D:],
        other0_batch_stride=C * 3 * D,
        other0_row_stride=3 * D,
        present=np.ascontiguousarray(pairs.present.transpose(2, 1, 0)),
        present_batch_stride=1,
        present_row_stride=2,
        present_element_stride=2 * C,
    )
    forward = pairs.forward(arguments=arguments)
    assert pairs.forward_deviation(forward.outputs) <= 1
    one = pairs.upstream[:, :1, :1]
    pairs.upstream = np.broadcast_to(one[:1], (2, B, C))
    arguments = dict(
        pairs.backward_arguments(forward.outputs),
        **transposed,
        grad=encode(dtype, one[:1]),
        grad_batch_stride=0,
        grad_row_stride=0,
        grad_element_stride=0,
    )
    assert pairs.backward_deviation(pairs.backward(forward.outputs, arguments=arguments).outputs) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", REFERENCE)
def test_row_panels_and_single_gradients(op, dtype):
    """Without workspace the rows are walked tile by tile and the problems one by one."""
    pairs = Pairs(op, dtype, N=2, B=300, C=9, D=10, m=2)
    saved = pairs.forward().outputs
    whole = pairs.backward(saved)
    panels = pairs.backward(saved, arguments=pairs.backward_arguments(saved, workspace_bytes=0))
    assert len(panels.launches) > 2 * len(whole.launches)
    assert pairs.backward_deviation(panels.outputs) <= 1
    for need in ("grad_anchor", "grad_others"):
        single = pairs.backward(
            saved, arguments=pairs.backward_arguments(saved, need_anchor=need == "grad_anchor", need_others=need == "grad_others")
        )
        assert list(single.outputs) == [need]
        assert single.outputs[need].tobytes() == whole.outputs[need].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("empty", ["N", "B", "C", "D"])
@pytest.mark.parametrize("op", REFERENCE)
def test_empty_sizes(op, dtype, empty):
    pairs = Pairs(op, dtype, **dict(dict(N=2, B=3, C=4, D=8, m=2), **{empty: 0}), near=False)
    forward = pairs.forward()
    assert not decode(dtype, forward.outputs["value"]).any()
    backward = pairs.backward(forward.outputs, key=f"{op}.prepare_bwd.{dtype}")
    for name, shape in dict(grad_anchor=(pairs.N, pairs.B, pairs.D), grad_others=(pairs.N, pairs.C, pairs.m, pairs.D)).items():
        assert backward.outputs[name].shape == shape
        assert not decode(dtype, backward.outputs[name]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_column_tiles_share_slots(dtype):
    """More column tiles than slots: a walk meets several tiles. The result is as for any other size."""
    pairs = Pairs("gram_volume", dtype, B=3, C=(66 * (64 if dtype == "f64" else 128)) // 7 + 5, D=24, m=7)
    forward = pairs.forward()
    assert pairs.forward_deviation(forward.outputs) <= 1
    backward = pairs.backward(forward.outputs)
    assert pairs.backward_deviation(backward.outputs) <= 1
    assert {launch["grid"][0] for launch in backward.launches if ".coefficients." in launch["key"]} <= set(range(1, 65))


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_long_vectors_stay_in_memory(dtype):
    """Rows too long for the registers of a warp."""
    pairs = Pairs("gram_volume", dtype, B=3, C=4, D=1100 if dtype == "f32" else 560, m=3)
    forward = pairs.forward()
    assert pairs.forward_deviation(forward.outputs) <= 1
    assert pairs.backward_deviation(pairs.backward(forward.outputs).outputs) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("squared", [False, True])
def test_degenerate_vectors_give_zero_and_no_gradient(dtype, squared):
    pairs = Pairs("gram_volume", dtype, B=6, C=8, D=12, m=2, near=False, squared=squared)
    pairs.anchor[0, 0] = 0
    pairs.anchor[0, 1] = pairs.others[0, 1, 0]  # identical
    pairs.anchor[0, 2] = -2 * pairs.others[0, 2, 1]  # antiparallel
    pairs.others[0, 3, 1] = pairs.others[0, 3, 0] * 2  # dependent candidate
    pairs.others[0, 4, 0] = 0
    forward = pairs.forward()
    value = decode(dtype, forward.outputs["value"])[0]
    zero = np.zeros((6, 8), bool)
    zero[0], zero[1, 1], zero[2, 2], zero[:, 3], zero[:, 4] = True, True, True, True, True
    assert not value[zero].any() and (value[~zero] > 0).all()
    # the gradient is that of the other pairs alone
    pairs.upstream = np.where(zero, 0, pairs.upstream)
    without = pairs.backward(forward.outputs).outputs
    pairs.upstream = np.where(zero, 1, pairs.upstream)
    outputs = pairs.backward(forward.outputs).outputs
    for name, array in outputs.items():
        assert np.isfinite(decode(dtype, array)).all()
        assert deviation(decode(dtype, array), decode(dtype, without[name])) <= 1e-6, name
    assert not decode(dtype, outputs["grad_others"])[0, 3:5].any() and not decode(dtype, outputs["grad_anchor"])[0, 0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 2, 3])
def test_more_vectors_than_dimensions(dtype, D):
    pairs = Pairs("gram_volume", dtype, B=5, C=6, D=D, m=3, near=False)
    forward = pairs.forward()
    assert not decode(dtype, forward.outputs["value"]).any()
    for array in pairs.backward(forward.outputs).outputs.values():
        assert not decode(dtype, array).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("op", REFERENCE)
def test_bad_numbers_stay_in_their_row_and_column(op, dtype, bad):
    pairs = Pairs(op, dtype, B=6, C=7, D=12, m=2, near=False)
    pairs.anchor[0, 2, 3] = bad
    pairs.others[0, 4, 1, 5] = bad
    value = decode(dtype, pairs.forward().outputs["value"])[0]
    expected = np.zeros((6, 7), bool)
    expected[2], expected[:, 4] = True, True
    assert np.array_equal(np.isnan(value), expected)


@pytest.mark.parametrize("dtype, huge", [("f32", 1e20), ("bf16", 1e20), ("f64", 1e160)])
@pytest.mark.parametrize("op", REFERENCE)
def test_an_overflow_is_never_a_perfect_match(op, dtype, huge):
    """|a|^2 beyond the accumulation type: infinite or NaN, never "near zero" and so 0."""
    pairs = Pairs(op, dtype, B=6, C=7, D=12, m=2, near=False)
    pairs.anchor[0, 2, 3] = huge
    value = decode(dtype, pairs.forward().outputs["value"])[0]
    assert not np.isfinite(value[2]).any() and np.isfinite(np.delete(value, 2, 0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_absent_vectors_are_never_read_into_a_result(dtype):
    pairs = Pairs("gram_volume", dtype, B=6, C=9, D=12, m=3, absent=True)
    clean = pairs.forward()
    arguments = pairs.forward_arguments()
    for p in range(pairs.m):
        arguments[f"other{p}"] = encode(dtype, np.where(pairs.present[:, :, p, None], pairs.others[:, :, p], np.nan))
    dirty = pairs.forward(arguments=arguments)
    for name, array in clean.outputs.items():
        assert array.tobytes() == dirty.outputs[name].tobytes(), name
    assert not decode(dtype, pairs.backward(clean.outputs).outputs["grad_others"])[~pairs.present].any()


@pytest.mark.parametrize("delta", [1e-2, 1e-3, 1e-4])
def test_recomputed_pairs_keep_their_digits(delta):
    """|a|^2 - |s|^2 alone would lose the value, the direct residual in the tile does not: fp32 unit vectors at distance delta from one direction."""
    pairs = Pairs("gram_volume", "f32", B=9, C=9, D=64, m=2, near=False)
    rng = np.random.default_rng(5)
    common = rng.standard_normal(64)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    pairs.anchor = rounded("f32", unit(common + delta * rng.standard_normal((1, 9, 64))))
    pairs.others = rounded("f32", unit(common + delta * rng.standard_normal((1, 9, 2, 64))))
    want, got = pairs.want_value(), pairs.forward().outputs["value"].astype(np.float64)
    assert np.abs(got / want - 1).max() < 1e-6 / delta
    gradients = pairs.backward(pairs.forward().outputs).outputs
    for got, want in zip((gradients["grad_anchor"], gradients["grad_others"]), pairs.want_gradients(), strict=True):
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-6 / delta


# --------------------------------------------------------------------------------------------------------------------------------------------- paired


class Paired:
    def __init__(self, dtype, N=7, D=10, k=3, squared=False, absent=False, seed=0):
        rng = np.random.default_rng([seed, N, D, k])
        self.dtype, self.N, self.D, self.k, self.squared = dtype, N, D, k, squared
        vectors = 1.3 / np.sqrt(max(D, 1)) * rng.standard_normal((N, k, D))
        if k > 1:
            vectors[::3] = nearly_dependent(vectors[::3], rng)
        self.vectors = rounded(dtype, vectors)
        self.present = rng.random((N, k)) < 0.6 if absent else np.ones((N, k), bool)
        self.masked = absent
        self.upstream = rounded(dtype, rng.standard_normal(N))

    def arguments(self):
        arguments = dict(N=self.N, D=self.D, k=self.k, squared=self.squared, grad=encode(self.dtype, self.upstream))
        for p in range(self.k):
            arguments[f"vector{p}"] = encode(self.dtype, self.vectors[:, p])
        if self.masked:
            arguments["present"] = self.present
        return arguments

    def want(self):
        n, k, d = self.vectors.shape
        stack = np.concatenate([self.vectors * self.present[..., None], np.zeros((n, k, k))], -1)
        for p in range(k):
            stack[:, p, d + p] = ~self.present[:, p]
        q, r = np.linalg.qr(stack.swapaxes(-1, -2))
        value = np.abs(np.prod(np.diagonal(r, axis1=-2, axis2=-1), -1))
        factor = 2 * value**2 if self.squared else value
        gradient = np.linalg.solve(r, q.swapaxes(-1, -2))[..., :d] * (factor * self.upstream)[:, None, None] * self.present[..., None]
        return (value**2 if self.squared else value), gradient

    def deviation(self, forward, backward):
        value, gradient = self.want()
        return max(
            deviation(decode(self.dtype, forward["value"]), value) / FORWARD[self.dtype],
            deviation(decode(self.dtype, backward["grad_vectors"]), gradient) / BACKWARD[self.dtype],
        )


@functools.cache
def solved_paired(dtype, shape):
    sizes = {"one tile": dict(N=3), "3x2 tiles": dict(N=21, D=33, k=5), "ragged": dict(N=11, D=45, k=4, squared=True, absent=True)}
    paired = Paired(dtype, **sizes[shape])
    forward, backward = (_host.run(f"paired_gram_volume.{which}.{dtype}", paired.arguments()) for which in ("forward", "backward"))
    assert paired.deviation(forward.outputs, backward.outputs) <= 1
    return {launch["key"] for launch in [*forward.launches, *backward.launches]}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_paired_matches_the_definition(dtype, shape):
    assert len(solved_paired(dtype, shape)) == 2


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_paired_every_number_of_vectors(dtype, k):
    paired = Paired(dtype, N=6, D=14, k=k, absent=k % 2 == 0)
    options = dict(SCHEDULES["random"], offsets=dict(vector0=1, grad=1))
    forward, backward = (_host.run(f"paired_gram_volume.{which}.{dtype}", paired.arguments(), **options).outputs for which in ("forward", "backward"))
    assert paired.deviation(forward, backward) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_paired_edges(dtype):
    paired = Paired(dtype, N=5, D=6, k=3)
    paired.vectors[1, 2] = paired.vectors[1, 0]  # dependent
    paired.vectors[2, 1] = 0
    paired.vectors[4, 0, 0] = np.nan
    paired.masked, paired.present[3] = True, False  # nothing present: the empty determinant
    forward, backward = (
        decode(dtype, _host.run(f"paired_gram_volume.{which}.{dtype}", paired.arguments()).outputs[name])
        for which, name in (("forward", "value"), ("backward", "grad_vectors"))
    )
    assert forward[1] == 0 and forward[2] == 0 and forward[3] == 1 and np.isnan(forward[4]) and forward[0] > 0
    assert not backward[1:4].any() and np.isfinite(backward[0]).all() and np.isnan(backward[4]).all()
    for sizes in (dict(N=0), dict(D=0)):
        paired = Paired(dtype, **sizes)
        for which in ("forward", "backward"):
            for array in _host.run(f"paired_gram_volume.{which}.{dtype}", paired.arguments()).outputs.values():
                assert not decode(dtype, array).any()


# ----------------------------------------------------------------------------------------------------------------------------------------- tile forms

SOURCES = {"f32": "f32", "f64": "f64", "f16": "f16", "bf16": "bf16", "bf16x2": "bf16"}
# Largest deviation allowed, times the length of the rows and columns (absolute for a product).
PRODUCT = {"f32": 2e-7, "f64": 5e-16, "f16": 2e-7, "bf16": 2e-7, "bf16x2": 1e-5}
FORM_SHAPES = {
    "one tile": dict(batches=1, rows=5, columns=7, depth=3),
    "3x2 tiles": dict(batches=2, rows=260, columns=136, depth=32),
    "ragged": dict(batches=2, rows=141, columns=203, depth=45),
}


def planes(precision, x):
    """The operand as the kernel takes it, and its exact value."""
    if precision != "bf16x2":
        return encode(precision, x), rounded(precision, x)
    x = rounded("f32", x)
    high = rounded("bf16", x)
    return np.stack([encode("bf16", high), encode("bf16", x - high)]), x


class Form:
    def __init__(self, key, batches, rows, columns, depth, pad=0, width=21, max_walks=64, accumulate=False):
        rng = np.random.default_rng([rows, columns, depth])
        self.key, self.precision = key, key.rsplit(".", 1)[1]
        self.lines = "lines" in key
        x, y, v = (rng.standard_normal((batches, *shape)) for shape in ((rows, depth), (columns, depth), (columns, width)))
        source = SOURCES[self.precision]
        self.arguments = dict(
            batches=batches,
            rows=rows,
            columns=columns,
            depth=depth,
            pad=pad,
            scale=0.3,
            max_walks=max_walks,
            width=width,
            factor=-1.0,
            accumulate=accumulate,
        )
        self.real = "f64" if self.precision == "f64" else "f32"
        addend = encode(self.real, rng.standard_normal((batches, rows, columns)))
        for name, array in (("row_operand", x), ("column_operand", y)):
            array = array.swapaxes(1, 2) if self.lines else array
            encoded, exact = planes(self.precision, array)
            exact = exact.swapaxes(1, 2) if self.lines else exact
            if pad:
                filled = encode(source, np.full((*encoded.shape[:-1], encoded.shape[-1] + pad), np.nan))
                filled[..., : encoded.shape[-1]] = encoded
                encoded = filled
            self.arguments[name] = encoded
            x, y = (exact, y) if name == "row_operand" else (x, exact)
        self.z = np.einsum("bik,bjk->bij", x, y)
        if "value_product" in key:
            self.arguments["values"], v = planes(self.precision, v)
            self.want = {"out": np.exp(0.3 * self.z) @ v}
            magnitude = np.exp(0.3 * self.z) @ np.abs(v)
            self.allowed = {"out": {"f32": 1e-5, "f64": 1e-13, "bf16": 1e-2, "bf16x2": 2e-4}[self.precision] * magnitude + 1e-30}
        elif "log_sum_exp" in key:
            z = 0.3 * self.z
            with np.errstate(divide="ignore"):  # a sum over nothing
                self.want = {"row": np.log(np.exp(z).sum(2)), "column": np.log(np.exp(z).sum(1))}
            self.allowed = {"row": 1e-12 if self.precision == "f64" else 1e-5, "column": 1e-12 if self.precision == "f64" else 1e-5}
        else:
            self.arguments["addend"] = addend
            length = np.linalg.norm(x, axis=2)[:, :, None] * np.linalg.norm(y, axis=2)[:, None]
            self.want = {"out": addend - self.z * (2 if accumulate else 1)}
            self.allowed = {"out": PRODUCT[self.precision] * (length + np.abs(addend)) * 4}

    def run(self, **options):
        return _host.run(self.key, self.arguments, **options)

    def deviation(self, outputs):
        if "log_sum_exp" in self.key:
            outputs = {
                side: outputs[f"{side}_max"].astype(np.float64) + np.log(outputs[f"{side}_sum"].astype(np.float64)) for side in ("row", "column")
            }
        worst = 0.0
        for name, want in self.want.items():
            error = np.abs(outputs[name].astype(np.float64) - want) / self.allowed[name]
            worst = max(worst, float(error.max(initial=0)) if not np.isnan(error).any() else np.inf)
        return worst


FORMS = sorted(key for key, kernel in _host.kernels().items() if kernel["family"] == "tile")


@functools.cache
def solved_form(key, shape):
    form = Form(key, **FORM_SHAPES[shape])
    result = form.run()
    assert form.deviation(result.outputs) <= 1
    return {launch["key"] for launch in result.launches}


@pytest.mark.parametrize("shape", FORM_SHAPES)
@pytest.mark.parametrize("key", FORMS)
def test_forms_match_numpy(key, shape):
    assert key in solved_form(key, shape)


@pytest.mark.parametrize("key", FORMS)
def test_forms_padded_misaligned_and_empty(key):
    padded = Form(key, batches=2, rows=21, columns=30, depth=24, pad=8 if "f64" not in key else 2)  # vectors still possible
    assert padded.deviation(padded.run().outputs) <= 1
    odd = Form(key, batches=2, rows=21, columns=30, depth=24, pad=3)
    assert odd.deviation(odd.run().outputs) <= 1
    misaligned = Form(key, batches=2, rows=21, columns=30, depth=24)
    assert misaligned.deviation(misaligned.run(offsets=dict(row_operand=1, column_operand=1, values=1, out=1), **SCHEDULES["reverse"]).outputs) <= 1
    for empty in ("rows", "columns", "depth"):
        form = Form(key, **dict(dict(batches=2, rows=6, columns=5, depth=4), **{empty: 0}))
        if "log_sum_exp" in key and empty != "depth":  # a sum over nothing is (0, 0)
            side = "column" if empty == "rows" else "row"
            outputs = form.run().outputs
            assert not outputs[f"{side}_sum"].any()
        else:
            assert form.deviation(form.run().outputs) <= 1


@pytest.mark.parametrize("key", [key for key in FORMS if ".product" in key])
def test_store_accumulates_into_its_output(key):
    form = Form(key, batches=1, rows=130, columns=9, depth=21, accumulate=True)
    assert form.deviation(form.run(**SCHEDULES["random"]).outputs) <= 1


@pytest.mark.parametrize("max_walks", [1, 2, 64])
@pytest.mark.parametrize("key", [key for key in FORMS if ".log_sum_exp" in key])
def test_statistics_for_any_number_of_slots(key, max_walks):
    first = None
    for options in SCHEDULES.values():
        form = Form(key, batches=1, rows=300, columns=260, depth=7, max_walks=max_walks)
        outputs = form.run(**options).outputs
        assert form.deviation(outputs) <= 1
        first = first or outputs
        assert all(outputs[name].tobytes() == first[name].tobytes() for name in outputs)


# ------------------------------------------------------------------------------------------------------------------------------ the whole catalogue

OWN = sorted(
    key
    for key, kernel in _host.kernels().items()
    if kernel["family"] in ("gram_volume", "triangle_area", "pair_product", "paired_gram_volume", "tile")
)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_instance_has_run(shape):
    """A key of the compiled table that no case above launches fails here."""
    seen = set()
    for dtype in DTYPES:
        seen |= solved_paired(dtype, shape)
        for op in REFERENCE:
            seen |= solved(op, dtype, shape)
    for key in FORMS:
        seen |= solved_form(key, shape)
    assert set(OWN) - seen == set()


# ------------------------------------------------------------------------------------------------------------------------------------------ mutations


# Not a multiple of the slab (8, 32), yet of the widest load, so that the fast loaders meet the edge.
RAGGED_DEPTH = {"f32": 44, "f64": 44, "f16": 40, "bf16": 40, "bf16x2": 40}
# Places whose breaking changes nothing that a kernel promises, and why.
HARMLESS = {
    ("coefficients", "tile: drop the barrier after the epilogue"),  # reached by walks of several tiles alone: the test below
    ("log_sum_exp", "tile: drop the barrier after the epilogue"),  # this epilogue has left the tile before a barrier of its own
    # the second pass moves the volume by rounding only; `prepare` returns the basis, where it shows
    ("paired_gram_volume", "gram-schmidt: one pass only"),
}


@functools.cache
def breakable(key):
    """A case that passes every marked place of the kernel, and how far its result is from right (units of what is allowed)."""
    family, kernel, dtype = key.split(".")
    if family == "tile":
        form = Form(key, batches=1, rows=144, columns=200, depth=RAGGED_DEPTH[dtype], max_walks=1, width=24)
        return form.run, form.deviation
    if family == "paired_gram_volume":
        paired = Paired(dtype, N=11, D=45, k=4)
        good = {which: _host.run(f"paired_gram_volume.{which}.{dtype}", paired.arguments()).outputs for which in ("forward", "backward")}
        return functools.partial(_host.run, key, paired.arguments()), lambda outputs: paired.deviation(**dict(good, **{kernel: outputs}))
    op = "gram_volume" if family == "pair_product" else family
    pairs = Pairs(op, dtype, B=141, C=53, D=RAGGED_DEPTH[dtype], m=3)
    if kernel in ("prepare", "forward"):
        return functools.partial(pairs.forward, key=key), pairs.forward_deviation
    saved = pairs.forward().outputs
    return functools.partial(pairs.backward, saved, key=key), pairs.backward_deviation


@pytest.mark.parametrize("key", OWN)
def test_seeded_mutations_are_caught(key):
    run, deviation_of = breakable(key)
    check_mutations(key, run, lambda outputs: deviation_of(outputs) <= 1, [place for part, place in HARMLESS if part in key.split(".")])


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
def test_mutation_between_the_tiles_of_a_walk(dtype):
    """Only a walk of several tiles (more than 64 along the columns) needs the barrier behind an epilogue."""
    pairs = Pairs("gram_volume", dtype, B=3, C=(66 * (64 if dtype == "f64" else 128)) // 7 + 5, D=9, m=7, near=False)
    saved = pairs.forward().outputs
    with pytest.raises(_host.KernelReport, match="race_shared"):
        pairs.backward(saved, mutation="tile: drop the barrier after the epilogue")


def test_every_kernel_can_be_broken():
    """Each kernel of the table has marked places, whatever its dtype."""
    kernels = {}
    for key in OWN:
        if key.endswith((".f32", ".bf16x2")):
            breakable(key)[0]()
            kernels.setdefault(key.rsplit(".", 1)[0], set()).update(_host.mutations(key))
    assert not [kernel for kernel, places in kernels.items() if not places]
    assert len(set(itertools.chain.from_iterable(kernels.values()))) >= 25
