"""Benchmarks: cases x providers, each provider checked against float64 before it is timed, results as JSON.

A file of cases (benchmarks/cases/*.py here, anything of yours elsewhere)::

    from modalign import bench

    @bench.case(grid=[dict(N=4096, D=512)], reference=lambda x: x.softmax(-1), bytes=lambda p, pass_, size: 2 * p["N"] * p["D"] * size)
    def softmax(maker, N, D):
        return (maker.randn(N, D),)

    @bench.provider(softmax, kind="ours")
    def mine(x):
        return my_softmax(x)

    @bench.copy_floor(softmax)
    def copy(p, pass_, size):
        return 2 * p["N"] * p["D"] * size

and `modalign.bench.run_file(path, ...)`, which benchmarks/run.py calls, does the rest. Figures in Markdown come from the JSON: `python -m
modalign.bench.tables README.md`.
"""

from .registry import Case, Provider, Target, case, cases, copy_floor, load_cases, matmul_floor, provider, providers_of
from .results import SCHEMA, read_results, write_results
from .run import Options, run_cases, run_file

__all__ = [
    "SCHEMA",
    "Case",
    "Options",
    "Provider",
    "Target",
    "case",
    "cases",
    "copy_floor",
    "load_cases",
    "matmul_floor",
    "provider",
    "providers_of",
    "read_results",
    "run_cases",
    "run_file",
    "write_results",
]
