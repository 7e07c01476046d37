"""How much memory a call takes beyond what was there before it, native workspace included."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

_CHILD = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from modalign.testing.memory import _measure_here
print("\\n" + json.dumps(_measure_here(sys.argv[2], json.loads(sys.argv[3]))))
"""


@dataclass(frozen=True)
class PeakMemory:
    """peak: largest growth during the call, bytes. kept: growth that is still there after it, while its result is alive."""

    peak: int
    kept: int

    @property
    def workspace(self) -> int:
        return self.peak - self.kept


def peak_memory(target: str, *, threads: int | None = None, timeout: float = 120, **arguments: Any) -> PeakMemory:
    """Measure a call in a process of its own.

    `target` is "package.module:function". `function(**arguments)` makes the inputs and returns (call, warm_up): two functions without arguments,
    `call` the measured one and `warm_up` a small one that loads the code, or None. Arguments have to survive JSON.

    On the CPU this is the process's peak resident memory (so also what kernels and libraries allocate for themselves, which no torch hook sees), on
    CUDA, when the result lives there, torch's allocator statistics. Pages count when they are touched: measure calls of some tens of megabytes, not
    of some kilobytes."""
    environment = dict(os.environ, MALLOC_TRIM_THRESHOLD_="65536", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")
    if threads is not None:
        environment.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    command = [sys.executable, "-c", _CHILD, json.dumps(sys.path), target, json.dumps(arguments)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if finished.returncode != 0:
        raise RuntimeError(f"memory probe of {target} failed:\n{finished.stderr}")
    return PeakMemory(**json.loads(finished.stdout.rstrip().rsplit("\n", 1)[-1]))


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _measure_here(target: str, arguments: dict[str, Any]) -> dict[str, int]:
    import gc

    import torch

    module, _, function = target.partition(":")
    call, warm_up = getattr(importlib.import_module(module), function)(**arguments)
    if warm_up is not None:
        warm_up()
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.memory_allocated() > 0:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        measured = {"peak": torch.cuda.max_memory_allocated() - before, "kept": torch.cuda.memory_allocated() - before}
    else:
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # sets the peak back to the present
        before = _status("VmRSS")
        result = call()
        measured = {"peak": _status("VmHWM") - before, "kept": _status("VmRSS") - before}
    del result
    return measured
