"""The binary itself: what it links, which symbols it needs, which instructions stand where, and how it is built."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import modalign
from modalign import _load, info

ROOT = Path(__file__).resolve().parent.parent
TORCH = Path(torch.__file__).parent
STABLE_ABI = (2, 11)
GLIBC = (2, 34)


def run(*command, **options) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, **options).stdout


def undefined_symbols() -> list[str]:
    return [line.split()[-1] for line in run("nm", "-D", "--undefined-only", _load.LIBRARY).splitlines()]


def stable_abi_functions() -> dict[str, tuple[int, int]]:
    """Every function of torch's stable C shims with the version that introduced it, read from the installed headers."""
    functions = {}
    for header in ("csrc/inductor/aoti_torch/c/shim.h", "csrc/stable/c/shim.h"):
        since = [(0, 0)]
        for line in (TORCH / "include/torch" / header).read_text().splitlines():
            if guard := re.match(r"#\s*if.*TORCH_FEATURE_VERSION\s*>=\s*TORCH_VERSION_(\d+)_(\d+)", line):
                since.append((int(guard[1]), int(guard[2])))
            elif re.match(r"#\s*if", line):
                since.append(since[-1])
            elif re.match(r"#\s*endif", line):
                since.pop()
            for name in re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", line):
                functions.setdefault(name, since[-1])
    # one macro declares the accessors of dtypes, layouts, devices and memory formats
    return functions


def test_torch_symbols_are_within_the_stable_abi():
    known = stable_abi_functions()
    accessors = re.compile(r"aoti_torch_(dtype|layout|device_type|memory_format)_\w+")
    used = [name for name in undefined_symbols() if "torch" in name.lower() or "c10" in name or "at6" in name]
    assert len(used) > 20, "nothing was read: the test would prove nothing"
    wrong = [name for name in used if not accessors.fullmatch(name) and known.get(name, (99, 0)) > STABLE_ABI]
    assert not wrong, f"outside the stable ABI of torch {STABLE_ABI}: {wrong}"


def test_no_mangled_cxx_symbol_is_needed():
    assert not [name for name in undefined_symbols() if name.startswith("_Z") and not name.startswith("_ZGT")]


def test_linked_libraries():
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", _load.LIBRARY)))
    assert "libtorch_cpu.so" in needed
    allowed = {"libtorch_cpu.so", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2"}
    assert needed <= allowed, needed - allowed   # so neither libtorch_cuda, libcudart, libstdc++ nor an OpenMP runtime


def test_symbol_versions_are_old_enough():
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"@GLIBC_([\d.]+)", "\n".join(undefined_symbols()))}
    assert versions and max(versions) <= GLIBC, f"needs glibc {max(versions)}"
    assert not [name for name in undefined_symbols() if "GLIBCXX" in name or "CXXABI" in name]


def test_only_plain_c_entry_points_are_exported():
    exported = [line.split()[-1] for line in run("nm", "-D", "--defined-only", _load.LIBRARY).splitlines()]
    assert exported and all(name.startswith("modalign_") for name in exported), exported


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="not run: instruction sets are chosen on x86-64 only")
def test_wide_instructions_stand_only_in_their_namespace():
    # One AVX-512 instruction in a shared inline function would stop every older machine.
    function, seen, wrong = "", {"avx2": 0, "avx512": 0}, set()
    listing = subprocess.Popen(["objdump", "-d", "--no-show-raw-insn", str(_load.LIBRARY)], stdout=subprocess.PIPE, text=True)
    for line in listing.stdout:
        if line.endswith(">:\n"):
            function = line
        elif "%zmm" in line or "%ymm" in line or "\tvfmadd" in line:
            home = "avx512" if "6avx512" in function else "avx2" if "4avx2" in function else None   # mangled namespace
            if home is None or ("%zmm" in line and home != "avx512"):
                wrong.add(function.strip())
            else:
                seen[home] += 1
    listing.wait()
    assert not wrong, sorted(wrong)[:10]
    assert min(seen.values()) > 100


def test_build_facts_are_in_the_library_and_beside_it():
    assert _load.build_info() == _load.built_for()
    assert _load.build_info()["instruction_sets"] == _load.compiled_instruction_sets()


def test_info_names_what_matters():
    facts = info.collect()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["instruction_sets"]["chosen"] in facts["instruction_sets"]["ran_here"]
    assert "CPU" in facts["ops"]["gram_volume"]
    for word in (torch.__version__, facts["torch"]["compiled_against"], facts["instruction_sets"]["chosen"], "gram_volume"):
        assert word in info.text(facts)


def test_instruction_set_can_be_chosen_and_a_wrong_name_is_refused():
    for name in info.collect()["instruction_sets"]["ran_here"]:
        with _load.use_instruction_set(name):
            assert _load.instruction_set() == name
    with pytest.raises(ValueError, match=r"use_instruction_set: name must be one .*, got 'sse9'"), _load.use_instruction_set("sse9"):
        pass


def test_an_old_torch_is_told_both_versions_and_the_remedy(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ImportError, match=r"torch must be at least 2\.11, got 2\.9\.1.*pip install"):
        _load.load_library.__wrapped__()


def test_a_library_that_does_not_load_names_both_versions(monkeypatch, tmp_path):
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_load, "LIBRARY", broken)
    with pytest.raises(ImportError, match=r"(?s)found: +torch .*built for: torch >= 2\.11 \(compiled against .*Remedy"):
        _load.load_library.__wrapped__()


def test_a_missing_library_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(_load, "LIBRARY", tmp_path / "_C.so")
    with pytest.raises(ImportError, match="never compiled here.*pip install"):
        _load.load_library.__wrapped__()


def test_headers_for_custom_epilogues_are_installed():
    include = Path(modalign.include_dir())
    for header in ("cpu/tile.h", "cuda/tile.cuh", "common/vec.h", "common/simt.h", "host/simt_host.h", "host/simt_host.cpp"):
        assert (include / header).read_text() == (ROOT / "csrc" / header).read_text(), header


def configure(tmp_path, *options):
    command = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path), f"-DMODALIGN_TORCH_DIR={TORCH}", "-DMODALIGN_HOST=OFF", *options]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})


def test_cuda_on_without_nvcc_stops_with_a_clear_message(tmp_path):
    result = configure(tmp_path, "-DMODALIGN_CUDA=ON", "-DCMAKE_CUDA_COMPILER=CMAKE_CUDA_COMPILER-NOTFOUND")
    assert result.returncode != 0
    assert "MODALIGN_CUDA=ON must find nvcc, got none" in " ".join(result.stderr.split())


def test_cuda_auto_without_nvcc_builds_for_the_cpu(tmp_path):
    result = configure(tmp_path, "-DMODALIGN_CUDA=AUTO", "-DCMAKE_CUDA_COMPILER=CMAKE_CUDA_COMPILER-NOTFOUND")
    assert result.returncode == 0, result.stderr
    assert "building for the CPU alone" in result.stdout


def test_a_wrong_torch_folder_is_named(tmp_path):
    result = configure(tmp_path, f"-DMODALIGN_TORCH_DIR={tmp_path}")
    assert result.returncode != 0 and "must hold torch >= 2.11" in " ".join(result.stderr.split())


def test_touching_one_kernel_rebuilds_that_kernel_alone():
    if not (ROOT / "build").exists() or not shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
        pytest.skip("not run: this installation is not an editable build of the checkout")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    rebuild = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(rebuild, cwd=ROOT, env=env, check=True, capture_output=True)
    before = _load.LIBRARY.stat().st_mtime
    time.sleep(1.1)
    (ROOT / "csrc/cpu/instruction_set.cpp").touch()
    output = subprocess.run(rebuild, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout
    assert _load.LIBRARY.stat().st_mtime > before
    compiled = re.findall(r"Building (?:CXX|CUDA) object \S*?csrc/(\S+)\.o", output)
    assert compiled and set(compiled) == {"cpu/instruction_set.cpp"}, compiled
