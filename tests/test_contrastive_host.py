"""The CUDA kernels of the contrastive losses, run by the emulator with the launch plans of the device.

The reference is the definition in float64: values by QR (test_kernels_host.py), losses by torch's logsumexp and softplus, gradients by its autograd
down to the values, not the kernels' own formulas. Rows without part and absent vectors hold NaN in every case that has them
(absent ones of the product form 0). Every launch also passes
the emulator's checks: races between blocks and threads, bounds, alignment, uninitialised words, barriers and lanes.
"""

import functools
import itertools

import numpy as np
import pytest
import torch
from gumbel import pair_noise
from mutations import SCHEDULES, check_mutations
from test_kernels_host import BACKWARD, DTYPES, FORWARD, RAGGED_DEPTH, REFERENCE, decode, deviation, encode, nearly_dependent, rounded

from modalign import _host

FORMS = ["volume", "triangle", "product"]
IGNORED = -100
SEED = -7_777_777_777_777  # both halves of the key


def pair_values(form, anchor, others, present, upstream=None):
    """[B, D], [C, m, D], bool [C, m] -> value [B, C], or with `upstream` d anchor, d others."""
    if form == "product":
        y = others[:, 0]
        return anchor @ y.T if upstream is None else (upstream @ y, (upstream.T @ anchor)[:, None])
    reference = REFERENCE["triangle_area" if form == "triangle" else "gram_volume"]
    result = reference(anchor[None], others[None], present[None], False, None if upstream is None else upstream[None])
    return result[0] if upstream is None else (result[0][0], result[1][0])


class Loss:
    """One random problem. labels: "own" (row i has label i) or "mixed": any column, duplicates, rows without part and indices beyond the columns."""

    def __init__(
        self,
        form,
        dtype,
        B=1,
        C=1,
        D=8,
        m=2,
        seed=0,
        labels="own",
        absent=False,
        smoothing=0.0,
        parts=(0.5, 0.5),
        sigmoid=False,
        bias=False,
        near=True,
        draws=None,
    ):
        rng = np.random.default_rng([seed, B, C, D, m])
        self.form, self.dtype, self.B, self.C, self.D = form, dtype, B, C, D
        self.m = m = {"triangle": 2, "product": 1}.get(form, m)
        self.smoothing, self.parts, self.sigmoid, self.draws = smoothing, parts, sigmoid, draws
        self.real = "f64" if dtype == "f64" else "f32"
        anchor, others = rng.standard_normal((B, D)), rng.standard_normal((C, m, D))
        if near and form != "product" and m + 1 < D:
            small = 0.005 if dtype == "f64" else 0.05
            for i in range(0, min(B, C), 3):  # far from their label, near another candidate
                j = (i + 1) % C
                inside = others[j, 0] * 2 - others[j, 1] if form == "triangle" else others[j].sum(0)
                anchor[i] = inside + small * rng.standard_normal(D)
            if form == "volume" and m > 1:
                others[1::5] = nearly_dependent(others[1::5], rng)
        size = 1.3 / np.sqrt(max(D, 1))
        self.anchor, self.others = rounded(dtype, size * anchor), rounded(dtype, size * others)
        self.present = rng.random((C, m)) < 0.6 if absent and form != "triangle" else np.ones((C, m), bool)
        self.masked = absent and form != "triangle"
        self.scale = float(np.float32(3.0 if form == "product" else -3.0))
        self.bias = float(np.float32(-0.7)) if bias else None
        if labels == "own":
            self.target = None
        else:
            self.target = rng.integers(0, max(C, 1), B)
            self.target[1::4] = self.target[0]  # duplicates
            self.target[2::7] = IGNORED
            self.target[3::11] = C + 5
            self.target[4::11] = -1
        self.set_labels()
        self.weight = rounded(self.real, rng.standard_normal(B))
        if not sigmoid:
            self.weight[self.label < 0] = 0

    def set_labels(self):
        targets = np.arange(self.B) if self.target is None else self.target
        self.rows, self.columns = targets != IGNORED, self.present.any(1)
        inside = (targets >= 0) & (targets < self.C)
        here = np.zeros(self.B, bool)
        here[inside] = self.columns[targets[inside]]
        self.label = np.where(self.rows & inside & here, targets, -1)

    # ------------------------------------------------------------------------------------------------------------------------------------- kernels

    def arguments(self):
        arguments = dict(B=self.B, C=self.C, D=self.D, m=self.m, sigmoid=self.sigmoid, form=self.form, dtype=self.dtype)
        arguments |= dict(label_smoothing=self.smoothing, row_part=self.parts[0], column_part=self.parts[1])
        arguments |= dict(eps=1e-24 if self.dtype == "f64" else 1e-12, scale=encode(self.real, [self.scale]))
        arguments["anchor"] = encode(self.dtype, np.where(self.rows[:, None], self.anchor, np.nan))
        for p in range(self.m):
            arguments[f"other{p}"] = encode(self.dtype, np.where(self.present[:, p, None], self.others[:, p], 0 if self.form == "product" else np.nan))
        if self.masked:
            arguments["present"] = self.present
        if self.bias is not None:
            arguments["bias"] = encode(self.real, [self.bias])
        if self.target is not None:
            arguments["target"] = self.target.astype(np.int64)
        if self.draws is not None:
            arguments["seed"] = np.array([self.draws])
        return arguments

    def backward_arguments(self, saved, need_anchor=True, need_others=True, workspace_bytes=1 << 26):
        columns = np.zeros(self.C)
        np.add.at(columns, self.label[self.label >= 0], self.weight[self.label >= 0])
        needs = dict(need_anchor=need_anchor, need_others=need_others, workspace_bytes=workspace_bytes)
        weights = dict(row_weight=encode(self.real, self.weight), column_weight=encode(self.real, columns))
        return {**self.arguments(), **weights, **needs, **{name: saved[name] for name in ("row_lse", "column_lse", "classes", "basis", "factor")}}

    def forward(self, key=None, arguments=None, **options):
        kernel = "forward" if self.draws is None else "draw"
        return _host.run(key or f"contrastive_{self.form}.{kernel}.{self.dtype}", arguments or self.arguments(), **options)

    def backward(self, saved, key=None, arguments=None, **options):
        return _host.run(key or f"contrastive_{self.form}.coefficients.{self.dtype}", arguments or self.backward_arguments(saved), **options)

    # ----------------------------------------------------------------------------------------------------------------------------------- reference

    @functools.cached_property
    def value(self):
        return pair_values(self.form, self.anchor, self.others, self.present)

    @functools.cached_property
    def want(self):
        """Everything that forward and backward return, by name; tensors of torch for the losses, whose autograd gives dL/dvalue."""
        value = torch.tensor(self.value, requires_grad=True)
        scale = torch.tensor(self.scale, dtype=torch.float64, requires_grad=True)
        bias = torch.tensor(self.bias or 0.0, dtype=torch.float64, requires_grad=True)
        rows, columns, label = torch.tensor(self.rows), torch.tensor(self.columns), torch.tensor(self.label)
        part = rows[:, None] & columns
        z = scale * value + bias
        masked = torch.where(part, z, -torch.inf)
        zero = torch.where(part, z, 0)
        labelled = label >= 0
        center = 0.0
        own = torch.where(labelled, z.gather(1, label.clamp(min=0)[:, None])[:, 0], 0) if self.C else z.new_zeros(self.B)
        if self.sigmoid:
            terms = torch.where(part, torch.nn.functional.softplus(z), 0)
            row_sum, column_sum = terms.sum(1), terms.sum(0)
            row_lse, column_lse = torch.where(rows, 0.0, -torch.inf), torch.where(columns, 0.0, -torch.inf)
            loss = row_sum - own
        else:
            row_sum, column_sum = zero.sum(1), zero.sum(0)
            row_lse, column_lse = torch.full((self.B,), -torch.inf, dtype=torch.float64), torch.full((self.C,), -torch.inf, dtype=torch.float64)
            if part.any():
                row_lse = torch.where(rows, masked[:, columns].logsumexp(1), -torch.inf)
                column_lse = torch.where(columns, masked[rows].logsumexp(0), -torch.inf)
                shift = (float(column_lse.detach()[columns].mean()) - np.log(self.rows.sum()) - float(bias.detach())) / self.scale
                center = shift if np.isfinite(shift) else 0.0
            n, k = max(int(columns.sum()), 1), max(int(rows.sum()), 1)
            at = label.clamp(min=0)
            if self.C:
                row_ce = row_lse - (1 - self.smoothing) * own - self.smoothing * row_sum / n
                column_ce = column_lse[at] - (1 - self.smoothing) * own - self.smoothing * column_sum[at] / k
                loss = torch.where(labelled, self.parts[0] * row_ce + self.parts[1] * column_ce, 0)
            else:
                loss = z.new_zeros(self.B)
        total = (loss[labelled | self.sigmoid] * torch.tensor(self.weight)[labelled | self.sigmoid]).sum()
        grads = torch.autograd.grad(total, [value, scale, bias], allow_unused=True) if total.requires_grad else [None] * 3
        dvalue, dscale, dbias = (torch.zeros_like(x) if g is None else g for g, x in zip(grads, (value, scale, bias), strict=True))
        names = dict(loss=loss, row_lse=row_lse, column_lse=column_lse, row_sum=row_sum, column_sum=column_sum, label=own)
        result = {name: tensor.detach().numpy() for name, tensor in names.items()}
        result["classes"] = np.array([self.columns.sum(), self.rows.sum(), (self.label >= 0).sum(), center], float)
        result["z"], result["grad_scale"] = z.detach().numpy(), np.array([float(dscale), float(dbias)])
        gradients = pair_values(self.form, self.anchor, self.others, self.present, torch.nan_to_num(dvalue).numpy())
        result["grad_anchor"], result["grad_others"] = gradients
        dz = torch.nan_to_num(dvalue) / self.scale
        result["grad_magnitude"] = float((dz * value.detach()).abs().sum()), float(dz.abs().sum())
        return result

    def logit_error(self):
        """What a logit may be off by: the rounding of values (measured in their RMS) times the scale."""
        return abs(self.scale) * (np.sqrt(np.mean(self.value**2)) if self.value.size else 0.0) * FORWARD[self.dtype] + 1e-300

    def forward_deviation(self, outputs):
        """Worst deviation over all outputs in units of what is allowed; inf where a best place is none, however logits are rounded."""
        want, error = self.want, self.logit_error()
        rounding = {"f64": 2.3e-16, "f32": 1.2e-7}[self.real]
        center = abs(outputs["classes"][3] - want["classes"][3]) <= (error + 40 * rounding) / abs(self.scale)
        if not (np.array_equal(outputs["classes"][:3], want["classes"][:3]) and center):
            return np.inf
        worst = 0.0
        for name, factor in dict(loss=2, row_lse=1, column_lse=1, row_sum=self.C, column_sum=self.B, label=1).items():
            got, right = outputs[name].astype(np.float64), want[name]
            if self.sigmoid and name == "loss":
                factor = self.C + 1
            if not np.array_equal(np.isfinite(got), np.isfinite(right)):
                return np.inf
            there = np.isfinite(right)
            allowed = factor * error + 40 * rounding * (1 + np.abs(right[there]) + (factor > 2) * np.sqrt(factor))
            worst = max(worst, float((np.abs(got[there] - right[there]) / allowed).max(initial=0)))
        return worst if self.best_holds(outputs, 2 * error) else np.inf

    def best_holds(self, outputs, tolerance):
        z = np.where(self.rows[:, None] & self.columns, self.want["z"], -np.inf)
        lines, labelled = (z, z.T), (np.flatnonzero(self.label >= 0), np.unique(self.label[self.label >= 0]))
        if self.draws is not None:
            z[np.flatnonzero(self.label >= 0), self.label[self.label >= 0]] = -np.inf
            rows, columns = z + pair_noise(self.draws, self.B, self.C)
            lines = rows, columns.T
            labelled = [np.flatnonzero((of_side > -np.inf).any(1)) for of_side in lines]
        for best, lines, labelled in zip((outputs["row_best"], outputs["column_best"]), lines, labelled, strict=True):
            if not np.array_equal(np.flatnonzero(best >= 0), labelled):
                return False
            if labelled.size and not (lines[labelled, best[labelled]] >= lines[labelled].max(1) - tolerance).all():
                return False
        return True

    def backward_deviation(self, outputs):
        worst = 0.0
        for name, got in outputs.items():
            want, got = self.want[name], (got.astype(np.float64) if name == "grad_scale" else decode(self.dtype, got))
            if name == "grad_scale":  # sums of terms of both signs
                allowed = BACKWARD[self.dtype] * (np.array(self.want["grad_magnitude"]) + 1e-300)
                worst = max(worst, float((np.abs(got - want) / allowed).max()) if not np.isnan(got).any() else np.inf)
            else:
                worst = max(worst, deviation(got, want) / BACKWARD[self.dtype])
        return worst


# Columns of one tile and a few more, whatever the tile of the dtype.
SHAPES = {
    "one tile": dict(B=5, C=7, D=11, m=3, smoothing=0.1, labels="mixed"),
    "3x2 tiles": dict(B=2 * 128 + 4, C=0, D=16, m=4, labels="own"),
    "ragged": dict(B=141, C=53, D=19, m=3, labels="mixed", absent=True, smoothing=0.1, parts=(0.25, 0.5), bias=True),
}


def sizes(form, shape):
    columns = {"volume": 40, "triangle": 70, "product": 140}[form]  # more than a tile of 128 / m candidates
    return SHAPES[shape] | (dict(C=columns) if shape == "3x2 tiles" else {})


@functools.cache
def solved(form, dtype, shape, sigmoid=False, draws=None):
    """Forward and backward of one shape, checked against the reference; the keys that were launched."""
    loss = Loss(form, dtype, **sizes(form, shape) | (dict(smoothing=0.0, sigmoid=True) if sigmoid else {}), draws=draws)
    forward = loss.forward()
    assert loss.forward_deviation(forward.outputs) <= 1
    backward = loss.backward(forward.outputs)
    assert loss.backward_deviation(backward.outputs) <= 1
    return {launch["key"] for launch in [*forward.launches, *backward.launches]}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_losses_match_the_definition(form, dtype, shape):
    solved(form, dtype, shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_draws_are_the_largest_with_noise(form, dtype, shape):
    solved(form, dtype, shape, draws=SEED)


@pytest.mark.parametrize("shape", ["one tile", "ragged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_matches_the_definition(dtype, shape):
    solved("product", dtype, shape, sigmoid=True)


OWN = sorted(key for key, kernel in _host.kernels().items() if kernel["family"].startswith("contrastive_"))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_instance_has_run(shape):
    """A key of the compiled table that no case above launches fails here."""
    seen = set().union(*(solved(form, dtype, shape, draws=draws) for form in FORMS for dtype in DTYPES for draws in (None, SEED)))
    assert set(OWN) - seen == set()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("m", range(1, 8))
def test_every_number_of_modalities(dtype, m):
    loss = Loss("volume", dtype, B=37, C=45, D=23, m=m, seed=m, absent=m % 2 == 0, labels="mixed" if m % 3 else "own", smoothing=0.1 * (m % 2))
    forward = loss.forward(**SCHEDULES["random"])
    assert loss.forward_deviation(forward.outputs) <= 1
    assert loss.backward_deviation(loss.backward(forward.outputs, **SCHEDULES["random"]).outputs) <= 1


@pytest.mark.parametrize("form, dtype", [("volume", "f32"), ("product", "bf16"), ("triangle", "f64")])
def test_orders_and_seeds_give_the_same_bits(form, dtype):
    loss = Loss(form, dtype, B=137, C=44, D=13, m=3, labels="mixed", smoothing=0.1)
    first = None
    for options in SCHEDULES.values():
        forward = loss.forward(**options)
        outputs = {**forward.outputs, **loss.backward(forward.outputs, **options).outputs}
        first = first or outputs
        for name, array in outputs.items():
            assert array.tobytes() == first[name].tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_misaligned_and_strided_arrays(form, dtype):
    loss = Loss(form, dtype, B=19, C=21, D=24, m=2, labels="mixed")
    offsets = dict(anchor=1, other0=1, other1=3, target=1, scale=1, row_weight=1)
    forward = loss.forward(offsets=offsets)
    assert loss.forward_deviation(forward.outputs) <= 1
    backward = loss.backward(forward.outputs, offsets=offsets | dict(basis=1, factor=1, grad_anchor=1, grad_others=1))
    assert loss.backward_deviation(backward.outputs) <= 1
    B, C, D = loss.B, loss.C, loss.D
    wide = np.full((C, 3, D), np.nan)
    wide[:, 1] = loss.others[:, 0]
    strided = dict(
        anchor=encode(dtype, np.where(loss.rows, loss.anchor.T, np.nan)),
        anchor_row_stride=1,
        anchor_element_stride=B,
        other0=encode(dtype, wide).reshape(-1)[D:],
        other0_row_stride=3 * D,
        target=np.repeat(loss.target, 2).astype(np.int64),
        target_row_stride=2,
    )
    again = loss.forward(arguments=loss.arguments() | strided)
    for name, array in forward.outputs.items():
        assert array.tobytes() == again.outputs[name].tobytes(), name
    again = loss.backward(forward.outputs, arguments=loss.backward_arguments(forward.outputs) | strided)
    for name, array in backward.outputs.items():
        assert array.tobytes() == again.outputs[name].tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_row_panels_and_single_gradients(form, dtype):
    """Without workspace the rows are walked tile by tile."""
    loss = Loss(form, dtype, B=270, C=9, D=10, m=2, labels="mixed")
    saved = loss.forward().outputs
    whole = loss.backward(saved)
    panels = loss.backward(saved, arguments=loss.backward_arguments(saved, workspace_bytes=0))
    assert len(panels.launches) > len(whole.launches)
    assert loss.backward_deviation(panels.outputs) <= 1
    for need in ("grad_anchor", "grad_others", "neither"):
        arguments = loss.backward_arguments(saved, need_anchor=need == "grad_anchor", need_others=need == "grad_others")
        single = loss.backward(saved, arguments=arguments)
        assert set(single.outputs) == {"grad_scale", need} - {"neither"}
        for name, array in single.outputs.items():
            assert array.tobytes() == whole.outputs[name].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("empty", ["B", "C", "D"])
@pytest.mark.parametrize("form", FORMS)
def test_empty_sizes(form, dtype, empty):
    loss = Loss(form, dtype, **dict(dict(B=3, C=4, D=8, m=2), **{empty: 0}), near=False)
    forward = loss.forward(key=f"contrastive_loss.classes.{loss.real}").outputs
    if empty == "D":
        np.testing.assert_allclose(forward["loss"], (np.log(4) + np.log(3)) / 2, rtol=1e-6)
    else:
        assert not forward["loss"].any() and (forward["row_lse"] == -np.inf).all() and (forward["column_lse"] == -np.inf).all()
    backward = loss.backward(forward, key=f"contrastive_loss.scale.{loss.real}").outputs
    for name, shape in dict(grad_anchor=(loss.B, loss.D), grad_others=(loss.C, loss.m, loss.D)).items():
        assert backward[name].shape == shape
        assert not decode(dtype, backward[name]).any()
    assert np.abs(backward["grad_scale"]).max() < 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_index(form, dtype):
    """Twin candidates and twin anchors have equal logits, also where one of them is the label and its loss uses a more exact one."""
    C = 150
    loss = Loss(form, dtype, B=6, C=C, D=12, m=2, near=False)
    twins = [2, 5, 60, 149]  # in one tile and in others
    loss.others[twins] = loss.others[2]
    inside = loss.others[2, 0] if form != "triangle" else (loss.others[2, 0] + loss.others[2, 1]) / 2
    loss.anchor[:] = rounded(dtype, 5 * inside if form == "product" else inside + 0.01 * loss.anchor)
    loss.anchor[4] = loss.anchor[3]
    loss.target = np.array([60, 5, 2, 149, 5, IGNORED])
    loss.set_labels()
    outputs = loss.forward().outputs
    assert outputs["row_best"].tolist() == [2, 2, 2, 2, 2, -1]
    best = outputs["column_best"]
    assert (best[twins] == best[2]).all() and best[2] != 4 and (np.delete(best, twins) == -1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_a_perfect_match_costs_nothing(form, dtype):
    """One row, one candidate: the loss is exactly 0, because the labelled pair has the same bits in its tile; also where it is far from zero."""
    for seed in range(3):
        loss = Loss(form, dtype, B=1, C=1, D=37, m=2, seed=seed, near=False)
        outputs = loss.forward().outputs
        assert outputs["loss"][0] == 0 and outputs["row_lse"][0] == outputs["label"][0] == outputs["column_lse"][0]
        assert outputs["row_best"][0] == outputs["column_best"][0] == 0


@pytest.mark.parametrize("side", ["row", "column"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_a_label_counts_once(form, dtype, side):
    loss = Loss(form, dtype, B=150, C=150, D=37, m=2, near=False)
    right, broken = loss.forward().outputs, loss.forward(mutation=f"logits: the label twice in its {side}").outputs
    assert loss.forward_deviation(right) <= 1 and (broken[f"{side}_lse"] > right[f"{side}_lse"]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_draws_its_own(form, dtype):
    loss = Loss(form, dtype, D=37, m=2, near=False, draws=SEED)
    right = loss.forward().outputs
    assert right["row_best"][0] == right["column_best"][0] == -1
    for side in ("row", "column"):
        assert loss.forward(mutation=f"draws: the own item of a {side}").outputs[f"{side}_best"][0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_a_nan_reaches_the_loss(form, dtype):
    loss = Loss(form, dtype, B=6, C=6, D=12, m=2, near=False)
    loss.anchor[2, 3] = np.nan
    outputs = loss.forward().outputs
    assert np.isnan(outputs["loss"]).all()  # row 2 by its row, the others by their columns
    assert np.isnan(outputs["row_lse"]).tolist() == [i == 2 for i in range(6)] and np.isnan(outputs["column_lse"]).all()
    assert outputs["row_best"][2] == 6 and (np.delete(outputs["row_best"], 2) < 6).all()  # a NaN is never the best
    assert np.isin(outputs["column_best"], [0, 1, 3, 4, 5]).all() and outputs["classes"][3] == 0


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_large_logits_do_not_overflow(dtype):
    for sigmoid in (False, True):
        loss = Loss("product", dtype, B=9, C=9, D=16, sigmoid=sigmoid)
        loss.scale = 4096.0
        outputs = loss.forward().outputs
        assert loss.forward_deviation(outputs) <= 1
        assert np.isfinite(outputs["loss"]).all()
        for array in loss.backward(outputs).outputs.values():
            assert np.isfinite(array).all()


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
def test_many_tiles_share_slots(dtype):
    """More tiles than slots along either side: a walk meets several. Statistics are as for any other size."""
    tile = 64 if dtype == "f64" else 128
    for sizes in (dict(B=3, C=33 * tile + 5), dict(B=33 * tile + 5, C=3)):
        loss = Loss("product", dtype, **sizes, D=4, labels="mixed", smoothing=0.1)
        forward = loss.forward()
        assert loss.forward_deviation(forward.outputs) <= 1
        assert {launch["grid"][0] for launch in forward.launches if ".forward." in launch["key"]} == {17}
        if dtype != "bf16":  # thousands of columns, nearly all of them with a gradient near zero: their RMS is no measure of the rounding of T
            assert loss.backward_deviation(loss.backward(forward.outputs).outputs) <= 1


# ------------------------------------------------------------------------------------------------------------------------------------------ mutations

# Places whose breaking changes nothing that a kernel promises, and why.
HARMLESS = {
    ("forward", "tile: drop the barrier after the epilogue"),  # reached by walks of several tiles alone: the test below
    ("forward", "logits: drop the barrier before the next row tile"),  # the same
    ("draw", "tile: drop the barrier after the epilogue"),
    ("draw", "logits: drop the barrier before the next row tile"),
    ("draw", "draws: the own item of a row"),  # which few rows would draw: test_nothing_draws_its_own
    ("draw", "draws: the own item of a column"),
    ("coefficients", "tile: drop the barrier after the epilogue"),
    ("bf16", "logits: the label twice in its column"),  # of 141 rows: below the rounding of bf16. test_a_label_counts_once
    ("bf16", "logits: the label twice in its row"),
}


@functools.cache
def broken_case(form, dtype, draws):
    """A case that passes every marked place of a kernel, and what it returns."""
    mixed = dict(labels="mixed", smoothing=0.1)
    loss = Loss(form, dtype, B=141, C=45, D=RAGGED_DEPTH[dtype], m=3, seed=1, draws=draws, **mixed)
    return loss, loss.forward().outputs


@functools.cache
def breakable(key):
    family, kernel, dtype = key.split(".")
    form = family.removeprefix("contrastive_").replace("loss", "product")
    loss, saved = broken_case(form, dtype, SEED if kernel == "draw" else None)
    if kernel in ("labels", "column_labels", "classes", "forward", "draw", "fold_columns", "fold_rows"):
        return functools.partial(loss.forward, key=key), loss.forward_deviation
    return functools.partial(loss.backward, saved, key=key), loss.backward_deviation


@pytest.mark.parametrize("key", OWN)
def test_seeded_mutations_are_caught(key):
    run, deviation_of = breakable(key)
    check_mutations(key, run, lambda outputs: deviation_of(outputs) <= 1, [place for part, place in HARMLESS if part in key.split(".")])


@pytest.mark.parametrize(
    "name, sizes",
    [("tile: drop the barrier after the epilogue", dict(B=3, C=2117)), ("logits: drop the barrier before the next row tile", dict(B=2117, C=3))],
)
def test_mutation_between_the_tiles_of_a_walk(name, sizes):
    """Only a walk of several tiles (more than 32 along a side) needs the barrier behind an epilogue."""
    with pytest.raises(_host.KernelReport, match="race_shared"):
        Loss("product", "f64", **sizes, D=4, labels="mixed").forward(mutation=name)


def test_every_kernel_can_be_broken():
    """Each kernel of the table has marked places, whatever its dtype."""
    kernels = {}
    for key in OWN:
        if key.endswith((".f32", "narrow.bf16")):
            breakable(key)[0]()
            kernels.setdefault(key.rsplit(".", 1)[0], set()).update(_host.mutations(key))
    assert not [kernel for kernel, places in kernels.items() if not places]
    assert len(set(itertools.chain.from_iterable(kernels.values()))) >= 20
