"""Peak memory of a provider, measured in a process of its own by modalign.testing.peak_memory."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..testing.memory import peak_memory
from . import registry
from .measure import InputSets, Subject, is_out_of_memory

START_SECONDS = 60  # for a process to start, load torch and draw its inputs
SHARE_OF_FREE_MEMORY = 0.9


def available_bytes() -> int:
    """Memory that this process may still take without swapping: what the system has free, or its control group has left."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    try:
        group = Path("/sys/fs/cgroup")
        available = min(available, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no control group, or "max": no bound of its own
        pass
    return available


def limit_memory() -> None:
    """From here on an allocation that does not fit fails here, before the system chooses a process to end."""
    used = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + int(SHARE_OF_FREE_MEMORY * available_bytes()), resource.getrlimit(resource.RLIMIT_DATA)[1]))


@contextlib.contextmanager
def limited(device: torch.device) -> Iterator[None]:
    """`limit_memory` for the time of a block, on the CPU."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if device.type == "cpu":
        limit_memory()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _smallest(case: registry.Case, parameters: dict[str, Any]) -> dict[str, Any]:
    """The same problem with large sizes cut down: loads code and libraries without touching much memory."""
    return {
        key: min(value, 64) if isinstance(value, int) and not isinstance(value, bool) and key.isupper() else value
        for key, value in parameters.items()
    }


def subject_in_child(
    sources: list[str], case: str, provider: str, parameters: dict[str, Any], dtype: str, device: str, pass_: str, seed: int, limit: float | None
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    for source in sources:
        registry.load(source)
    if limit is not None and device == "cpu":
        limit_memory()
    chosen, one = registry.cases()[case], registry.providers_of(case)[provider]

    def call_with(sizes: dict[str, Any]) -> Callable[[], Any]:
        inputs = InputSets(chosen, sizes, getattr(torch, dtype), torch.device(device), seed, count=1)
        subject = Subject(one, inputs, sizes, upstream=pass_ != "fwd")

        def call() -> Any:
            begin = time.perf_counter()
            with one.context():
                result = subject.forward(0) if pass_ == "fwd" else subject.both(0)
            if limit is not None and not one.compiled and time.perf_counter() - begin > limit:
                raise TimeoutError(f"one call took {time.perf_counter() - begin:.3g} s")
            return result

        return call

    call = call_with(parameters)
    return call, call if one.compiled else call_with(_smallest(chosen, parameters))


def peak_bytes(
    case: registry.Case,
    provider: registry.Provider,
    parameters: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    pass_: str,
    seed: int,
    threads: int,
    limit: float | None = None,
) -> int:
    """Largest growth during one pass, beyond the inputs: results, gradients and whatever was in between. With a `limit` in seconds a call that takes
    longer, or more memory than there is, raises TimeoutError or MemoryError instead."""
    arguments = dict(
        sources=registry.sources(),
        case=case.name,
        provider=provider.name,
        parameters=dict(parameters),
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        pass_=pass_,
        seed=seed,
        limit=limit,
    )
    try:
        return peak_memory(
            "modalign.bench.memory:subject_in_child", threads=threads, timeout=900 if limit is None else limit + START_SECONDS, **arguments
        ).peak
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"one call took more than {error.timeout:.0f} s") from error
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        if "TimeoutError: " in last:
            raise TimeoutError(last.partition("TimeoutError: ")[2]) from error
        if is_out_of_memory(error) or last.endswith("failed:"):  # no last words: the system ended it
            raise MemoryError(last) from error
        raise
