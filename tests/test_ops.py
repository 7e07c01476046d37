"""The generic battery over `cases.py`: values, gradients, edges, bad input, and the yes and no of every declaration. CUDA rows appear where there
is a GPU."""

import doctest
import importlib
import os
import pkgutil
import random
import sys
from dataclasses import replace

import pytest
import torch

from cases import CASES, GRAM_VOLUME, SELECTIONS
from modalign import ops
from modalign.ops._arguments import fold_leading
from modalign.testing import Maker, Sample, parametrize, upstream
from modalign.testing.checks import check_gradients, check_values


@parametrize(CASES)
def test_battery(check):
    check()


def test_every_op_is_exported_and_has_a_case():
    modules = [name for _, name, _ in pkgutil.iter_modules(ops.__path__) if not name.startswith("_")]
    assert sorted(modules) == sorted(ops.__all__) == sorted({case.name for case in CASES} | set(SELECTIONS))
    for name in modules:
        assert getattr(ops, name) is getattr(importlib.import_module(f"modalign.ops.{name}"), name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_docstring_says_everything(case):
    for heading in ("Parameters", "Returns", "Gradient", "Edges", "Raises", "Complexity", "Paper", ">>> "):
        assert heading in case.call.__doc__, heading


@pytest.mark.parametrize("name", [*(f"ops.{name}" for name in ops.__all__), "compat.gram", "compat.faiss", "compat.flash_dmattn", "compat.natten", "compat.sklearn", "compat.torch_cluster", "testing"])
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(f"modalign.{name}")
    found = doctest.testmod(sys.modules[f"modalign.{name}"], optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert found.failed == 0 and (found.attempted > 0 or name == "testing"), module


def test_raw_ops_compute_in_float32_under_autocast():
    anchor, other = torch.randn(1, 3, 8, dtype=torch.bfloat16), torch.randn(1, 4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        volume = torch.ops.modalign.gram_volume(anchor, [other], None, False, 1e-12)[0]
    assert volume.dtype is torch.float32
    assert torch.equal(volume, torch.ops.modalign.gram_volume(anchor.float(), [other.float()], None, False, 1e-12)[0])


def test_compiled_inside_an_autocast_region():
    torch._dynamo.reset()
    anchor, others = torch.randn(5, 16, dtype=torch.bfloat16, requires_grad=True), [torch.randn(6, 16) for _ in range(2)]
    compiled = torch.compile(ops.gram_volume, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        volume, expected = compiled(anchor, others, normalize=True), ops.gram_volume(anchor, others, normalize=True)
    assert volume.dtype is torch.float32
    torch.testing.assert_close(volume, expected)
    torch.testing.assert_close(torch.autograd.grad(volume.sum(), anchor), torch.autograd.grad(expected.sum(), anchor))


def test_folding_leading_dimensions_copies_only_where_strides_demand_it():
    x = torch.randn(4, 3, 5)
    for leading, tensor in (((), x[0]), ((4,), x), ((7,), x[0]), ((4,), x.transpose(1, 2)), ((2, 2), x.reshape(2, 2, 3, 5))):
        folded = fold_leading(tensor, leading, 2)
        assert folded.data_ptr() == tensor.data_ptr() and folded.shape[1:] == tensor.shape[-2:]
    assert fold_leading(x, (6, 4), 2).data_ptr() != x.data_ptr()


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
@pytest.mark.parametrize("seed", range(int(os.environ.get("MODALIGN_SWEEP", "12"))))
def test_random_sweep(case, seed):
    """Sizes, options and layouts nobody thought of, against the float64 reference. MODALIGN_SWEEP sets how many."""
    draw = random.Random(seed)
    B, C, D, k, N = (
        draw.choice([1, 2, 7, 13, 49, 97]),
        draw.choice([1, 3, 16, 31, 70]),
        draw.choice([1, 3, 8, 17, 64, 129]),
        draw.randint(2, 8),
        draw.choice([1, 2, 5]),
    )
    make = Maker(draw.choice(case.dtypes), seed=seed)
    options = {"squared": draw.random() < 0.4}
    if case.name == "gram_volume":
        args = (make.unit(N, B, D), [make.unit(*draw.choice([(N,), ()]), C, D) for _ in range(k - 1)])
        options["present"] = draw.choice([None, make.mask(C, k - 1)])
    elif case.name == "paired_gram_volume":
        args = ([make.unit(N, B, D) for _ in range(k)],)
        options["present"] = draw.choice([None, make.mask(B, k)])
    else:
        args = (make.unit(N, B, D), make.unit(C, D), make.unit(N, C, D))
    case = replace(
        case, samples=lambda _: [Sample(f"N={N} B={B} C={C} D={D} k={k} {options}", args, options, slack=2)]
    )  # sizes down to one number: no averaging
    check_values(case, "cpu", make.dtype)
    if D >= 8:  # fewer dimensions than vectors, or nearly so: gradients of near-zero volumes have no digits to compare in half types
        check_gradients(case, "cpu", make.dtype)


def test_inductor_once():
    """The default compiler end to end, forward and backward, for one op with all its torch-side options."""
    torch._dynamo.reset()
    sample = GRAM_VOLUME.sized(Maker(), 8).requiring_grad()

    def volume(anchor, others, present):
        return ops.gram_volume(anchor, others, present=present, normalize="root")

    result, expected = (f(*sample.args, sample.kwargs["present"]) for f in (torch.compile(volume, fullgraph=True), volume))
    torch.testing.assert_close(result, expected)
    leaves = sample.differentiable()
    compiled, eager = (torch.autograd.grad(value, leaves, upstream(expected)) for value in (result, expected))
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs)
