"""The generic battery over `cases.py`: values, gradients, edges, bad input, and the yes and no of every declaration. CUDA rows appear where there is a GPU."""

import importlib
import pkgutil

import pytest
import torch
from cases import CASES, GRAM_VOLUME
from modalign import ops
from modalign.testing import Maker, parametrize, upstream


@parametrize(CASES)
def test_battery(check):
    check()


def test_every_op_is_exported_and_has_a_case():
    modules = [name for _, name, _ in pkgutil.iter_modules(ops.__path__) if not name.startswith("_")]
    assert sorted(modules) == sorted(ops.__all__) == sorted(case.name for case in CASES)
    for name in modules:
        assert getattr(ops, name) is getattr(importlib.import_module(f"modalign.ops.{name}"), name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_docstring_says_everything(case):
    for heading in ("Parameters", "Returns", "Gradient", "Edges", "Raises", "Complexity", "Paper", ">>> "):
        assert heading in case.call.__doc__, heading


def test_inductor_once():
    """The default compiler end to end, forward and backward, for one op with all its torch-side options."""
    torch._dynamo.reset()
    sample = GRAM_VOLUME.sized(Maker(), 8).requiring_grad()
    compiled = torch.compile(lambda anchor, others, present: ops.gram_volume(anchor, others, present=present, normalize="root"), fullgraph=True)
    result, expected = (f(*sample.args, sample.kwargs["present"]) for f in (compiled, lambda a, o, p: ops.gram_volume(a, o, present=p, normalize="root")))
    torch.testing.assert_close(result, expected)
    leaves = sample.differentiable()
    for ours, theirs in zip(torch.autograd.grad(result, leaves, upstream(result)), torch.autograd.grad(expected, leaves, upstream(result))):
        torch.testing.assert_close(ours, theirs)
