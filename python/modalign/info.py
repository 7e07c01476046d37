"""`modalign info`: what this installation is, for people and for bug reports."""

from __future__ import annotations

import json
import platform
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, _load


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def ops() -> dict[str, list[str]]:
    """Every op that has kernels and the devices they cover (`_wide` ops are the plain-torch path for more than 8 modalities)."""
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("modalign::") and not name.split(".")[0].endswith(("_bwd", "_wide")))
    return {
        name.removeprefix("modalign::"): [
            key
            for key in ("CPU", "CUDA")
            if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
        ]
        for name in names
    }


def collect() -> dict:
    """All facts as a dictionary that JSON can hold."""
    built = _load.build_info()
    try:
        host = import_module("modalign._host").build_info()
    except ImportError as error:
        host = {"missing": str(error)}
    return {
        "modalign": __version__,
        "torch": {"found": torch.__version__, "built_for": f">= {built['torch_minimum']}", "compiled_against": built["torch_built"]},
        "python": platform.python_version(),
        "numpy": _installed("numpy"),
        "compiler": built["compiler"],
        "cuda": {
            "compiled_with": built["cuda"],
            "targets": built["cuda_targets"],
            "kernels": len(_load.kernel_catalogue()),
            "torch_cuda": torch.version.cuda,
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "instruction_sets": {"compiled": _load.compiled_instruction_sets(), "chosen": _load.instruction_set(), "ran_here": _ran_here()},
        "threads": torch.get_num_threads(),
        "host_module": host,
        "ops": ops(),
    }


def _ran_here() -> list[str]:
    """The compiled instruction sets on which one small volume was computed just now, with the right result."""
    anchor = torch.eye(1, 3).view(1, 1, 3)
    other = torch.tensor([[[0.6, 0.8, 0.0]]])
    ran = []
    for name in _load.compiled_instruction_sets():
        try:
            with _load.use_instruction_set(name):
                volume, _, _ = torch.ops.modalign.gram_volume(anchor, [other], None, False, 1e-12)
        except ValueError:
            continue
        if abs(float(volume) - 0.8) < 1e-6:
            ran.append(name)
    return ran


def text(facts: dict | None = None) -> str:
    facts = facts or collect()
    cuda, sets = facts["cuda"], facts["instruction_sets"]
    lines = [
        f"modalign          {facts['modalign']}   (Python {facts['python']}, numpy {facts['numpy']})",
        f"torch             {facts['torch']['found']}   built for {facts['torch']['built_for']}, compiled against {facts['torch']['compiled_against']}",
        f"compiler          {facts['compiler']}",
        f"CUDA              {'compiled with ' + cuda['compiled_with'] if cuda['compiled_with'] else 'not compiled'}   targets {', '.join(cuda['targets']) or '-'}   "
        f"kernels {cuda['kernels']}   torch's CUDA {cuda['torch_cuda'] or '-'}   devices {', '.join(cuda['devices']) or 'none'}",
        f"instruction sets  chosen {sets['chosen']}   compiled {', '.join(sets['compiled'])}   ran here {', '.join(sets['ran_here'])}",
        f"threads           {facts['threads']}",
        f"kernel proofs     {'_host missing: ' + facts['host_module']['missing'] if 'missing' in facts['host_module'] else 'available (_host)'}",
        "",
        f"{'op':<30}{'CPU':<6}{'CUDA':<6}",
        *(f"{name:<30}{'yes' if 'CPU' in devices else 'no':<6}{'yes' if 'CUDA' in devices else 'no':<6}" for name, devices in facts["ops"].items()),
    ]
    return "\n".join(lines)


def main(as_json: bool = False) -> None:
    print(json.dumps(collect(), indent=2) if as_json else text())


if __name__ == "__main__":
    main("--json" in sys.argv[1:])
