"""Peak memory of a provider, measured in a process of its own by modalign.testing.peak_memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..testing.memory import peak_memory
from . import registry
from .measure import InputSets, Subject


def _smallest(case: registry.Case, parameters: dict[str, Any]) -> dict[str, Any]:
    """The same problem with large sizes cut down: loads code and libraries without touching much memory."""
    return {
        key: min(value, 64) if isinstance(value, int) and not isinstance(value, bool) and key.isupper() else value
        for key, value in parameters.items()
    }


def subject_in_child(
    file: str, case: str, provider: str, parameters: dict[str, Any], dtype: str, device: str, pass_: str, seed: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    registry.load_cases(file)
    chosen, one = registry.cases()[case], registry.providers_of(case)[provider]

    def call_with(sizes: dict[str, Any]) -> Callable[[], Any]:
        inputs = InputSets(chosen, sizes, getattr(torch, dtype), torch.device(device), seed, count=1)
        subject = Subject(one, inputs, sizes, upstream=pass_ != "fwd")

        def call() -> Any:
            with one.context():
                return subject.forward(0) if pass_ == "fwd" else subject.both(0)

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
) -> int:
    """Largest growth during one pass, beyond the inputs: results, gradients and whatever was in between."""
    probe = peak_memory(
        "modalign.bench.memory:subject_in_child",
        threads=threads,
        timeout=900,
        file=case.file,
        case=case.name,
        provider=provider.name,
        parameters=dict(parameters),
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        pass_=pass_,
        seed=seed,
    )
    return probe.peak
