"""Run in the second environment (`make test-hosts`): the `_C.so` that was built against one torch is loaded and used by another one, unchanged."""

import os

import torch

import modalign
from modalign import _load
from modalign.ops import gram_volume


def test_the_library_of_the_other_environment_is_used_here():
    built = _load.build_info()["torch_built"].split("+")[0]
    if os.environ.get("MODALIGN_HOSTS"):
        assert torch.__version__.split("+")[0] != built
    assert modalign.ops is not None


def test_forward_and_backward():
    generator = torch.Generator().manual_seed(0)
    anchor, first, second = (torch.randn(33, 20, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3))
    volume = gram_volume(anchor, [first, second])
    tuples = torch.stack([anchor[:, None].expand(33, 33, 20), first[None].expand(33, 33, 20), second[None].expand(33, 33, 20)], dim=-2)
    expected = torch.linalg.det(tuples @ tuples.mT).sqrt()
    torch.testing.assert_close(volume, expected)
    for ours, theirs in zip(torch.autograd.grad(volume.sin().sum(), [anchor, first, second]),
                            torch.autograd.grad(expected.sin().sum(), [anchor, first, second]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiled_with_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: gram_volume(a, [b]).sum(), fullgraph=True, backend="aot_eager")
    a, b = torch.randn(5, 8), torch.randn(7, 8)
    torch.testing.assert_close(compiled(a, b), gram_volume(a, [b]).sum())


def test_error_text_reaches_python():
    try:
        torch.ops.modalign.gram_volume(torch.randn(1, 2, 3), [torch.randn(1, 2, 4)], None, False, 0.0)
    except RuntimeError as error:
        assert "gram_volume: others must have shape [1, 2, 3], got [1, 2, 4]" in str(error)
    else:
        raise AssertionError("a mismatched width was accepted")
