"""The CUDA kernels of masked_attention, run by the emulator with the launch plans of the device.

References are float64 numpy from the definitions in csrc/ops/masked_attention.h, with the matrix of kept pairs that `Mask.dense` writes down. Every launch also passes the emulator's
checks: races between blocks and threads, bounds, alignment, uninitialised words, barriers and lanes.
"""

import functools

import numpy as np
import pytest
import torch

from modalign import _host, masks
from mutations import SCHEDULES, check_mutations
from test_kernels_host import DTYPES, decode, deviation, encode
from test_masks import random_table, random_tokens

OWN = sorted(key for key, kernel in _host.kernels().items() if kernel["family"] == "masked_attention")
REAL = {"f32": np.float32, "f64": np.float64, "f16": np.float32, "bf16": np.float32}
BLOCK = {"f32": 128, "f64": 64, "f16": 128, "bf16": 128}
FORWARD = {"f32": 1e-5, "f64": 1e-13, "f16": 8e-3, "bf16": 5e-2}  # of the root mean square
BACKWARD = {"f32": 3e-5, "f64": 1e-12, "f16": 2e-2, "bf16": 0.15}
NAMES = ("query", "key", "value", "grad_out")


class Attention:
    """One call. bias: a shape, drawn with a fifth of -inf; mask: of modalign.masks; cu: offsets of queries and keys of packed sequences."""

    def __init__(self, dtype, B=1, H=1, Hkv=1, Nq=3, Nk=4, D=8, Dv=8, mask=None, bias=None, causal=0, lengths=None, cu=None, cap=0.0, scale=None, lse=False, seed=0):
        rng = np.random.default_rng([seed, B, H, Nq, Nk, D, Dv])
        self.dtype, self.mask, self.causal, self.lengths, self.cu, self.cap, self.scale = dtype, mask, causal, lengths, cu, cap, D**-0.5 if scale is None else scale
        shapes = ((B, H, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv), (B, H, Nq, Dv))
        self.given = {name: decode(dtype, encode(dtype, rng.standard_normal(shape))) for name, shape in zip(NAMES, shapes, strict=True)}
        self.bias = None if bias is None else np.where(rng.random(bias) < 0.2, -np.inf, rng.standard_normal(bias)).astype(REAL[dtype])
        self.grad_lse = rng.standard_normal((B, H, Nq)).astype(REAL[dtype]) if lse else None

    def arguments(self, names, **more):
        found = {name: encode(self.dtype, self.given[name]) for name in names}
        found |= dict(D=self.given["query"].shape[3], Dv=self.given["value"].shape[3], causal=self.causal, cap=self.cap, scale=self.scale, bias=self.bias, steps=[])
        if self.mask is not None:
            found |= {"steps": list(self.mask.steps)} | {f"m{n}": tensor.numpy() for n, tensor in enumerate(self.mask.tensors)}
        if self.lengths is not None:
            found["key_lengths"] = np.array(self.lengths, np.int64)
        if self.cu is not None:
            cu = [np.array(one, np.int32) for one in self.cu]
            found |= dict(cu_queries=cu[0], cu_keys=cu[1], max_queries=int(np.diff(cu[0]).max()), max_keys=int(np.diff(cu[1]).max()))
        return found | more

    @property
    def bias_gradient(self):
        """None, of columns, of pairs. (The op spreads a bias without columns of its own.)"""
        return 0 if self.bias is None or self.bias.shape[3] == 1 else 1 if self.bias.shape[2] == 1 else 2

    def forward(self, key=None, more=None, **options):
        return _host.run(key or f"masked_attention.forward.{self.dtype}", self.arguments(NAMES[:3], **(more or {})), **options)

    @functools.cached_property
    def solution(self):
        """out and lse as float64, rounded as the kernel would hand them to its backward."""
        out, lse, _ = self.want
        return encode(self.dtype, out), lse.astype(REAL[self.dtype])

    def backward(self, key=None, more=None, **options):
        out, lse = self.solution
        arguments = self.arguments(NAMES, out=out, lse=lse, grad_lse=self.grad_lse, bias_gradient=self.bias_gradient, **(more or {}))
        return _host.run(key or f"masked_attention.grad_query.{self.dtype}", arguments, **options)

    def sequences(self):
        """(item, queries, keys, sequence) of every sequence, as slices."""
        if self.cu is None:
            return [(b, slice(None), slice(None), b) for b in range(self.given["query"].shape[0])]
        return [(0, slice(*q), slice(*k), b) for b, (q, k) in enumerate(zip(np.stack([self.cu[0][:-1], self.cu[0][1:]], 1), np.stack([self.cu[1][:-1], self.cu[1][1:]], 1), strict=True))]

    def kept(self, b, h, queries, keys):
        kept = np.ones((queries, keys), bool)
        if self.causal:
            kept &= np.arange(keys)[None] <= np.arange(queries)[:, None] + (keys - queries if self.causal == 1 else 0)
        if self.lengths is not None:
            kept &= np.arange(keys)[None] < self.lengths[b]
        if self.mask is not None:
            dense = self.mask.dense().numpy()
            H = self.given["query"].shape[1]
            kept &= dense[b if dense.shape[0] > 1 else 0, h // (H // dense.shape[1])]
        return kept

    def bias_of(self, b, h):
        return b if self.bias.shape[0] > 1 else 0, h * self.bias.shape[1] // self.given["query"].shape[1]

    def softmax(self, b, h, Q, K):
        """Which pairs are kept, probabilities, lse, d logit / d product over the scale."""
        kept = self.kept(b, h, len(Q), len(K))
        with np.errstate(invalid="ignore"):
            x = Q @ K.T * self.scale
        z, slope = (self.cap * np.tanh(x / self.cap), 1 - np.tanh(x / self.cap) ** 2) if self.cap else (x, np.ones_like(x))
        if self.bias is not None:
            added = np.broadcast_to(self.bias[self.bias_of(b, h)].astype(float), kept.shape)
            kept, z = kept & (added > -np.inf), z + np.where(added > -np.inf, added, 0)
        z = np.where(kept, z, -np.inf)
        with np.errstate(all="ignore"):
            top = np.where(kept.any(1), z.max(1, initial=-np.inf), 0)[:, None]
            lse = np.log(np.exp(z - top).sum(1)) + top[:, 0]
            return kept, np.where(kept, np.exp(z - np.where(np.isneginf(lse), 0, lse)[:, None]), 0), lse, slope

    @functools.cached_property
    def want(self):
        """out, lse, gradients by name."""
        query, key, value, grad = (self.given[name] for name in NAMES)
        H, Hkv = query.shape[1], key.shape[1]
        out, lse = np.zeros(grad.shape), np.full(query.shape[:3], -np.inf)
        gradients = {f"grad_{name}": np.zeros(self.given[name].shape) for name in NAMES[:3]}
        if self.bias is not None:
            gradients["grad_bias"] = np.zeros(self.bias.shape)
        for item, q, k, b in self.sequences():
            for h in range(H):
                kv = h * Hkv // H
                Q, K, V, G = query[item, h, q], key[item, kv, k], value[item, kv, k], grad[item, h, q]
                kept, p, lse[item, h, q], slope = self.softmax(b, h, Q, K)
                with np.errstate(all="ignore"):
                    products = np.where(kept[:, :, None], p[:, :, None] * V[None], 0)  # nothing of what is not kept
                    out[item, h, q] = products.sum(1)
                    dlse = self.grad_lse[item, h, q].astype(float) if self.grad_lse is not None else 0
                    dp = np.where(kept, np.where(kept[:, :, None], G[:, None] * V[None], 0).sum(2), 0)
                    delta = np.where(kept.any(1), (G * out[item, h, q]).sum(1) - dlse, 0)[:, None]
                    ds = np.where(kept, p * (dp - delta), 0)
                    dx = ds * slope * self.scale
                    gradients["grad_query"][item, h, q] = np.where(kept[:, :, None], dx[:, :, None] * K[None], 0).sum(1)
                    gradients["grad_key"][item, kv, k] += np.where(kept[:, :, None], dx[:, :, None] * Q[:, None], 0).sum(0)
                    gradients["grad_value"][item, kv, k] += np.where(kept[:, :, None], p[:, :, None] * G[:, None], 0).sum(0)
                if self.bias_gradient:
                    target = gradients["grad_bias"][self.bias_of(b, h)]
                    target += ds.sum(0, keepdims=True) if target.shape[0] == 1 else ds
        return out, lse, gradients

    def is_right(self, outputs):
        if "out" in outputs:
            out, lse, _ = self.want
            with np.errstate(invalid="ignore"):
                same = np.array_equal(np.isneginf(outputs["lse"]), np.isneginf(lse))
                close = np.nanmax(np.abs(np.where(np.isneginf(lse), 0, outputs["lse"] - lse)), initial=0) <= 10 * FORWARD["f64" if self.dtype == "f64" else "f32"]
            return bool(same and close and deviation(decode(self.dtype, outputs["out"]), out) <= FORWARD[self.dtype])
        found = {name: outputs[name].astype(float) if name == "grad_bias" else decode(self.dtype, outputs[name]) for name in outputs}
        return all(deviation(found[name], self.want[2][name]) <= BACKWARD[self.dtype] for name in found)


def tokens_mask(N, keys, seed, batch=1):
    return masks.relation(random_table(seed), random_tokens(N, seed, batch), random_tokens(keys, seed + 1, batch))


def any_intervals(heads, queries, keys, seed):
    g = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, queries + 1, (1, heads, keys, 2), generator=g)
    return masks.intervals(ends.sort(-1).values.int(), queries)


def pairs(*shape, seed=0, share=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def cases(dtype):
    T = BLOCK[dtype]
    empty = torch.ones(2 * T + 9, 3 * T, dtype=torch.bool)
    empty[:T, T : 2 * T] = False
    empty[T : 2 * T] = False
    return {
        "one": dict(Nq=1, Nk=1, D=1, Dv=1),
        "hand": dict(Nq=1, Nk=2, D=1, Dv=2),
        "tiles": dict(H=2, Nq=3 * T, Nk=2 * T, D=32, Dv=32),
        "ragged": dict(B=2, H=2, Nq=T + 9, Nk=2 * T - 5, D=33, Dv=7),
        "groups": dict(B=2, H=4, Hkv=2, Nq=20, Nk=T + 3, D=16, Dv=24),
        "wide": dict(Nq=9, Nk=20, D=200, Dv=150),
        "causal": dict(H=2, Hkv=1, Nq=T + 20, Nk=2 * T + 40, D=16, Dv=16, causal=1),
        "more queries": dict(Nq=2 * T + 3, Nk=T, D=16, Dv=16, causal=1),
        "top left": dict(Nq=T + 20, Nk=T + 40, D=16, Dv=16, causal=2),
        "lengths": dict(B=3, H=2, Nq=20, Nk=T + 9, D=16, Dv=16, lengths=[T + 9, 0, 17]),
        "packed": dict(H=4, Hkv=2, Nq=T + 60, Nk=2 * T, D=16, Dv=16, cu=([0, 30, 30, T + 40, T + 60], [0, T + 7, T + 20, T + 20, 2 * T]), causal=1),
        "relation": dict(B=2, H=2, Nq=T + 70, Nk=T + 50, D=16, Dv=16, mask=tokens_mask(T + 70, T + 50, 3, batch=2)),
        "document": dict(Nq=2 * T + 9, Nk=2 * T + 9, D=16, Dv=16, mask=masks.relation({(q, k): masks.Rule("causal") for q in range(4) for k in range(4)}, random_tokens(2 * T + 9, 7))),
        "intervals": dict(H=4, Hkv=2, Nq=T + 30, Nk=2 * T + 5, D=16, Dv=16, mask=any_intervals(2, T + 30, 2 * T + 5, 5)),
        "tiles of a mask": dict(H=2, Nq=T + 30, Nk=T + 70, D=16, Dv=16, mask=masks.blocks(pairs(1, 2, -(-(T + 30) // 48), -(-(T + 70) // 32), share=0.3), (48, 32), T + 30, T + 70)),
        "dense, tiles without a pair": dict(Nq=2 * T + 9, Nk=3 * T, D=16, Dv=16, mask=masks.from_dense(empty)),
        "keys alone": dict(B=2, H=2, Nq=20, Nk=T + 9, D=16, Dv=16, mask=masks.from_dense(pairs(2, 1, 1, T + 9), 20, T + 9)),
        "few kept": dict(H=2, Nq=T + 9, Nk=T + 9, D=16, Dv=16, mask=masks.from_dense(pairs(2, T + 9, T + 9, share=0.01)), lse=True),
        "algebra": dict(H=2, Nq=T + 20, Nk=T + 20, D=16, Dv=16,
                        mask=(tokens_mask(T + 20, T + 20, 9) | any_intervals(1, T + 20, T + 20, 2)) & ~masks.from_dense(pairs(1, 2, T + 20, T + 20, share=0.2))),
        "bias of pairs": dict(B=2, H=2, Nq=T + 5, Nk=T + 7, D=16, Dv=16, bias=(2, 2, T + 5, T + 7)),
        "bias of pairs, shared": dict(B=3, H=4, Hkv=2, Nq=30, Nk=T + 40, D=16, Dv=16, bias=(1, 2, 30, T + 40), causal=1),
        "bias of keys": dict(B=2, H=4, Hkv=2, Nq=T + 30, Nk=T + 9, D=16, Dv=16, bias=(2, 2, 1, T + 9), lse=True),
        "bias of keys, shared": dict(B=2, H=4, Hkv=2, Nq=T + 3, Nk=40, D=16, Dv=16, bias=(1, 1, 1, 40), mask=any_intervals(1, T + 3, 40, 1)),
        "bias of queries": dict(H=2, Nq=20, Nk=30, bias=(1, 2, 20, 1)),
        "soft-cap": dict(H=2, Nq=40, Nk=T + 9, D=16, Dv=16, cap=3.0, scale=1.0, bias=(1, 1, 40, T + 9), lse=True),
    }  # fmt: skip


CASES = sorted(cases("f32"))


@functools.cache
def solved(dtype, case):
    problem = Attention(dtype, **cases(dtype)[case])
    runs = [problem.forward(), problem.backward()]
    assert problem.is_right(runs[0].outputs), case
    assert problem.is_right(runs[1].outputs), case
    return {launch["key"] for run in runs for launch in run.launches}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_match_the_definition(dtype, case):
    solved(dtype, case)


def test_every_instance_has_run():
    launched = set().union(*(solved(dtype, case) for dtype in DTYPES for case in CASES))
    assert set(OWN) <= launched


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_bias_may_be_of_a_half_type(dtype):
    problem = Attention(dtype, Nq=20, Nk=30, bias=(1, 1, 20, 30))
    problem.bias = decode(dtype, encode(dtype, problem.bias))
    more = dict(bias=encode(dtype, problem.bias), bias_dtype=dtype)
    assert problem.is_right(problem.forward(more=more).outputs) and problem.is_right(problem.backward(more=more).outputs)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_schedules_strides_and_misalignment(dtype, schedule):
    T = BLOCK[dtype]
    problem = Attention(dtype, B=2, H=2, Hkv=1, Nq=T + 3, Nk=T + 20, D=9, Dv=11, mask=any_intervals(2, T + 3, T + 20, 4), bias=(2, 1, 1, T + 20), causal=1, lse=True)

    def spread(name):
        """Each number twice and three more at the end of a row, NaN between."""
        x = problem.given[name]
        wide = np.full((*x.shape[:3], 2 * x.shape[3] + 3), np.nan)
        wide[..., : 2 * x.shape[3] : 2] = x
        return encode(dtype, wide)

    moved = dict(SCHEDULES[schedule], offsets=dict.fromkeys(("query", "key", "value", "grad_out", "out", "grad_query", "grad_key", "grad_value"), 1))
    for run, names in ((problem.forward, NAMES[:3]), (problem.backward, NAMES)):
        assert problem.is_right(run(**moved).outputs)
        more = {}
        for name in names:
            width = problem.given[name].shape[3]
            more |= {name: spread(name), f"{name}_row_stride": 2 * width + 3, f"{name}_element_stride": 2}
        assert problem.is_right(run(more=more, **SCHEDULES[schedule]).outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_kept_may_be_anything(dtype):
    """Rows of keys and values that no query keeps, and queries and gradients of rows that keep nothing, hold NaN and infinity: nothing of them comes out."""
    T = BLOCK[dtype]
    N = T + 40
    keep = pairs(1, 1, N, N, share=0.3)
    keep[..., 5], keep[..., T + 7], keep[..., 3, :] = False, False, False
    problem = Attention(dtype, H=2, Hkv=1, Nq=N, Nk=N, D=16, Dv=16, mask=masks.from_dense(keep), lse=True)
    for at, value in ((5, np.nan), (T + 7, np.inf)):
        problem.given["key"][:, :, at] = problem.given["value"][:, :, at] = value
    problem.given["query"][:, :, 3] = problem.given["grad_out"][:, :, 3] = np.nan
    assert problem.is_right(problem.forward().outputs) and problem.is_right(problem.backward().outputs)
    assert all(np.isfinite(one).all() for one in problem.want[2].values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_reaches_the_rows_that_keep_it(dtype):
    T = BLOCK[dtype]
    N = T + 40
    problem = Attention(dtype, H=2, Hkv=1, Nq=N, Nk=N, D=16, Dv=16, mask=masks.from_dense(pairs(1, 1, N, N, share=0.3)))
    problem.given["value"][0, 0, T + 3, 2] = np.inf
    problem.given["value"][0, 0, 7, 5] = np.nan
    out, kept = decode(dtype, problem.forward().outputs["out"]), problem.kept(0, 0, N, N)
    np.testing.assert_array_equal(np.isposinf(out[0, :, :, 2]), np.broadcast_to(kept[:, T + 3], (2, N)))
    np.testing.assert_array_equal(np.isnan(out[0, :, :, 5]), np.broadcast_to(kept[:, 7], (2, N)))
    rest = np.delete(np.arange(16), [2, 5])
    assert deviation(out[..., rest], problem.want[0][..., rest]) <= FORWARD[dtype]
    problem = Attention(dtype, H=2, Hkv=1, Nq=N, Nk=N, D=16, Dv=16, mask=masks.from_dense(pairs(1, 1, N, N, share=0.3)))
    problem.given["key"][0, 0, T + 3, 2] = np.nan
    outputs = problem.forward().outputs
    rows = np.broadcast_to(kept[:, T + 3], (2, N))
    np.testing.assert_array_equal(np.isnan(decode(dtype, outputs["out"][0])).all(-1), rows)
    np.testing.assert_array_equal(np.isnan(decode(dtype, outputs["out"][0])).any(-1), rows)
    np.testing.assert_array_equal(np.isnan(outputs["lse"][0]), rows)


# ------------------------------------------------------------------------------------------------------------------------------------------ mutations


@functools.cache
def broken_case(dtype):
    """Several tiles on either side, all kinds of masks, a bias that heads share, values that nobody may use."""
    T = BLOCK[dtype]
    Nq, Nk = T + 37, 2 * T + 21
    dropped = pairs(1, 1, Nq, Nk, share=0.2)
    dropped[..., 9] = True
    mask = (tokens_mask(Nq, Nk, 3) | any_intervals(1, Nq, Nk, 2)) & ~masks.from_dense(dropped)
    problem = Attention(dtype, H=2, Hkv=1, Nq=Nq, Nk=Nk, D=40, Dv=24, mask=mask, bias=(1, 1, 1, Nk), causal=1, lse=True)
    problem.given["value"][:, :, 9] = np.nan
    return problem


@functools.cache
def broken_summary(kind):
    """A mask whose tiles are told apart by what the summary says of one number."""
    N = 200
    if kind == "tokens":
        mask = masks.relation({(0, 0): masks.Rule("causal")}, masks.tokens(torch.zeros(1, N, dtype=torch.int32)))
    elif kind == "intervals":
        whole = torch.tensor([0, N], dtype=torch.int32).repeat(1, 1, N, 1)
        whole[:, :, 50] = 0
        mask = masks.intervals(whole, N)
    else:
        keep = torch.ones(1, 1, N, N, dtype=torch.bool)
        keep[..., 127, 127] = False
        mask = masks.from_dense(keep)
    return Attention("f32", Nq=N, Nk=N, D=8, Dv=8, mask=mask)


# A list of one head and at most 256 tiles is written once (and see below). Lines of the copies end in zeros where a slab of ordinary units does, and this depth fills slabs. The key that is
# mended must not be, whatever else keeps it.
HARMLESS = dict.fromkeys(("forward", "grad_query"), ("list: drop the barrier before it",)) | {"grad_bias": ("tile: one step beyond the depth",), "mend": ("pairs: causal off by one",)}


@pytest.mark.parametrize("key", OWN)
def test_seeded_mutations_are_caught(key):
    family, kind = key.split(".")[:2]
    problem = broken_summary(kind) if family == "attention_mask" else broken_case(key.rsplit(".", 1)[1])
    run = problem.forward if family == "attention_mask" or kind in ("clean", "forward", "mend") else problem.backward
    check_mutations(key, functools.partial(run, key=key), problem.is_right, harmless=HARMLESS.get(kind, ()))


def test_a_list_is_not_overwritten_while_it_is_read():
    """More than 256 tiles of keys."""
    keep = torch.zeros(1, 1, 2, 257 * 64, dtype=torch.bool)
    keep[..., 200 * 64], keep[..., -1] = True, True
    problem = Attention("f64", Nq=2, Nk=257 * 64, D=1, Dv=1, mask=masks.from_dense(keep))
    for run, key in ((problem.forward, "masked_attention.forward.f64"), (problem.backward, "masked_attention.grad_query.f64")):
        assert problem.is_right(run().outputs)
        with pytest.raises(_host.KernelReport, match="race_shared"):
            run(key=key, mutation="list: drop the barrier before it", **SCHEDULES["random"])
