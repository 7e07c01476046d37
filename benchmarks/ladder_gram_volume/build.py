"""Builds ladder.cpp against the installed engine headers, with the compiler flags of one instruction set."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

import modalign
from modalign import _load

HERE = Path(__file__).parent
RUNGS = ("definition", "naive", "tiled", "fused")
FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@functools.cache
def library(instruction_set: str) -> ctypes.CDLL:
    """The compiled rungs; built when the source, the headers or the flags are new."""
    command = [
        compiler() or "c++",
        "-std=c++20",
        "-O3",
        "-DNDEBUG",
        "-fno-math-errno",
        "-fPIC",
        "-shared",
        "-pthread",
        *FLAGS[instruction_set],
        f"-DMODALIGN_ISA={instruction_set}",
        "-I",
        modalign.include_dir(),
    ]
    sources = [HERE / "ladder.cpp", *sorted(Path(modalign.include_dir()).rglob("*.h"))]
    key = hashlib.sha256(b"\0".join([" ".join(command).encode(), *(source.read_bytes() for source in sources)])).hexdigest()[:16]
    folder = Path(os.environ.get("MODALIGN_LADDER_DIR", HERE.parent.parent / "build" / "ladder"))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"ladder_{instruction_set}_{key}.so"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}.tmp")
        subprocess.run([*command, str(HERE / "ladder.cpp"), "-o", str(unfinished)], check=True)
        unfinished.replace(target)
    loaded = ctypes.CDLL(str(target))
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    loaded.ladder_gram_volume.argtypes = [ctypes.c_int, size, size, ctypes.c_int, size, pointer, pointer, pointer, ctypes.c_int]
    loaded.ladder_gram_volume.restype = ctypes.c_bool
    return loaded


def run(rung: str, anchor: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Volumes [B, C] of float32 CPU tensors anchor [B, D] and others [C, m, D] by one rung, on torch's number of threads."""
    if anchor.dtype is not torch.float32 or others.dtype is not torch.float32 or anchor.device.type != "cpu":
        raise TypeError(f"ladder: tensors must be float32 on the CPU, got {anchor.dtype} and {others.dtype} on {anchor.device}")
    anchor, others = anchor.contiguous(), others.contiguous()
    (B, D), (C, m, _) = anchor.shape, others.shape
    volume = torch.empty(B, C)
    done = library(_load.instruction_set()).ladder_gram_volume(
        RUNGS.index(rung), B, C, m, D, anchor.data_ptr(), others.data_ptr(), volume.data_ptr(), torch.get_num_threads()
    )
    if not done:
        raise ValueError(f"ladder: others must hold 1 to 7 modalities, got {m}")
    return volume
