"""What a timing depends on and nothing that identifies the machine: no host name, no user, no path."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import _load


COMPARABLE = ("device", "cpu", "gpu", "torch", "blas")  # where one of them differs, so do times


def differences(one: Mapping[str, Any], other: Mapping[str, Any], names: Sequence[str] = COMPARABLE) -> dict[str, tuple[Any, Any]]:
    """{fact: both} of what two descriptions do not agree in; of a fact that is a mapping, what differs in it.

    >>> differences({"cpu": {"cores": 2, "model": "x"}}, {"cpu": {"cores": 4, "model": "x"}})
    {'cpu': ({'cores': 2}, {'cores': 4})}
    """
    found = {}
    for name in names:
        first, second = one.get(name), other.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            unlike = [key for key in {**first, **second} if first.get(key) != second.get(key)]
            first, second = ({key: facts.get(key) for key in unlike} for facts in (first, second))
        if first != second:
            found[name] = (first, second)
    return found


def last_cache_bytes(device: torch.device | None = None) -> int:
    """Size of the last cache before memory, the GPU's second level there; 32 MiB where the system does not say."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    largest = 0
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        size = (index / "size").read_text().strip()
        largest = max(largest, int(size[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[size[-1]] if size[-1].isalpha() else int(size))
    return largest or 32 * 2**20


def cpu_model() -> str:
    """Its name with family and model number: virtual machines give generations that differ by half in speed the same name."""
    facts = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text().partition("\n\n")[0], re.MULTILINE))
    name = facts.get("model name", platform.machine())
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if {"cpu family", "model"} <= facts.keys() else name


def all_threads() -> int:
    return len(os.sched_getaffinity(0))


def blas() -> str:
    shown = torch.__config__.show()
    name = re.search(r"BLAS_INFO=(\w+)", shown)
    version = re.search(r"oneAPI Math Kernel Library Version ([\d.]+)", shown)
    return " ".join([name.group(1) if name else "unknown", *([version.group(1)] if version else [])])


def public_path(path: str | Path) -> str:
    """Relative to the working directory, or without its folder where it lies outside it."""
    path, here = Path(path), Path.cwd()
    if not path.is_absolute():
        return path.as_posix()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name


def public_command(arguments: list[str]) -> str:
    """The command to repeat this, its paths as `public_path` shows them; a note is kept elsewhere."""

    def shown(argument: str) -> str:
        flag, equals, value = argument.rpartition("=")
        return flag + equals + public_path(value) if Path(value).is_absolute() else argument

    kept = [
        argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
        if "--note" not in (before, argument) and not argument.startswith("--note=")
    ]
    command = shlex.join(shown(argument) for argument in kept)
    return command if kept[0].endswith("modalign") else "python " + command


def describe(device: torch.device, seed: int) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": device.type,
        "cpu": {
            "model": cpu_model(),
            "cores": all_threads(),
            "last_cache_bytes": last_cache_bytes(),
            "instruction_set": _load.instruction_set(),
            "torch_uses": torch.backends.cpu.get_cpu_capability(),
        },
        "gpu": None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "blas": blas(),
        "modalign": _load.build_info(),
        "seed": seed,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "model": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return facts


def command_of_this_process() -> str:
    """What to type to repeat this."""
    program = Path(sys.argv[0])
    return public_command([program.name if program.name == "modalign" else program.as_posix(), *sys.argv[1:]])
