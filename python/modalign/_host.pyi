"""Build facts, the kernel catalogue, and the CUDA kernels run on the CPU by an emulator that reports races and bad addresses."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np

Order = Literal["forward", "reverse", "random"]
Kind = Literal[
    "race_shared", "race_global", "out_of_bounds_shared", "out_of_bounds_global", "uninitialised_shared", "uninitialised_global", "unwritten_output",
    "misaligned", "divergent_barrier", "shuffle_mask", "copy_not_waited",
]

class KernelReport(RuntimeError):
    """A kernel broke a rule of the device."""

    kind: Kind
    kernel: str
    block: tuple[int, int, int]
    thread: int
    address: str
    """"shared byte 64" or "volume element 17"; empty where the report is about synchronisation."""

class Launch(TypedDict):
    """One launch of a run; the counts do not depend on the schedule."""

    key: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    barriers: int
    warp_barriers: int
    shuffles: int
    matrix_products: int
    global_bytes_read: int
    global_bytes_written: int

class Kernel(TypedDict):
    family: str
    threads: int
    tags: dict[str, str]

class BuildInfo(TypedDict):
    """The facts of `_build.json`, and what holds for this module alone."""

    version: str
    torch_built: str
    torch_minimum: str
    compiler: str
    cuda: str | None
    cuda_targets: list[str]
    instruction_sets: list[str]
    build_type: str
    cplusplus: int
    pybind11: str
    context_switch: Literal["x86-64", "ucontext"]
    address_sanitizer: bool

class RunResult:
    @property
    def outputs(self) -> dict[str, np.ndarray]:
        """Arrays by name; bf16 as its bits in uint16."""
    @property
    def launches(self) -> list[Launch]: ...
    @property
    def mutation_reached(self) -> bool:
        """Whether the kernel passed the place of the mutation that was switched on."""

def build_info() -> BuildInfo:
    """Facts about how this module was built."""

def kernels() -> dict[str, Kernel]:
    """The catalogue by key."""

def launch_counts() -> dict[str, int]:
    """How often each key has been launched with at least one block since the module was loaded."""

def mutations(key: str) -> list[str]:
    """Places of this kernel's seeded mutations that runs have passed so far."""

def use_context_switch(name: Literal["x86-64", "ucontext"]) -> str:
    """Choose how runs switch between threads, and say what was chosen before. Results do not depend on it."""

def run(
    key: str,
    arguments: Mapping[str, Any],
    *,
    seed: int = 0,
    thread_order: Order = "forward",
    block_order: Order = "forward",
    yield_probability: float = 0.0,
    mutation: str | None = None,
    offsets: Mapping[str, int] = {},
) -> RunResult:
    """Run a kernel of the catalogue in the emulator.

    `offsets` moves named arrays by so many elements off their 256-byte alignment; `mutation` breaks the kernel at a named place.
    Raises KernelReport at the first broken rule of the device.
    """

# The forms of the CPU tile engine on one thread; a and b are both float32 or both float64.
def tile_product(a: np.ndarray, b: np.ndarray, instruction_set: str = "auto") -> np.ndarray:
    """Form a: a b^t."""

def tile_square_sum(a: np.ndarray, b: np.ndarray, group: int, instruction_set: str = "auto") -> np.ndarray:
    """Form b: sums of squares of neighbouring products."""

def tile_log_sum_exp(a: np.ndarray, b: np.ndarray, scale: float, instruction_set: str = "auto") -> tuple[np.ndarray, np.ndarray]:
    """Form c: log-sum-exp of the rows and of the columns of scale a b^t."""

def tile_weighted_values(a: np.ndarray, b: np.ndarray, values: np.ndarray, instruction_set: str = "auto") -> np.ndarray:
    """Form d: (a b^t) values."""

# CPU kernels on one thread, with nothing of torch around them.
def cpu_kernels() -> list[str]:
    """Names that time_cpu_kernel takes."""

def time_cpu_kernel(
    kernel: str, inputs: Sequence[np.ndarray], repeats: int = 1, *, group: int = 2, instruction_set: str = "auto"
) -> tuple[float, list[np.ndarray]]:
    """Run a CPU kernel `repeats` times; seconds of one call, and its outputs.

    `inputs` are those of the op, contiguous and without leading dimensions, all float32, float64, float16 or the bits of bfloat16 in uint16; a backward
    takes the upstream gradient after them. `group` belongs to tile_square_sum. Outputs, workspaces and what the forward saves are made before the clock
    starts.
    """
