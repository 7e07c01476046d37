"""Builds the wheel with every CUDA target from an empty build folder, looks at its compiled kernels, and records how long it took: `make wheel`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

from modalign.bench import environment
from modalign._files import write_json

ROOT = Path(__file__).resolve().parent.parent
TARGETS = "80-real;86-real;89-real;90a-real;90-virtual"


def main() -> None:
    with tempfile.TemporaryDirectory() as build:
        settings = {"MODALIGN_CUDA_ARCHITECTURES": os.environ.get("MODALIGN_CUDA_ARCHITECTURES", TARGETS), "MODALIGN_BUILD_DIR": build}
        start = time.perf_counter()
        command = [sys.executable, "-m", "pip", "wheel", "-q", ".", "--no-build-isolation", "--no-deps", "-w", "dist"]
        subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, check=True)
        seconds = time.perf_counter() - start
    wheel = max((ROOT / "dist").glob("modalign-*.whl"), key=lambda path: path.stat().st_mtime)
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        archive.extractall(folder, [name for name in archive.namelist() if name in ("modalign/_C.so", "modalign/_build.json")])
        built = json.loads((Path(folder) / "modalign/_build.json").read_text())
        # Registers, frames and main loops of every target, where `make test` sees those of the development build alone.
        environment_of_test = {**os.environ, "MODALIGN_PACKAGE": f"{folder}/modalign"}
        subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_kernel_objects.py"], cwd=ROOT, env=environment_of_test, check=True)
    results = {
        "seconds": round(seconds, 1),
        "wheel": wheel.name,
        "megabytes": round(wheel.stat().st_size / 2**20, 1),
        "built": built,
        "environment": environment.describe(torch.device("cpu"), 0),
    }
    write_json(ROOT / "benchmarks/results/wheel.json", results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
