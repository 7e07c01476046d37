"""A differentiable op of your own on modalign's tile engine: crowding(queries, candidates, threshold)_i = sum_j max(0, q_i . c_j - threshold).

crowding.cpp is the kernel (an epilogue), this file compiles it, tells torch about it and runs modalign's test battery over it.

    python examples/custom_epilogue/example.py
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

import modalign
from modalign import testing

SOURCE = Path(__file__).parent / "crowding.cpp"

# ---------------------------------------------------------------------------------------------------------------------------------------- the library


@functools.cache
def library() -> ctypes.CDLL:
    """crowding.cpp, compiled when it, the engine or the compiler is new."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("crowding: a C++20 compiler must be on PATH or in CXX, got none")
    command = [compiler, "-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-pthread", "-I", modalign.include_dir(), str(SOURCE)]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    engine = b"".join(header.read_bytes() for header in sorted(Path(modalign.include_dir()).rglob("*.h")))
    key = hashlib.sha256(SOURCE.read_bytes() + engine + version.encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"modalign-crowding-{os.getuid()}" / f"crowding-{key}.so"
    if not target.exists():
        target.parent.mkdir(mode=0o700, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}.tmp")
        subprocess.run([*command, "-o", str(unfinished)], check=True)
        unfinished.replace(target)
    return ctypes.CDLL(str(target))


def _call(function: str, tensors: list[Tensor], N: int, M: int, D: int, threshold: float, outputs: list[Tensor]) -> None:
    entry = getattr(library(), f"{function}_{str(outputs[0].dtype).removeprefix('torch.')}")
    entry.argtypes = [ctypes.c_void_p] * len(tensors) + [ctypes.c_int64] * 3 + [ctypes.c_double] + [ctypes.c_void_p] * len(outputs) + [ctypes.c_int]
    entry.restype = None
    entry(*(t.data_ptr() for t in tensors), N, M, D, threshold, *(t.data_ptr() for t in outputs), torch.get_num_threads())


# --------------------------------------------------------------------------------------------------------------------------- what torch needs to know


@torch.library.custom_op("modalign_examples::crowding", mutates_args=(), device_types="cpu")
def raw_crowding(queries: Tensor, candidates: Tensor, threshold: Tensor) -> Tensor:
    queries, candidates = queries.contiguous(), candidates.contiguous()
    result = queries.new_empty(queries.shape[0])
    _call("crowding", [queries, candidates], *queries.shape[:1], *candidates.shape, threshold.item(), [result])
    return result


@torch.library.custom_op("modalign_examples::crowding_bwd", mutates_args=(), device_types="cpu")
def raw_crowding_bwd(grad: Tensor, queries: Tensor, candidates: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    grad, queries, candidates = grad.contiguous(), queries.contiguous(), candidates.contiguous()
    gradients = [torch.empty_like(queries), torch.empty_like(candidates)]
    _call("crowding_bwd", [grad, queries, candidates], *queries.shape[:1], *candidates.shape, threshold.item(), gradients)
    return gradients[0], gradients[1]


@raw_crowding.register_fake
def _(queries: Tensor, candidates: Tensor, threshold: Tensor) -> Tensor:
    return queries.new_empty(queries.shape[0])


@raw_crowding_bwd.register_fake
def _(grad: Tensor, queries: Tensor, candidates: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape), candidates.new_empty(candidates.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return (*raw_crowding_bwd(grad, *ctx.saved_tensors), None)


def _refuse_second_derivative(ctx, *grads):
    raise RuntimeError("crowding: double backward is not supported")


raw_crowding.register_autograd(_backward, setup_context=_setup_context)
raw_crowding_bwd.register_autograd(_refuse_second_derivative)  # without this a second derivative would be zero without a word


def crowding(queries: Tensor, candidates: Tensor, threshold: float) -> Tensor:
    """How crowded each query [N, D] is among the candidates [M, D]: sum_j max(0, q_i . c_j - threshold), [N]. float32 or float64, on the CPU."""
    if torch.is_autocast_enabled("cpu"):
        queries, candidates = (value.float() if value.dtype in (torch.float16, torch.bfloat16) else value for value in (queries, candidates))
    for name, value in (("queries", queries), ("candidates", candidates)):
        if value.dim() != 2 or value.shape[-1] == 0:
            raise ValueError(f"crowding: {name} must have shape [rows, D], got {tuple(value.shape)}")
        if value.dtype not in (torch.float32, torch.float64) or value.dtype != queries.dtype:
            raise TypeError(f"crowding: {name} must be float32 or float64 like queries, got {value.dtype}")
    if queries.shape[1] != candidates.shape[1]:
        raise ValueError(f"crowding: candidates must have the width D = {queries.shape[1]} of queries, got {candidates.shape[1]}")
    if forward_ad._current_level >= 0 and (
        torch.compiler.is_compiling() or any(forward_ad.unpack_dual(t).tangent is not None for t in (queries, candidates))
    ):
        raise RuntimeError("crowding: forward-mode differentiation is not supported")
    # As a 0-dim tensor a new threshold is new data for torch.compile, not a new graph.
    return raw_crowding(queries, candidates, queries.new_zeros(()) + threshold)


def reference(queries: Tensor, candidates: Tensor, threshold: float) -> Tensor:
    """The same in two lines that store N x M numbers."""
    return torch.relu(queries @ candidates.mT - threshold).sum(-1)


# --------------------------------------------------------------------------------------------------------------------------------------- the promises


def _sample(name: str, maker: testing.Maker, N: int, M: int, D: int, threshold: float = 0.1) -> testing.Sample:
    return testing.Sample(name, (maker.unit(N, D), maker.unit(M, D), threshold))


CASE = testing.OpCase(
    name="crowding",
    call=crowding,
    reference=reference,
    samples=lambda maker: [
        _sample("ragged", maker, 37, 29, 19),
        _sample("many tiles", maker, 131, 300, 24),
        _sample("below zero", maker, 5, 7, 8, -0.2),
    ],
    tiny=lambda maker: [_sample("tiny", maker, 3, 4, 5)],
    sized=lambda maker, n: _sample("sized", maker, n, n + 3, 12),
    degenerate=lambda maker: [
        testing.Sample(name, (vectors[0], vectors[1], 0.1))
        for name, vectors in testing.degenerate_zoo(maker, 2).items()
        if name not in testing.NOT_FINITE
    ],
    empty=lambda maker: [(_sample("no queries", maker, 0, 4, 6), (0,)), (_sample("no candidates", maker, 4, 0, 6), (4,))],
    raw=lambda maker: [(raw_crowding._opoverload, (maker.unit(5, 7), maker.unit(6, 7), torch.tensor(0.1)))],
    bad_inputs=lambda maker: [
        testing.BadInput(
            testing.Sample("widths differ", (maker.randn(3, 4), maker.randn(3, 5), 0.0)),
            ValueError,
            "crowding: candidates must have the width D = 4 of queries, got 5",
        ),
    ],
    dtypes=(torch.float32, torch.float64),
    func_grad=False,  # what register_autograd builds does not serve torch.func
)


def main() -> None:
    checks = testing.run_battery(CASE, on=["cpu"])
    print(f"crowding passes the battery: {len(checks)} checks")
    generator = torch.Generator().manual_seed(0)
    spread = torch.nn.functional.normalize(torch.randn(2000, 64, generator=generator), dim=-1)
    clumped = torch.nn.functional.normalize(spread + 3 * torch.randn(20, 64, generator=generator)[torch.arange(2000) % 20] / 8, dim=-1)
    for name, points in (("spread out", spread), ("in 20 clumps", clumped)):
        print(f"2000 points {name}: mean crowding above cosine 0.5 is {crowding(points, points, 0.5).mean():.2f}")


if __name__ == "__main__":
    main()
