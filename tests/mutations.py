"""Every seeded mutation of a kernel must be noticed: by the emulator, or by a wrong result."""

from collections.abc import Callable, Collection
from typing import Any

from modalign import _host

SCHEDULES = {
    "forward": {},
    "reverse": {"thread_order": "reverse", "block_order": "reverse", "seed": 1},
    "random": {"thread_order": "random", "block_order": "random", "seed": 2},
    "random, yielding": {"thread_order": "random", "block_order": "random", "seed": 3, "yield_probability": 0.01},
}


def check_mutations(key: str, run: Callable[..., Any], is_right: Callable[[Any], bool], harmless: Collection[str] = ()) -> None:
    """run(mutation=, **schedule) is a case that passes every marked place of the kernel; is_right is asked about its outputs. `harmless`: places whose breaking changes nothing."""
    assert is_right(run().outputs)
    names = _host.mutations(key)
    assert names, f"{key}: no place is marked"
    for name in names:
        if name not in harmless:
            assert _notices(key, run, is_right, name), f"{key}: nothing noticed '{name}'"


def _notices(key: str, run: Callable[..., Any], is_right: Callable[[Any], bool], name: str) -> bool:
    for options in SCHEDULES.values():
        try:
            result = run(mutation=name, **options)
        except _host.KernelReport:
            return True
        assert result.mutation_reached, f"{key}: {name} is not passed"
        if not is_right(result.outputs):
            return True
    return False
