"""What device.sh runs on a GPU, in whatever Python is there: needs torch and the staged package alone, no _host, no pytest, no rich.

python benchmarks/device.py battery --out battery.json [--small]
python benchmarks/device.py bench gram_volume --out gram_volume.json --dtype float32,bfloat16 [--quick]
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import modalign
from modalign import bench, testing
from modalign.bench import environment

HERE = Path(__file__).parent


def battery(options: argparse.Namespace) -> bool:
    """Every check of tests/cases.py and tests/selection_checks.py on the GPU; --small keeps values and gradients in float32 and bfloat16, which reach every kernel in little time
    under a sanitizer."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from cases import CASES
    from selection_checks import checks as selection_checks

    results = []
    for name, check in [*testing.battery(CASES, on=[options.device]), *selection_checks(options.device)]:
        small = ("-values-float32", "-values-bfloat16", "-gradients-float32", "-gradients-bfloat16", "selection-float32-sqeuclidean", "selection-bfloat16-sqeuclidean")
        if options.small and not any(part in name for part in small):
            continue
        begin, problem = time.perf_counter(), ""
        try:
            check()
        except Exception as failure:
            problem = f"{type(failure).__name__}: {failure}"
            print(f"FAILED {name}: {problem}", flush=True)
        results.append({"check": name, "passed": not problem, "problem": problem, "seconds": round(time.perf_counter() - begin, 3)})
    failed = sum(not result["passed"] for result in results)
    print(f"{len(results) - failed} of {len(results)} checks passed on {options.device}")
    if options.out:
        environment_now = environment.describe(torch.device(options.device), 0)
        Path(options.out).write_text(
            json.dumps({"schema": "modalign.device_battery/1", "environment": environment_now, "checks": results}, indent=1) + "\n"
        )
    return bool(results) and not failed


def run_bench(options: argparse.Namespace) -> bool:
    chosen = bench.Options(
        device=torch.device(options.device),
        dtypes=tuple(getattr(torch, name) for name in options.dtype.split(",")),
        quick=options.quick,
        rounds=options.rounds,
        threads=(1,),
    )
    results = bench.run_cases(
        bench.load_cases(HERE / "cases" / f"{options.name}.py"),
        chosen,
        environment.command_of_this_process(),
        lambda text: print(text, flush=True),
    )
    bench.write_results(options.out, results)
    return not any(row["status"] in ("mismatch", "failed") and row["kind"] == "ours" for row in results["rows"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("battery")
    one.add_argument("--out")
    one.add_argument("--small", action="store_true")
    two = commands.add_parser("bench")
    two.add_argument("name")
    two.add_argument("--out", required=True)
    two.add_argument("--dtype", default="float32,bfloat16")
    two.add_argument("--rounds", type=int, default=15)
    two.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"device.py: torch must see a GPU, got none (torch {torch.__version__})", file=sys.stderr)
        return 1
    if options.device == "cuda" and not modalign._load.kernel_catalogue():
        print("device.py: the binary must hold CUDA kernels, got a build for the CPU alone", file=sys.stderr)
        return 1
    return 0 if (battery(options) if options.command == "battery" else run_bench(options)) else 1


if __name__ == "__main__":
    sys.exit(main())
