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

and `modalign bench run softmax --cases FILE` does the rest: see docs/bench.md. Figures in Markdown come from the JSON: `python -m
modalign.bench.tables README.md`.
"""

from .comparison import compare
from .machine import measure_machine
from .providers import compiled, ours
from .registry import Case, Provider, Target, case, cases, copy_floor, load_cases, load_provider, matmul_floor, provider, providers_of
from .results import SCHEMA, read_results, validate, write_results
from .run import Options, run_cases

__all__ = [
    "SCHEMA",
    "Case",
    "Options",
    "Provider",
    "Target",
    "case",
    "cases",
    "compare",
    "compiled",
    "copy_floor",
    "load_cases",
    "load_provider",
    "matmul_floor",
    "measure_machine",
    "ours",
    "provider",
    "providers_of",
    "read_results",
    "run_cases",
    "validate",
    "write_results",
]
