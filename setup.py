"""Builds the two native modules by CMake and Ninja; everything else is in pyproject.toml.

Environment: MODALIGN_CUDA (AUTO, ON, OFF), MODALIGN_CUDA_ARCHITECTURES (a CMake list such as 90a-real), MODALIGN_JOBS, MODALIGN_BUILD_DIR.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def jobs() -> int:
    """One compiler per core, and per 2 GB of memory: a CUDA translation unit can take that much."""
    if wanted := os.environ.get("MODALIGN_JOBS"):
        return int(wanted)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory // 2)))


class CMakeBuild(build_ext):
    def get_ext_filename(self, name: str) -> str:
        # _C.so holds no Python: one file for every Python version, so without the version in its name.
        return "modalign/_C.so" if name == "modalign._C" else super().get_ext_filename(name)

    def run(self) -> None:
        import pybind11
        import torch

        package = Path(self.get_ext_fullpath("modalign._C")).resolve().parent
        build = Path(os.environ.get("MODALIGN_BUILD_DIR", ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"))
        options = {
            "CMAKE_INSTALL_PREFIX": package,
            "MODALIGN_VERSION": self.distribution.get_version(),
            "MODALIGN_TORCH_DIR": Path(torch.__file__).parent,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "Python_EXECUTABLE": sys.executable,
            "MODALIGN_CUDA": os.environ.get("MODALIGN_CUDA", "AUTO"),
        }
        if targets := os.environ.get("MODALIGN_CUDA_ARCHITECTURES"):
            options["MODALIGN_CUDA_ARCHITECTURES"] = targets
        # CMake and Ninja may be Python packages of a build environment that is gone at the next build, so they are looked up each time.
        subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *(f"-D{key}={value}" for key, value in options.items())], check=True)
        subprocess.run(["cmake", "--build", build, "--parallel", str(jobs())], check=True)
        subprocess.run(["cmake", "--install", build], check=True)

    def get_outputs(self) -> list[str]:
        package = Path(self.get_ext_fullpath("modalign._C")).parent
        patterns = ["_C.so", "_host.*.so", "_build.json", "include/**/*.*h", "bench/cases/*.py"]
        return [str(file) for pattern in patterns for file in package.glob(pattern)]


setup(ext_modules=[Extension("modalign._C", []), Extension("modalign._host", [])], cmdclass={"build_ext": CMakeBuild})
