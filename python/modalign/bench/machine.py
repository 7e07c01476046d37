"""What the machine can do: matrix products per second, bytes copied per second, and what one call through torch costs. Every percentage of a floor
that a case does not declare itself comes from here, and so does the roof of the roofline."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import ops
from . import environment
from .environment import last_cache_bytes
from .measure import quantiles
from .results import read_results

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROUNDS = 7
LARGEST_PRODUCT = 2048
PRODUCT_SECONDS = 0.3  # a product may take this long: where a dtype has no fast path a smaller one has to do
QUICK_PRODUCT_SECONDS = 0.01
NOISY_SPREAD = 0.1


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _seconds(call: Callable[[], Any], device: torch.device, rounds: int, calls: int = 1) -> list[float]:
    """Of one call, in every round; the first call does not count."""
    call()
    samples = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append((time.perf_counter() - begin) / calls)
    return samples


def _rate(work: float, seconds: Sequence[float]) -> dict[str, float]:
    return quantiles([work / one for one in seconds])


def matmul_rate(dtype: torch.dtype, device: torch.device, rounds: int = ROUNDS, budget: float = PRODUCT_SECONDS) -> dict[str, Any]:
    """FLOP per second of torch.mm on square matrices into a preallocated output; as large as `budget` seconds per product allow, 2048 at most on the
    CPU, 8192 on CUDA."""
    size, largest = 128, LARGEST_PRODUCT if device.type == "cpu" else 4 * LARGEST_PRODUCT
    while True:
        left, right = (torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).to(device, dtype) for seed in (0, 1))
        out = torch.empty(size, size, dtype=dtype, device=device)
        estimate = min(_seconds(lambda: torch.mm(left, right, out=out), device, 3))  # noqa: B023
        if size == largest or 8 * estimate > budget:
            break
        size *= 2
    samples = _seconds(lambda: torch.mm(left, right, out=out), device, rounds, max(1, math.ceil(0.2 * budget / estimate)))
    return {"dtype": _name(dtype), "size": size, "flop_per_second": _rate(2.0 * size**3, samples)}


def copy_bandwidth(device: torch.device, rounds: int = ROUNDS) -> dict[str, Any]:
    """Bytes read and written per second by a copy of four times the last cache."""
    count = max(64 << 20, 4 * last_cache_bytes(device)) // 4
    source, target = torch.ones(count, device=device), torch.empty(count, device=device)
    return {"bytes": 8 * count, "byte_per_second": _rate(8.0 * count, _seconds(lambda: target.copy_(source), device, rounds))}


def dispatch_overhead(device: torch.device, rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds of a call with next to nothing to compute: an op of torch's own, ours as torch dispatches it, and our public function with its
    checks and, last, with autograd's graph."""
    vectors = [torch.ones(1, 2, device=device), torch.ones(1, 2, device=device)]
    tracked = [vector.clone().requires_grad_() for vector in vectors]
    calls = {
        "torch_op": lambda: torch.mul(vectors[0], vectors[1]),
        "registered_op": lambda: torch.ops.modalign.paired_gram_volume(vectors, None, False, 1e-12),
        "public_function": lambda: ops.paired_gram_volume(vectors),
        "public_function_with_graph": lambda: ops.paired_gram_volume(tracked),
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(rounds):
            for name, call in calls.items():
                with torch.set_grad_enabled(name == "public_function_with_graph"):
                    samples[name] += _seconds(call, device, 1, 300)
    return {"op": "paired_gram_volume", "seconds": {name: quantiles(times) for name, times in samples.items()}}


def measure_machine(
    dtypes: Sequence[torch.dtype] = DTYPES,
    threads: Sequence[int] = (1,),
    device: torch.device = CPU,
    *,
    quick: bool = False,
    listen: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The machine's figures for these dtypes and CPU thread counts: {"matmul": [...], "copy": [...], "dispatch": {...}}, each rate as its median and
    the quantiles between which 60 % of `rounds` lie. About half a minute for everything, a second or two where `quick`."""
    rounds, budget = (3, QUICK_PRODUCT_SECONDS) if quick else (ROUNDS, PRODUCT_SECONDS)
    before = torch.get_num_threads()
    matmul: list[dict[str, Any]] = []
    copies: list[dict[str, Any]] = []
    try:
        for count in threads:
            torch.set_num_threads(count)
            for dtype in dtypes:
                listen(f"machine: products in {_name(dtype)}, {count} threads")
                matmul.append({"threads": count, **matmul_rate(dtype, device, rounds, budget)})
            listen(f"machine: copies, {count} threads")
            copies.append({"threads": count, **copy_bandwidth(device, rounds)})
        listen("machine: dispatch")
        torch.set_num_threads(1)
        dispatch = dispatch_overhead(device, rounds)
    finally:
        torch.set_num_threads(before)
    return {"device": device.type, "matmul": matmul, "copy": copies, "dispatch": dispatch}


def saved(path: Path, dtypes: Sequence[torch.dtype], threads: Sequence[int], device: torch.device) -> dict[str, Any]:
    """The figures that a file holds. ValueError where they are of another machine, or do not cover these dtypes and thread counts."""
    held = read_results(path)
    figures = held.get("machine")
    if not figures:
        raise ValueError(f"bench: --machine must be a file with figures of the machine, got {path} without any")
    for name, (there, here) in environment.differences(held["environment"], environment.describe(device, 0)).items():
        raise ValueError(f"bench: --machine must be of this machine, got {path} with {name} {there} where it is {here} now")
    found = {(entry["dtype"], entry["threads"]) for entry in figures["matmul"]}
    for dtype, count in itertools.product(dtypes, threads):
        if (_name(dtype), count) not in found or not any(entry["threads"] == count for entry in figures["copy"]):
            raise ValueError(f"bench: --machine must cover {_name(dtype)} with {count} threads, got {sorted(found)} in {path}")
    return figures


def is_noisy(figure: dict[str, float]) -> bool:
    """Whether the quantiles of a time or a rate lie so far apart that something else must have been running."""
    return figure["q80"] - figure["q20"] > NOISY_SPREAD * figure["median"]


def peaks(machine: dict[str, Any] | None, dtype: str, threads: int) -> tuple[dict[str, float], dict[str, float]] | None:
    """(FLOP per second, bytes per second) for a dtype and thread count, or None where they were not measured. Half types on the CPU are held against
    float32, whose products they could use after widening, where that is faster."""
    if machine is None:
        return None
    rates = {entry["dtype"]: entry["flop_per_second"] for entry in machine["matmul"] if entry["threads"] == threads}
    bandwidth = next((entry["byte_per_second"] for entry in machine["copy"] if entry["threads"] == threads), None)
    if dtype not in rates or bandwidth is None:
        return None
    candidates = [rates[dtype]]
    if machine["device"] == "cpu" and dtype in ("float16", "bfloat16") and "float32" in rates:
        candidates.append(rates["float32"])
    return max(candidates, key=lambda rate: rate["median"]), bandwidth


def floor_seconds(machine: dict[str, Any] | None, dtype: str, threads: int, flops: float | None, moved: float | None) -> tuple[float, bool] | None:
    """(seconds that a case of so many FLOP and bytes takes at least, whether that measurement was noisy), or None where nothing is known: the longer
    of computing at the machine's matmul rate and moving at its copy bandwidth.

    >>> rate = {"median": 1e9, "q20": 1e9, "q80": 1e9}
    >>> machine = {"device": "cpu", "matmul": [{"dtype": "float32", "threads": 1, "flop_per_second": rate}],
    ...            "copy": [{"threads": 1, "byte_per_second": rate}]}
    >>> floor_seconds(machine, "float32", 1, 5e9, 2e9)
    (5.0, False)
    """
    found = peaks(machine, dtype, threads)
    terms = [(work / rate["median"], rate) for work, rate in zip((flops, moved), found or (), strict=False) if work]
    if not terms:
        return None
    seconds, rate = max(terms, key=lambda term: term[0])
    return seconds, is_noisy(rate)
