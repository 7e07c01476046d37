"""One compiled kernel without torch around it, beside the public op on the same inputs: the difference is what torch's dispatch, our checks, autograd
and the allocation of results cost. Everything on one thread and with inputs that stay in the cache, which is what small calls see."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _load, ops
from ..testing.cases import Maker
from .machine import is_noisy
from .measure import MAXIMUM_RELATIVE_ERROR, MINIMUM_SAMPLE_SECONDS, quantiles
from .sizes import listed
from .tables import DASH, MARK, NOISY, duration

ROUNDS = 9
SIZES = (1, 8, 64, 512)  # rows and candidates, from a call that computes next to nothing


@dataclass(frozen=True)
class CpuKernel:
    """What stands beside a CPU kernel. make draws the inputs of the kernel in their order; beside does the same with torch tensors, and `name` says
    what it is. Where `overhead` is set, it runs this very kernel, so that the difference is overhead and nothing else."""

    name: str
    make: Callable[..., list[Tensor]]
    beside: Callable[..., Any]
    overhead: bool
    dtypes: tuple[torch.dtype, ...]
    backward: bool = True  # of those with an op


def _pair(maker: Maker, n: int, D: int) -> list[Tensor]:
    return [maker.randn(n, D) for _ in range(3)]


def _paired(maker: Maker, n: int, D: int) -> list[Tensor]:
    return [maker.randn(n, 3, D)]


def _two(maker: Maker, n: int, D: int) -> list[Tensor]:
    return [maker.randn(n, D) for _ in range(2)]


def _segments(maker: Maker, n: int, D: int) -> list[Tensor]:
    return [maker.randn(2 * n, D), maker.randn(n, D)]


def _tile(maker: Maker, n: int, D: int) -> list[Tensor]:
    return [maker.randn(n, D), maker.randn(2 * n, D)]


def _tile_values(maker: Maker, n: int, D: int) -> list[Tensor]:
    return [*_tile(maker, n, D), maker.randn(2 * n, D)]


ALL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
REAL = (torch.float32, torch.float64)

PER_ROW: dict[str, Any] = {"reduction": "none", "implementation": "streaming"}

CPU_KERNELS = {
    "gram_volume": CpuKernel("ops.gram_volume", _pair, lambda a, u, v: ops.gram_volume(a, [u, v]), True, ALL),
    "triangle_area": CpuKernel("ops.triangle_area", _pair, ops.triangle_area, True, ALL),
    "paired_gram_volume": CpuKernel("ops.paired_gram_volume", _paired, ops.paired_gram_volume, True, ALL),
    "gram_contrastive_loss": CpuKernel("ops.gram_contrastive_loss", _pair, lambda a, u, v: ops.gram_contrastive_loss(a, [u, v], **PER_ROW), True, REAL),
    "triangle_contrastive_loss": CpuKernel(
        "ops.triangle_contrastive_loss", _pair, lambda a, u, v: ops.triangle_contrastive_loss(a, u, v, **PER_ROW), True, REAL
    ),
    "clip_loss": CpuKernel("ops.clip_loss", _two, lambda x, y: ops.clip_loss(x, y, logit_scale=1 / 0.07, **PER_ROW), True, REAL),
    "siglip_loss": CpuKernel("ops.siglip_loss", _two, lambda x, y: ops.siglip_loss(x, y, logit_scale=1 / 0.07, logit_bias=0.0, **PER_ROW), True, REAL),
    "segment_max_similarity": CpuKernel(
        "ops.segment_max_similarity", _segments, lambda x, y: ops.segment_max_similarity(x, torch.arange(0, len(x) + 1, 2), y).values, True, ALL
    ),
    "knn": CpuKernel("ops.knn", _two, lambda x, y: ops.knn(x, y, min(10, len(y)), metric="dot").values, True, ALL, backward=False),
    "tile_product": CpuKernel("torch: a @ b.mT", _tile, lambda a, b: a @ b.mT, False, REAL),
    "tile_square_sum": CpuKernel(
        "torch: (a @ b.mT)² summed in pairs", _tile, lambda a, b: (a @ b.mT).square().unflatten(-1, (-1, 2)).sum(-1), False, REAL
    ),
    "tile_log_sum_exp": CpuKernel(
        "torch: a @ b.mT, logsumexp of rows and columns",
        _tile,
        lambda a, b: [(z := a @ b.mT).logsumexp(1), z.logsumexp(0)],
        False,
        REAL,
    ),
    "tile_weighted_values": CpuKernel("torch: (a @ b.mT) @ values", _tile_values, lambda a, b, values: (a @ b.mT) @ values, False, REAL),
}


def names() -> dict[str, str]:
    """Every kernel by name, and where it runs: the CPU kernels of this build and the keys of the CUDA kernels compiled into it."""
    found = {}
    for name in CPU_KERNELS:
        found[name] = "CPU"
        if CPU_KERNELS[name].overhead and CPU_KERNELS[name].backward:
            found[name + "_bwd"] = "CPU"
    return {**found, **{key: "CUDA" for key in _load.kernel_catalogue()}}


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """A bfloat16 tensor as its bits in uint16, which is how `_host` takes them."""
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype is torch.bfloat16 else tensor.numpy()


def _as_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype == np.uint16 else torch.from_numpy(array)


def measure_kernel(
    name: str,
    *,
    sizes: Sequence[int] = SIZES,
    width: int = 64,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    rounds: int = ROUNDS,
    seed: int = 0,
    listen: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """One entry per size and dtype, as in `kernels` of the results schema: N = B = C rows, candidates or both, of `width` numbers.

    A CUDA kernel is listed with the command that times it. ValueError names the kernels where there is none of this name.
    """
    known = names()
    if name not in known:
        raise ValueError(f"bench kernel: name must be one of {sorted(key for key in known if known[key] == 'CPU')} or a CUDA kernel, got {name!r}")
    if known[name] == "CUDA":
        return [
            {
                "kernel": name,
                "beside": "",
                "parameters": {},
                "dtype": "",
                "status": "by profiler" if torch.cuda.is_available() else "needs a GPU",
                "reason": "kernels on a GPU are timed by torch's profiler: modalign bench run CASE --device cuda --profile FOLDER",
            }
        ]
    try:
        from .. import _host
    except ImportError as error:
        raise ValueError("bench kernel: this build must hold the module _host, got one without it") from error
    backward = name.endswith("_bwd")
    kernel = CPU_KERNELS[name.removesuffix("_bwd")]
    if not sizes or min(*sizes, width) < 1:
        raise ValueError(f"bench kernel: sizes and width must be at least 1, got {list(sizes)} and {width}")
    for dtype in dtypes:
        if dtype not in kernel.dtypes:
            raise ValueError(
                f"bench kernel: --dtype must be out of {[str(one).removeprefix('torch.') for one in kernel.dtypes]} for {name}, got {dtype}"
            )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        entries = []
        for dtype in dtypes:
            for size in sizes:
                listen(f"{name} N={size} D={width} {str(dtype).removeprefix('torch.')}")
                entries.append(_measure(_host, name, kernel, backward, size, width, dtype, rounds, seed))
        return entries
    finally:
        torch.set_num_threads(before)


def _measure(
    host: Any, name: str, kernel: CpuKernel, backward: bool, size: int, width: int, dtype: torch.dtype, rounds: int, seed: int
) -> dict[str, Any]:
    maker = Maker(dtype, "cpu", seed)
    inputs = kernel.make(maker, size, width)
    given = list(inputs)
    if backward:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        result = kernel.beside(*leaves)
        gradient = maker.randn(*result.shape)
        given.append(gradient)

        def beside() -> Any:
            return torch.autograd.grad(result, leaves, gradient, retain_graph=True)
    else:

        def beside() -> Any:
            with torch.no_grad():
                return kernel.beside(*inputs)

    arrays = [_as_numpy(tensor) for tensor in given]
    instruction_set = _load.instruction_set()

    def alone(calls: int) -> tuple[float, list[np.ndarray]]:
        return host.time_cpu_kernel(name, arrays, calls, instruction_set=instruction_set)

    entry: dict[str, Any] = {
        "kernel": name,
        "beside": kernel.name + (", backward" if backward else ""),
        "parameters": {"N": size, "D": width},
        "dtype": str(dtype).removeprefix("torch."),
        "status": "ok",
        "reason": "",
    }
    if problem := _disagreement([_as_tensor(array) for array in alone(1)[1]], beside(), kernel.overhead):
        return {**entry, "status": "mismatch", "reason": problem}

    def timed(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            beside()
        return (time.perf_counter() - begin) / calls

    alone(3), timed(3)
    calls = [max(1, min(20_000, math.ceil(MINIMUM_SAMPLE_SECONDS / max(estimate, 1e-8)))) for estimate in (alone(3)[0], timed(3))]
    samples = [(alone(calls[0])[0], timed(calls[1])) for _ in range(rounds)]
    kernel_seconds, beside_seconds = (quantiles([pair[which] for pair in samples]) for which in (0, 1))
    return {
        **entry,
        "kernel_seconds": kernel_seconds,
        "beside_seconds": beside_seconds,
        "overhead_seconds": quantiles([public - bare for bare, public in samples]) if kernel.overhead else None,
        "noisy": is_noisy(kernel_seconds) or is_noisy(beside_seconds),
    }


def _disagreement(alone: list[Tensor], beside: Any, same_kernel: bool) -> str:
    """Empty where both give the same numbers: the same bits from the same kernel, otherwise what rounding allows. A backward gives one gradient for
    all candidates, the op one for each."""
    others = [beside] if isinstance(beside, Tensor) else list(beside)
    if len(others) > len(alone):
        others = [others[0], torch.stack(others[1:], 1)]
    for mine, theirs in zip(alone, others, strict=True):
        if same_kernel:
            if not torch.equal(mine, theirs.detach()):
                return f"the kernel and the op must agree in every bit, got {(mine.double() - theirs.detach().double()).abs().max():.3g} between them"
        else:
            difference, scale = (mine - theirs).abs().max().item(), theirs.square().mean().sqrt().item()
            if not difference <= MAXIMUM_RELATIVE_ERROR * scale:
                return f"the kernel and torch must agree, got {difference:.3g} between them"
    return ""


def screen(entries: Sequence[dict[str, Any]]) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", title="one thread", title_justify="left")
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading in ("kernel", "beside") else "right")
    for entry in entries:
        table.add_row(*cells(entry))
    reasons = dict.fromkeys(f"{entry['kernel']}: {entry['status']}: {entry['reason']}" for entry in entries if entry["reason"])
    noisy = [Text(NOISY, style="yellow")] if any(entry.get("noisy") for entry in entries) else []
    return Group(table, *map(Text, reasons), *noisy)


COLUMNS = ("kernel", "sizes", "dtype", "kernel alone", "beside", "it takes", "overhead (20 % … 80 %)")


def cells(entry: dict[str, Any]) -> list[str]:
    """A line of a table under COLUMNS."""
    at = listed(entry["parameters"])
    if entry["status"] != "ok":
        return [entry["kernel"], at, entry["dtype"], entry["status"], entry["beside"], DASH, DASH]
    overhead = entry["overhead_seconds"]

    def signed(seconds: float) -> str:
        return ("-" if seconds < 0 else "") + duration(abs(seconds))

    return [
        entry["kernel"],
        at,
        entry["dtype"],
        duration(entry["kernel_seconds"]["median"]) + MARK * bool(entry.get("noisy")),
        entry["beside"],
        duration(entry["beside_seconds"]["median"]),
        f"{signed(overhead['median'])} ({signed(overhead['q20'])} … {signed(overhead['q80'])})" if overhead else DASH,
    ]
