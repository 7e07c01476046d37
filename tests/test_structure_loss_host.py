"""The CUDA kernels of structure_loss, run by the emulator with the launch plans of the device.

References are float64 numpy from the definitions in csrc/ops/structure_loss.h. Every launch also passes the emulator's checks: races between blocks and threads, bounds, alignment,
uninitialised words, barriers and lanes.
"""

import functools

import numpy as np
import pytest

from modalign import _host
from mutations import SCHEDULES, check_mutations
from test_kernels_host import RAGGED_DEPTH, deviation

OWN = sorted(key for key, kernel in _host.kernels().items() if kernel["family"] == "structure_loss")
REAL = {"f32": np.float32, "f64": np.float64}
LOSS = {"f32": 6e-6, "f64": 1e-12}  # of the largest loss and of a gradient's root mean square
GRADIENT = {"f32": 3e-5, "f64": 1e-11}
DIVERGENCES = ("js", "released")


def divergence(log_p, log_q, kind):
    """The losses of the rows, and F = Q dR/dQ of the second argument."""
    p, q = np.exp(log_p), np.exp(log_q)
    if kind == "js":
        log_m = np.logaddexp(log_p, log_q) - np.log(2)
        return (p * (log_p - log_m) + q * (log_q - log_m)).sum(1) / 2, q * (log_q - log_m) / 2
    m, p_, q_ = (p + q) / 2 + 1e-12, p + 1e-12, q + 1e-12
    rest = np.log(m) - (np.log(p_) + np.log(q_)) / 2
    return (m * rest).sum(1), q * (rest + (1 - p_ / q_) / 2) / 2


class Structure:
    """A batch whose logits are about as large as those of a temperature of 0.05."""

    def __init__(self, dtype, kind, B, Dx=9, Dy=5, size=10.0, seed=0):
        rng = np.random.default_rng([seed, B, Dx, Dy])
        self.dtype, self.kind, self.B = dtype, kind, B

        def rows(D):
            drawn = rng.standard_normal((B, D))
            return (drawn * np.sqrt(size) / np.maximum(np.linalg.norm(drawn, axis=1, keepdims=True), 1e-9)).astype(REAL[dtype])

        self.x, self.y, self.grad = rows(Dx), rows(Dy), rng.standard_normal(B).astype(REAL[dtype])

    def arguments(self, **more):
        return dict(B=self.B, Dx=self.x.shape[1], Dy=self.y.shape[1], x=self.x, y=self.y) | more

    def forward(self, key=None, keep=False, **options):
        return _host.run(key or f"structure_loss.rows.{self.kind}.{self.dtype}", self.arguments(keep=keep, **options.pop("more", {})), **options)

    def backward(self, key=None, need_x=True, need_y=True, kept=False, **options):
        given = dict(grad=self.grad, statistics=self.want[1] if kept else self.statistics, need_x=need_x, need_y=need_y, products=self.products if kept else None) | options.pop("more", {})
        return _host.run(key or f"structure_loss.coefficients.{self.kind}.{self.dtype}", self.arguments(**given), **options)

    @functools.cached_property
    def statistics(self):
        """As the kernel's own forward leaves them. (Kept products are exact here, and go with exact statistics.)"""
        return self.forward().outputs["statistics"]

    @functools.cached_property
    def products(self):
        """As a forward keeps them; NaN beside them, which nobody may read into a result."""
        pitch = -(-self.B // 96) * 96
        kept = np.full((2, pitch, pitch), np.nan, REAL[self.dtype])
        for side, z in enumerate((self.x, self.y)):
            kept[side, : self.B, : self.B] = z.astype(float) @ z.T.astype(float)
        return kept.reshape(-1)

    @functools.cached_property
    def want(self):
        """loss [B], statistics [4, B], grad_x, grad_y."""
        logits = [z.astype(float) @ z.T.astype(float) for z in (self.x, self.y)]
        lse = [np.log(np.exp(s - s.max(1, keepdims=True)).sum(1)) + s.max(1) for s in logits]
        logs = [s - sum_[:, None] for s, sum_ in zip(logits, lse, strict=True)]
        loss, f_y = divergence(*logs, self.kind)
        _, f_x = divergence(*reversed(logs), self.kind)
        gradients = []
        for f, log, z in ((f_x, logs[0], self.x), (f_y, logs[1], self.y)):
            ds = self.grad[:, None].astype(float) * (f - np.exp(log) * f.sum(1, keepdims=True))
            gradients.append((ds + ds.T) @ z.astype(float))
        return loss, np.stack([*lse, f_x.sum(1), f_y.sum(1)]), *gradients

    def is_right(self, outputs):
        if "loss" in outputs:
            statistics = np.abs(outputs["statistics"] - self.want[1]).max()
            return bool(np.abs(outputs["loss"] - self.want[0]).max() <= LOSS[self.dtype] * np.abs(self.want[0]).max() and statistics <= 10 * LOSS[self.dtype])
        pairs = zip(("grad_x", "grad_y"), self.want[2:], strict=True)
        return all(deviation(outputs[name].astype(float), want) <= GRADIENT[self.dtype] for name, want in pairs if name in outputs)


SHAPES = {"one": dict(B=1), "few": dict(B=7, Dx=3, Dy=70), "ragged": dict(B=145, Dx=9, Dy=5), "pieces": dict(B=20, Dx=300, Dy=513)}


@functools.cache
def solved(dtype, kind, shape):
    problem = Structure(dtype, kind, **SHAPES[shape])
    runs = [problem.forward(), problem.forward(keep=True), problem.backward(), problem.backward(kept=True)]
    assert all(problem.is_right(run.outputs) for run in runs)
    assert all(runs[0].outputs[name].tobytes() == runs[1].outputs[name].tobytes() for name in ("loss", "statistics"))
    return {launch["key"] for run in runs for launch in run.launches}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", REAL)
def test_kernels_match_the_definition(dtype, kind, shape):
    assert len(solved(dtype, kind, shape)) == 4


def test_every_instance_has_run():
    assert set(OWN) <= set().union(*(solved(dtype, kind, shape) for dtype in REAL for kind in DIVERGENCES for shape in SHAPES))


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", REAL)
def test_panels_do_not_show(dtype, kind):
    problem = Structure(dtype, kind, **SHAPES["ragged"])
    for run in (problem.forward, problem.backward):
        whole, panels = run(), run(more=dict(budget=1))
        assert problem.is_right(panels.outputs) and len(panels.launches) > len(whole.launches)
        assert all(whole.outputs[name].tobytes() == panels.outputs[name].tobytes() for name in whole.outputs)


@pytest.mark.parametrize("dtype", REAL)
def test_one_gradient_alone(dtype):
    problem = Structure(dtype, "js", B=30)
    both = problem.backward().outputs
    for name in ("x", "y"):
        alone = problem.backward(need_x=name == "x", need_y=name == "y").outputs
        assert list(alone) == [f"grad_{name}"] and alone[f"grad_{name}"].tobytes() == both[f"grad_{name}"].tobytes()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", REAL)
def test_schedules_strides_and_misalignment(dtype, schedule):
    problem = Structure(dtype, "released", B=37)

    def padded(rows, pitch):
        wide = np.full((rows.shape[0], pitch), np.nan, rows.dtype)
        wide[:, : rows.shape[1]] = rows
        return wide

    more = dict(x=padded(problem.x, 13), x_row_stride=13, y=padded(problem.y, 6), y_row_stride=6)
    moved = dict(SCHEDULES[schedule], offsets=dict(x=1, y=1, loss=1, grad_x=1, grad_y=1))
    assert problem.is_right(problem.forward(more=more, **moved).outputs)
    more |= dict(grad=np.repeat(problem.grad[:, None], 3, 1), grad_element_stride=3)
    assert problem.is_right(problem.backward(more=more, **moved).outputs)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", REAL)
def test_edges(dtype, kind):
    """Equal spaces: 0 and no gradient, exactly. Rows that see only themselves, and logits far beyond any exponential: finite."""
    same = Structure(dtype, kind, B=40, Dx=6, Dy=6)
    same.y = same.x
    assert (same.forward().outputs["loss"] == 0).all()
    backward = same.backward(more=dict(statistics=same.forward().outputs["statistics"])).outputs
    assert all(np.abs(one).max() < 1e-6 for one in backward.values())
    for size in (0.0, 1e-3, 300.0, 3000.0):
        problem = Structure(dtype, kind, B=24, Dx=4, Dy=3, size=size)
        outputs = problem.forward().outputs
        gradients = problem.backward(more=dict(statistics=outputs["statistics"])).outputs
        assert np.isfinite(outputs["loss"]).all() and all(np.isfinite(one).all() for one in gradients.values())
        if size <= 1e-3:
            np.testing.assert_allclose(outputs["loss"], problem.want[0], rtol=1e-3, atol=1e-30)  # losses of 1e-9: no digits are lost


def test_not_a_number_reaches_its_rows():
    problem = Structure("f32", "js", B=20)
    problem.x[3, 0] = np.nan
    assert np.isnan(problem.forward().outputs["loss"]).all()


# ------------------------------------------------------------------------------------------------------------------------------------------ mutations


@functools.cache
def broken_case(dtype, kind):
    return Structure(dtype, kind, B=145, Dx=RAGGED_DEPTH[dtype], Dy=7)


def breakable(key):
    dtype = key.rsplit(".", 1)[1]
    problem = broken_case(dtype, "released" if ".released." in key else "js")
    return functools.partial(problem.backward if ".coefficients." in key else problem.forward, key=key), problem


@pytest.mark.parametrize("key", OWN)
def test_seeded_mutations_are_caught(key):
    run, problem = breakable(key)
    check_mutations(key, run, problem.is_right)
