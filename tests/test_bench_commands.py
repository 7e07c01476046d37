"""`modalign bench` as its users call it. Times themselves are never asserted here."""

import io
import json
import re
import resource
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from rich import console
from typer.testing import CliRunner

from modalign import _load, bench
from modalign.bench import comparison, files, kernel, machine, report, results, sizes, sweep, tables
from modalign.cli import app

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "benchmarks" / "results"

MINE = """
import torch
from modalign import bench

@bench.case(
    grid=[dict(N=64, D=8)],
    reference=lambda x: x * x,
    flops=lambda p, pass_, size: p["N"] * p["D"],
    rules={"N at least 2": lambda p: p["N"] >= 2, "D even": lambda p: p["D"] % 2 == 0},
    dense_flops=lambda p, pass_, size: 4 * p["N"] * p["D"],
    bytes=lambda p, pass_, size: 2 * size * p["N"] * p["D"],
    passes=["fwd"],
    targets=[bench.Target(1e9)],
)
def square(maker, N, D):
    return (maker.randn(N, D),)

@bench.provider(square, name="formula", kind="formula")
def formula(x):
    return x * x

@bench.provider(square, name="ours", kind="ours")
def ours(x):
    return x.square()

@bench.provider(square, name="missing peer", requires="no_such_module_anywhere", install="no-such-package")
def missing(x):
    import no_such_module_anywhere

@bench.provider("paired_gram_volume", name="mine")
def mine(vectors):
    return torch.det(vectors @ vectors.mT).clamp(min=0).sqrt()
"""


@pytest.fixture
def mine(tmp_path, registry, monkeypatch):
    """A user's own file of cases, and the folder that the user works in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def call(*arguments, code=0):
    finished = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    if finished.exception is not None and not isinstance(finished.exception, SystemExit):
        raise finished.exception
    assert finished.exit_code == code, finished.output + finished.stderr
    return finished.stdout + finished.stderr


def small(**changes):
    """Results with one row, and the row."""
    row = {
        "case": "op",
        "parameters": {"N": 64},
        "dtype": "float32",
        "pass": "fwd",
        "threads": 1,
        "provider": "ours",
        "kind": "ours",
        "status": "ok",
        "reason": "",
        "rounds": 7,
        "seconds": {"median": 1.0, "q20": 0.99, "q80": 1.01},
        "ratio_to_floor": {"median": 0.5, "q20": 0.49, "q80": 0.51},
        "noisy": False,
        **changes,
    }
    facts = {"device": "cpu", "gpu": None, "cpu": {"model": "Processor", "cores": 2, "instruction_set": "avx2"}, "torch": "2.13.0", "blas": "mkl"}
    top = {"schema": bench.SCHEMA, "created": "2026-01-02T03:04:05+00:00", "command": "modalign bench run op", "seed": 0, "note": ""}
    return {**top, "environment": facts, "rows": [row]}


# ----------------------------------------------------------------------------------------------------------------------------------------- list, run


def test_list_names_everything_and_what_is_missing(mine):
    shown = call("list", "--cases", mine)
    for word in ("gram_volume_near_zero", "ladder_gram_volume", "B=2048 C=2048 D=512 k=5", "fwd, bwd, fwd+bwd", "torch.compile", "tile_log_sum_exp"):
        assert word in shown
    assert "missing peer  (peer)  not installed: pip install no-such-package" in shown
    assert "CUDA" in shown


def test_own_cases_machine_floor_sparsity_and_missing_peer(mine):
    shown = call("run", "square", "--cases", mine, "--set", "N=1k", "--quick", "--rounds", 2, "--threads", 1, "--out", "x.json")
    gathered = bench.read_results("x.json")
    rows = {row["provider"]: row for row in gathered["rows"]}
    assert set(rows) == {"formula", "ours", "missing peer"}
    assert (rows["missing peer"]["status"], rows["missing peer"]["reason"]) == ("not installed", "pip install no-such-package")
    assert "seconds" not in rows["missing peer"] and "not installed" in shown
    ours = rows["ours"]
    assert ours["parameters"] == {"N": 1024, "D": 8}
    assert ours["target"] is None  # a target is for the sizes of the grid
    assert ours["dense_flop_per_second"] == pytest.approx(4 * ours["flop_per_second"])
    assert "dense-equivalent rate" in shown
    figures = gathered["machine"]
    rate, bandwidth = figures["matmul"][0]["flop_per_second"]["median"], figures["copy"][0]["byte_per_second"]["median"]
    assert ours["floor"] == {"source": "machine", "seconds": pytest.approx(max(1024 * 8 / rate, 2 * 4 * 1024 * 8 / bandwidth))}
    assert ours["ratio_to_floor"]["median"] == pytest.approx(ours["seconds"]["median"] / ours["floor"]["seconds"])


def test_sizes_that_a_case_does_not_have_are_refused_by_its_rules(mine):
    expected = "modalign bench run: sizes of the case square must have N at least 2 and D even, got N=1 D=7"
    assert expected in call("run", "square", "--cases", mine, "--set", "N=1,D=7", code=1)
    assert "sizes of the case gram_volume must have D at least k, got B=1 C=1 D=1 k=3" in call("run", "gram_volume", "--set", "B=1,C=1,D=1", code=1)
    assert "sizes of the case gram_contrastive_loss must have k at least 2" in call("run", "gram_contrastive_loss", "--set", "k=1", code=1)
    assert "sizes of the case gram_topk must have k from 1 to C" in call("run", "gram_topk", "--set", "k=300,C=200", code=1)


def test_a_provider_that_falls_back_to_plain_torch_has_no_speed(tmp_path):
    """Nine modalities are more than the kernels take."""
    out = tmp_path / "x.json"
    options = ["--set", "B=8,C=8,D=16,k=9", "--quick", "--pass", "fwd", "--threads", 1, "--rounds", 1, "--providers", "ours,eager", "--out", out]
    shown = call("run", "gram_volume", *options)
    rows = {row["provider"]: row for row in bench.read_results(out)["rows"]}
    assert rows["ours"]["status"] == "no kernel" and "seconds" not in rows["ours"] and rows["eager"]["status"] == "ok"
    assert "ours: no kernel: modalign::gram_volume takes no part at these sizes; plain torch does the work" in shown
    call("report", out, "--out", tmp_path / "x.html")
    assert "No kernel of ours ran, so without a speed" in (tmp_path / "x.html").read_text()


def test_a_gradient_of_zero_is_no_division(tmp_path):
    options = ["--set", "B=1", "--quick", "--threads", 1, "--rounds", 1, "--providers", "ours,eager", "--out", tmp_path / "x.json"]
    call("run", "clip_loss", *options)
    assert all(row["status"] == "ok" for row in bench.read_results(tmp_path / "x.json")["rows"])


def test_memory_below_what_a_process_shows_is_not_a_figure():
    assert tables.cell(small(peak_memory_bytes=24_576)["rows"][0], "memory") == "< 1 MB"
    assert tables.cell(small(peak_memory_bytes=76e6)["rows"][0], "memory") == "76 MB"


def test_a_target_that_was_just_missed_is_told_with_the_digits_that_show_it():
    for ratio, shown in ((0.9512, "0.951"), (0.95001, "0.95001"), (0.914, "0.91"), (0.95, "0.95")):
        row = small(ratio_to_floor={"median": ratio, "q20": 0.9, "q80": 1.0}, target={"ratio": 0.95, "met": ratio <= 0.95})["rows"][0]
        assert f"took {shown} (" in report.verdicts([row]) and tables.cell(row, "floor").startswith(f"{shown} (")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "must be a JSON file, got nothing of that name"),
        ("", "must be JSON, got Expecting value"),
        ("{}", "must be"),
        ("[1]", "must be"),
        (b"\xff\xfe", "must be JSON, got"),
    ],
)
@pytest.mark.parametrize("command", ["report", "compare"])
def test_files_that_hold_no_results(tmp_path, command, content, found):
    file = tmp_path / "x.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    shown = call(command, *[file] * (1 + (command == "compare")), code=1)
    assert f"modalign bench {command}: bench results: " in shown and found in shown and "Errno" not in shown
    assert "must be a JSON file, got a folder" in call(command, *[tmp_path] * (1 + (command == "compare")), code=1)


def test_target_at_the_size_of_the_grid(mine):
    call("run", "square", "--cases", mine, "--quick", "--rounds", 1, "--threads", 1, "--out", "x.json")
    rows = {row["provider"]: row for row in bench.read_results("x.json")["rows"]}
    assert rows["ours"]["target"] == {"ratio": 1e9, "met": True} and rows["formula"]["target"] is None


def test_own_provider_for_a_case_of_the_package(mine):
    call("run", "paired_gram_volume", "--cases", mine, "--providers", "mine", "--quick", "--rounds", 1, "--threads", 1, "--out", "x.json")
    rows = bench.read_results("x.json")["rows"]
    assert {(row["provider"], row["status"]) for row in rows} == {("mine", "ok"), ("floor", "ok")}
    assert {row["floor"]["source"] for row in rows} == {"declared"}


def test_function_from_the_command_line_is_checked_first(mine):
    Path("own_functions.py").write_text("def right(x):\n    return x * x\ndef wrong(x):\n    return x * x + 1e-2\n")
    both = ["--provider", "own_functions:right", "--provider", "own_functions:wrong", "--providers", "ours"]
    shown = call("run", "square", "--cases", mine, *both, "--quick", "--memory", "--rounds", 1, "--threads", 1, "--out", "x.json", code=1)
    rows = {row["provider"]: row for row in bench.read_results("x.json")["rows"]}
    assert rows["own_functions:right"]["status"] == "ok" and rows["own_functions:right"]["peak_memory_bytes"] is not None
    assert rows["own_functions:wrong"]["status"] == "mismatch" and "seconds" not in rows["own_functions:wrong"]
    assert "forward error" in shown and "formula" not in rows
    assert "module:function" in call("run", "square", "--provider", "own_functions", code=1)
    assert "got 'absent'" in call("run", "square", "--provider", "own_functions:absent", code=1)
    assert "No module named 'nowhere'" in call("run", "square", "--provider", "nowhere:f", code=1)


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("raise RuntimeError('boom')", "failed: RuntimeError: boom"),
        ("return (x * x).detach()", "failed: RuntimeError: the result must have a gradient, got one without"),
        ("return None", "mismatch: the result must be a tensor of shape [64, 8], got NoneType"),
        ("return (x * x)[None]", "mismatch: the result must be a tensor of shape [64, 8], got [1, 64, 8]"),
        ("raise SystemExit(0)", "failed: SystemExit: 0"),
    ],
)
def test_function_that_fails_ends_in_exit_code_1_and_its_cause(body, cause, mine):
    mine.write_text(MINE.replace('passes=["fwd"]', 'passes=["fwd", "bwd"]'))
    module = mine.parent.name  # another one in every test
    Path(f"{module}.py").write_text(f"def broken(x):\n    {body}\n")
    arguments = ["run", "square", "--cases", mine, "--provider", f"{module}:broken", "--providers", "ours", "--quick", "--rounds", 1, "--threads", 1]
    assert f"{module}:broken: {cause}" in call(*arguments, "--out", "x.json", code=1)
    rows = {row["provider"]: row for row in bench.read_results("x.json")["rows"]}
    assert rows["ours"]["status"] == "ok" and rows[f"{module}:broken"]["status"] == cause.partition(":")[0]
    if "detach" in body:
        call(*arguments, "--pass", "fwd")


def test_file_and_case_in_either_order(mine):
    (mine.parent / "named.py").write_text("from modalign import bench\n@bench.provider('gram_volume', name='by name')\ndef by_name(a, o): ...\n")
    for names in (["mine.py", "paired_gram_volume"], ["paired_gram_volume", "mine.py"], ["mine.py", "square", "paired_gram_volume", "mine.py"]):
        assert sorted(case.name for case in files.cases_of(names)) == ["paired_gram_volume", "square"]
    assert [case.name for case in files.cases_of(["square", "mine.py"])] == ["square"]
    assert [case.name for case in files.cases_of(["named.py", "gram_volume"])] == ["gram_volume"]
    assert "or a file that declares one, got named.py" in call("run", "named.py", code=1)


BROKEN = {
    "reference=lambda x: x * x": ("reference=lambda x: x.argmax(-1)", "reference of case square must give floating numbers, got [64] of torch.int64"),
    "return (maker.randn(N, D),)": ("return maker.randn(N, D)", "case square must give its inputs as a tuple, got Tensor"),
    "def square(maker, N, D)": ("def square(maker, N)", "case square must give inputs at N=64 D=8, got TypeError: "),
    "flops=lambda p, pass_, size:": ("flops=lambda p:", "case square: flops must be a function of (parameters, pass, bytes of a number)"),
    "bytes=lambda p, pass_, size: 2": ("bytes=lambda p, pass_, size: -2", "that gives a number, got -"),
    "targets=": ("target=", "keywords must be out of ['bytes', 'dense_flops', 'dtypes', "),
    "import torch": ("import torch\ndef (", "mine.py must load, got SyntaxError: "),
    "from modalign import bench": ("from modalign import bench\nnowhere", "NameError: name 'nowhere' is not defined (mine.py, line 4)"),
    "grid=[dict(N=64, D=8)]": ("grid=[]", "grid must hold at least one size, got none"),
    'kind="ours"': ('kinds="ours"', "provider: keywords must be out of "),
}


@pytest.mark.parametrize("right", BROKEN)
def test_mistakes_in_an_own_case_are_one_line(right, mine):
    wrong, message = BROKEN[right]
    assert right in MINE
    mine.write_text(MINE.replace(right, wrong, 1))
    shown = call("run", "square", "--cases", mine, "--quick", "--rounds", 1, "--threads", 1, code=1)
    assert message in shown and shown.strip().splitlines()[-1].startswith("modalign bench run: ")


def test_run_that_times_nothing_does_not_succeed(mine):
    arguments = ["run", "square", "--cases", mine, "--quick", "--rounds", 1, "--threads", 1]
    assert "at least one provider must run here, got none" in call(*arguments, "--providers", "missing peer", code=1)
    mine.write_text(MINE.replace("bench.provider(square", "bench.provider('paired_gram_volume'"))
    bench.registry._cases.clear(), bench.registry._providers.clear(), bench.registry._sources.clear()
    assert "at least one provider must run here, got none" in call(*arguments, code=1)


def test_places_that_cannot_be_written_are_refused_before_anything_is_measured(mine, monkeypatch):
    def measured(*arguments, **options):
        raise AssertionError("measured")

    for name in ("run.measure_machine", "sweep.measure_machine", "machine.measure_machine", "kernel.measure_kernel"):
        monkeypatch.setattr(f"modalign.bench.{name}", measured)
    Path("folder.json").mkdir()
    Path("file").write_text("")
    before = sorted(path.name for path in Path().iterdir())
    for command in (["run", "square", "--cases", mine], ["sweep", "square", "N=1:2", "--cases", mine], ["machine"], ["kernel", "tile_product"]):
        assert "--out must end in .json, got x.html" in call(*command, "--out", "x.html", code=1)
        assert "--out must be a file, got folder.json" in call(*command, "--out", "folder.json", code=1)
        assert "--out must be a place to write to, got file/deep/x.json: Not a directory" in call(*command, "--out", "file/deep/x.json", code=1)
    assert "--profile must be a folder, got file" in call("run", "square", "--cases", mine, "--profile", "file", code=1)
    with pytest.raises(AssertionError, match="measured"):
        call("run", "square", "--cases", mine, "--out", "new/deep/x.json", "--profile", "traces")
    assert sorted(path.name for path in Path().iterdir()) == before


def test_saved_machine_is_used_where_it_is_this_one(mine):
    call("machine", "--quick", "--threads", 1, "--dtype", "float32", "--out", "machine.json")
    arguments = ["run", "square", "--cases", mine, "--quick", "--rounds", 1, "--machine", "machine.json"]
    call(*arguments, "--threads", 1, "--out", "x.json")
    saved = bench.read_results("machine.json")
    assert bench.read_results("x.json")["machine"] == saved["machine"]
    assert "--machine must cover float64 with 1 threads" in call(*arguments, "--threads", 1, "--dtype", "float64", code=1)
    saved["environment"]["cpu"]["model"] = "Another"
    bench.write_results("machine.json", saved)
    assert "--machine must be of this machine, got machine.json with cpu {'model': 'Another'}" in call(*arguments, "--threads", 1, code=1)
    bench.write_results("machine.json", small())
    assert "--machine must be a file with figures of the machine" in call(*arguments, "--threads", 1, code=1)


def test_case_that_another_file_declares_is_refused(mine):
    (mine.parent / "again.py").write_text(MINE.replace('"paired_gram_volume"', "square"))
    assert "name must be new, got 'square'" in call("list", "--cases", mine, "--cases", mine.parent / "again.py", code=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "case must be one of ["),
        (["triangle_area", "--set", "N=5"], "--set must be out of ['B', 'C', 'D', 'k'] for the case triangle_area, got 'N'"),
        (["triangle_area", "--set", "B"], "--set must be written as name=value, got 'B'"),
        (["triangle_area", "--where", "N=5"], "--where must be out of ['B', 'C', 'D', 'k'], got ['N']"),
        (["triangle_area", "--where", "k=9"], "must leave something to run"),
        (["triangle_area", "clip_loss", "--where", "k=3"], "no pass that they agree with of clip_loss"),
        (["triangle_area", "--pass", "forward"], "--pass must be out of ('fwd', 'bwd', 'fwd+bwd'), got ['forward']"),
        (["triangle_area", "--providers", "nobody"], "--providers must be out of"),
        (["triangle_area", "--dtype", "int8"], "--dtype must be out of ['bfloat16', 'float16', 'float32', 'float64'], got 'int8'"),
        (["triangle_area", "--threads", "many"], "--threads must be 'all' or numbers up to the "),
        (["triangle_area", "--threads", "²"], "got '²'"),
        (["triangle_area", "--threads", "99999999999"], "cores that this process may use, got '99999999999'"),
        (["triangle_area", "--dtype", "float8_e4m3fn"], "--dtype must be out of ['bfloat16', "),
        (["triangle_area", "--dtype", ","], "--dtype must name at least one, got ','"),
        (["triangle_area", "--provider", ".:f"], "load_provider: . must load, got TypeError: "),
        (["triangle_area", "--set", "B=-1"], "--set B must be a whole number such as 4096 or 4k, got '-1'"),
        (["triangle_area", "--set", "B=1e3"], "--set B must be a whole number such as 4096 or 4k, got '1e3'"),
        (["triangle_area", "--set", "B=64K"], "--set B must be a whole number such as 4096 or 4k, got '64K'"),
        (["triangle_area", "--set", "B=abc"], "--set B must be a whole number such as 4096 or 4k, got 'abc'"),
        (["triangle_area", "--set", "k=2.5"], "--set k must be a whole number such as 4096 or 4k, got '2.5'"),
        (["triangle_area", "--set", "B=0"], "case triangle_area must give inputs with numbers, got input 0 empty at B=0 "),
        (["triangle_area", "--set", "D=0"], "case triangle_area must give inputs with numbers, got input 0 empty at "),
        (["gram_volume", "--set", "k=1"], "sizes of the case gram_volume must have k at least 2, got B=192 C=160 D=64 k=1"),
        (["triangle_area", "--set", "B=1G,D=1M"], "the sizes must leave room for a reference in float64, got B=1073741824 "),
        (["triangle_area", "--set", "B=99999999999999999999"], "case triangle_area must give inputs at B=99999999999999999999 "),
        (["triangle_area", "--device", "tpu"], "--device must be cpu, or cuda where torch sees a GPU, got 'tpu'"),
        (["absent.py"], "path must be a Python file"),
        (["triangle_area", "--cases", "absent"], "path must be a Python file"),
    ],
)
def test_run_refuses_plainly(arguments, message, registry):
    shown = call("run", *arguments, "--quick", *([] if "--threads" in arguments else ["--threads", 1]), code=1).partition("modalign bench run: ")
    shown = "".join(shown[1:])
    assert message in shown and shown.startswith("modalign bench run: ") and "Traceback" not in shown


def test_interrupted_run_leaves_no_file(mine, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("modalign.bench.command.run_cases", interrupted)
    shown = call("run", "square", "--cases", mine, "--out", "x.json", code=130)
    assert "no file is half-written" in shown and not Path("x.json").exists()


def test_profile_writes_a_trace_for_every_provider(mine):
    call("run", "square", "--cases", mine, "--quick", "--rounds", 1, "--threads", 1, "--profile", "traces", "--out", "x.json")
    rows = [row for row in bench.read_results("x.json")["rows"] if row["status"] == "ok"]
    assert len({row["trace"] for row in rows}) == 2
    for row in rows:
        trace = json.loads((Path("traces") / row["trace"]).read_text())
        assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])


def test_installed_cases_are_those_of_the_checkout(tmp_path):
    """What somebody has who installed the package and has no checkout."""
    checkout = [path for path in files.case_files() if path.parent.name == "cases"]
    installed = files.case_files(tmp_path)
    assert checkout and [path.name for path in installed] == [path.name for path in checkout]
    assert all("modalign/bench/cases" in path.as_posix() for path in installed)
    assert [path.read_text() for path in installed] == [path.read_text() for path in checkout], "build again: make install"


# ------------------------------------------------------------------------------------------------------------------------------------------- machine


def test_machine_measures_every_dtype_and_thread_count(tmp_path):
    out = tmp_path / "machine.json"
    before = torch.get_num_threads()
    shown = call("machine", "--quick", "--threads", "1,2", "--dtype", "float32,bfloat16", "--out", out)
    assert torch.get_num_threads() == before
    figures = bench.read_results(out)["machine"]
    assert [(entry["threads"], entry["dtype"]) for entry in figures["matmul"]] == [(t, d) for t in (1, 2) for d in ("float32", "bfloat16")]
    assert [entry["threads"] for entry in figures["copy"]] == [1, 2]
    assert all(entry["bytes"] >= 8 * bench.environment.last_cache_bytes() for entry in figures["copy"])  # 4 caches read, 4 written
    assert set(figures["dispatch"]["seconds"]) == {"torch_op", "registered_op", "public_function", "public_function_with_graph"}
    assert "GFLOP/s" in shown and "GB/s" in shown and "paired_gram_volume" in shown


def test_floor_is_the_longer_of_computing_and_moving():
    def rate(value, spread=0.0):
        return {"median": value, "q20": value * (1 - spread), "q80": value * (1 + spread)}

    figures = {
        "device": "cpu",
        "matmul": [
            {"dtype": "float32", "threads": 1, "flop_per_second": rate(100.0)},
            {"dtype": "float16", "threads": 1, "flop_per_second": rate(2.0)},
        ],
        "copy": [{"threads": 1, "byte_per_second": rate(10.0, spread=0.2)}],
    }
    assert machine.floor_seconds(figures, "float32", 1, 1000.0, 50.0) == (10.0, False)
    assert machine.floor_seconds(figures, "float32", 1, 1000.0, 500.0) == (50.0, True)  # the copy was noisy
    assert machine.floor_seconds(figures, "float32", 1, 1000.0, None) == (10.0, False)
    assert machine.floor_seconds(figures, "float16", 1, 1000.0, None) == (10.0, False)  # float32 is faster, and open to it
    assert machine.floor_seconds(figures, "float64", 1, 1000.0, 50.0) is None
    assert machine.floor_seconds(figures, "float32", 2, 1000.0, 50.0) is None
    assert machine.floor_seconds(figures, "float32", 1, None, None) is None and machine.floor_seconds(None, "float32", 1, 1.0, 1.0) is None


# -------------------------------------------------------------------------------------------------------------------------------------------- kernel


@pytest.mark.parametrize("name", [name for name, where in kernel.names().items() if where == "CPU"])
def test_kernel_alone_gives_the_op_s_bits_at_tiny_sizes(name):
    dtypes = kernel.CPU_KERNELS[name.removesuffix("_bwd")].dtypes
    entries = kernel.measure_kernel(name, sizes=(1, 8, 33), width=5, dtypes=dtypes, rounds=1)
    assert [(entry["parameters"]["N"], entry["status"]) for entry in entries] == [(n, "ok") for _ in dtypes for n in (1, 8, 33)], entries
    assert all((entry["overhead_seconds"] is None) == name.startswith("tile_") for entry in entries)


def test_kernel_beside_something_else_has_no_speed(monkeypatch):
    honest = kernel.CPU_KERNELS["triangle_area"]
    wrong = kernel.CpuKernel(honest.name, honest.make, lambda *x: honest.beside(*x) * 1.001, True, honest.dtypes)
    monkeypatch.setitem(kernel.CPU_KERNELS, "triangle_area", wrong)
    (entry,) = kernel.measure_kernel("triangle_area", sizes=(3,), rounds=1)
    assert entry["status"] == "mismatch" and "every bit" in entry["reason"] and "kernel_seconds" not in entry


def test_kernel_command(tmp_path, monkeypatch):
    out = tmp_path / "kernels.json"
    cuda = _load.kernel_catalogue()[:1]
    shown = call("kernel", "gram_volume", "tile_product", *cuda, "tile_product", "--sizes", "1,8,1", "--rounds", 1, "--out", out)
    entries = bench.read_results(out)["kernels"]
    assert [entry["kernel"] for entry in entries] == ["gram_volume", "gram_volume", "tile_product", "tile_product", *cuda]
    assert all(entry["status"] == "needs a GPU" for entry in entries[4:]) and ("needs a GPU" in shown) == bool(cuda)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        for entry in [one for key in cuda for one in kernel.measure_kernel(key)]:
            assert entry["status"] == "by profiler" and "modalign bench run CASE --device cuda --profile FOLDER" in entry["reason"]
    assert "name must be one of ['clip_loss', 'clip_loss_bwd', " in call("kernel", "nothing", code=1)
    assert "sizes and width must be at least 1, got [0] and 64" in call("kernel", "tile_product", "--sizes", "0", code=1)
    assert "--sizes must name at least one, got ','" in call("kernel", "tile_product", "--sizes", ",", code=1)
    assert "the sizes must fit into memory, got " in call("kernel", "tile_product", "--sizes", "1G", code=1)
    assert "--dtype must be out of ['float32', 'float64'] for tile_product" in call("kernel", "tile_product", "--dtype", "bfloat16", code=1)


@pytest.mark.parametrize(
    ("kernel_name", "shapes", "message"),
    [
        ("gram_volume", [(3, 4)], "inputs must be an anchor and 1 to 7 others"),
        ("gram_volume", [(3, 4), (5, 4), (6, 4)], r"input 2 must have shape \[5, 4\], got \(6, 4\)"),
        ("gram_volume_bwd", [(3, 4), (5, 4), (5, 3)], r"input 2 must have shape \[3, 5\]"),
        ("triangle_area", [(3, 4), (5, 4)], "inputs must be anchor, u and v"),
        ("paired_gram_volume", [(3, 9, 4)], "1 to 8 vectors per row, got 9"),
        ("paired_gram_volume", [(3, 4)], "at least 3 dimensions"),
        ("tile_square_sum", [(3, 4), (5, 4)], "group must divide the rows of b, got 2"),
        ("tile_weighted_values", [(3, 4), (5, 4), (6, 2)], r"input 2 must have shape \[5, 2\]"),
    ],
)
def test_kernel_on_numpy_refuses(kernel_name, shapes, message):
    import numpy as np

    from modalign import _host

    with pytest.raises(ValueError, match=message):
        _host.time_cpu_kernel(kernel_name, [np.zeros(shape, np.float32) for shape in shapes])


# ------------------------------------------------------------------------------------------------------------------------------------------- compare


def scaled(factor, **changes):
    seconds = {key: value * factor for key, value in small()["rows"][0]["seconds"].items()}
    ratio = {key: value * factor for key, value in small()["rows"][0]["ratio_to_floor"].items()}
    return small(**{"seconds": seconds, "ratio_to_floor": ratio, **changes})


@pytest.mark.parametrize(
    ("after", "verdict", "why"),
    [
        (scaled(1.04), "same", ""),
        (scaled(1.2), "slower", ""),
        (scaled(0.8), "faster", ""),
        (scaled(1.2, noisy=True), "undecided", "noisy: second"),
        (scaled(1.2, seconds={"median": 1.2, "q20": 1.0, "q80": 1.4}), "undecided", "noisy: second"),
        (scaled(1.052, seconds={"median": 1.052, "q20": 1.005, "q80": 1.056}), "undecided", "the 20 % to 80 % intervals overlap"),
        (scaled(1.2, seconds={"median": 1.2, "q20": 1.15, "q80": 1.23}), "undecided", "a 20 % to 80 % interval wider than the threshold: second"),
        (scaled(1.0, seconds={"median": 1.0, "q20": 0.95, "q80": 1.03}), "undecided", "a 20 % to 80 % interval wider than the threshold: second"),
        (scaled(1.2, rounds=2), "undecided", "fewer than 3 rounds"),
    ],
)
def test_compare_decides_only_what_can_be_decided(after, verdict, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (one,) = bench.compare(small(), after, 0.05).differences
    assert (one.verdict, one.why) == (verdict, why)
    bench.write_results("a.json", small())
    bench.write_results("b.json", after)
    shown = call("compare", "a.json", "b.json", "--fail-above", "5%", code=1 if verdict == "slower" else 0)
    assert f"1 {verdict}" in shown
    call("compare", "a.json", "b.json", "--fail-above", "30%")
    call("compare", "b.json", "a.json", "--fail-above", "0.05", code=1 if verdict == "faster" else 0)


def at(seconds, floor, source="declared", **changes):
    """Results of one row whose time and floor are these."""

    def spread(value):
        return {"median": value, "q20": 0.99 * value, "q80": 1.01 * value}

    return small(seconds=spread(seconds), ratio_to_floor=spread(seconds / floor), floor={"source": source, "seconds": floor}, **changes)


@pytest.mark.parametrize("source", ["declared", "machine"])
@pytest.mark.parametrize(
    ("after", "verdict", "why"),
    [
        ((1.3, 2.6), "same", "the floor itself changed by +30.0%"),  # everything was slower: not the row's doing
        ((1.0, 2.6), "faster", "the floor itself changed by +30.0%"),
        ((1.0, 1.6), "slower", "the floor itself changed by -20.0%"),
        ((1.3, 2.02), "slower", ""),
    ],
)
def test_compare_judges_by_the_ratio_where_the_floor_moved(after, verdict, why, source):
    (one,) = bench.compare(at(1.0, 2.0, source), at(*after, source)).differences
    assert (one.verdict, one.why) == (verdict, why)
    assert one.measure == ("ratio_to_floor" if why else "seconds")


def test_compare_without_a_floor_asks_the_machine_s_rates():
    def rates(flop):
        def rate(value):
            return {"median": value, "q20": value, "q80": value}

        return {
            "device": "cpu",
            "matmul": [{"threads": 1, "dtype": "float32", "size": 8, "flop_per_second": rate(flop)}],
            "copy": [{"threads": 1, "bytes": 8, "byte_per_second": rate(1e9)}],
            "dispatch": {"op": "", "seconds": {}},
        }

    def bare(seconds, flop):
        found = at(seconds, 1.0)
        del found["rows"][0]["floor"], found["rows"][0]["ratio_to_floor"]
        return {**found, "machine": rates(flop) if flop else None}

    verdicts = {}
    for name, flop in (("steady", 1e9), ("slower", 0.7e9), ("unknown", None)):
        (one,) = bench.compare(bare(1.0, 1e9), bare(1.3, flop)).differences
        verdicts[name] = (one.verdict, one.why)
    assert verdicts == {
        "steady": ("slower", ""),
        "slower": ("undecided", "no floor to compare by; the machine itself changed by +42.9%"),
        "unknown": ("undecided", "nothing says whether the machine was as fast as before"),
    }
    (one,) = bench.compare(at(1.0, 2.0, "declared"), at(1.3, 2.0, "machine")).differences
    assert one.verdict == "undecided"  # two kinds of floors are no yardstick
    elsewhere = bare(1.3, 1e9)
    elsewhere["environment"]["torch"] = "2.14.0"
    (one,) = bench.compare(bare(1.0, 1e9), elsewhere).differences
    assert (one.verdict, one.why) == ("undecided", "no floor to compare by")


def test_verdict_is_undecided_unless_something_decides():
    assert comparison.Difference({}, "seconds", 1, 1, 0, 0, 0).verdict == "undecided"
    (one,) = bench.compare(small(rounds=1), small(rounds=1)).differences
    assert one.verdict == "undecided"


def test_compare_fails_where_nothing_is_in_both_or_a_row_broke(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench.write_results("a.json", small())
    bench.write_results("b.json", small(parameters={"N": 65}))
    assert "no row is in both" in call("compare", "a.json", "b.json", code=1)
    for status, code in (("mismatch", 1), ("failed", 1), ("not installed", 1)):
        broken = small(status=status, reason="cause")
        del broken["rows"][0]["seconds"]
        broken["rows"].append({**small()["rows"][0], "provider": "other"})
        both = small()
        both["rows"].append({**small()["rows"][0], "provider": "other"})
        bench.write_results("a.json", both)
        bench.write_results("b.json", broken)
        shown = call("compare", "a.json", "b.json", code=0 if status == "not installed" else 1)
        assert (f"no longer right: op, N=64, float32, fwd, 1 threads: ours: {status}: cause" in shown) == (status != "not installed")
    bench.write_results("k.json", {**small(), "kernels": []})
    assert "kernels are not compared" in call("compare", "k.json", "k.json")
    assert "kernels are not compared" not in call("compare", "a.json", "a.json")


def test_compare_across_machines_uses_the_ratio_to_the_floor(tmp_path):
    other = scaled(3.0, ratio_to_floor={"median": 0.501, "q20": 0.49, "q80": 0.51})  # a slower machine, as near to its floor
    other["environment"] = {**other["environment"], "torch": "2.14.0"}
    compared = bench.compare(small(), other)
    assert [one.measure for one in compared.differences] == ["ratio_to_floor"]
    assert compared.unlike == {"torch": ("2.13.0", "2.14.0")} and not compared.slower
    bench.write_results(tmp_path / "a.json", small())
    bench.write_results(tmp_path / "b.json", other)
    shown = call("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert "torch differs: 2.13.0 and 2.14.0" in shown and "ratios to the floor are compared, not times" in shown


def test_compare_lists_what_is_on_one_side_only():
    first, second = small(), small()
    first["rows"].append({**first["rows"][0], "provider": "gone"})
    first["rows"].append({**first["rows"][0], "provider": "broken"})
    first["rows"].append({**first["rows"][0], "provider": "floor", "kind": "floor"})
    broken = {**first["rows"][0], "provider": "broken", "status": "mismatch", "reason": "forward error 1"}
    second["rows"].append({key: value for key, value in broken.items() if key != "seconds"})
    second["rows"].append({**second["rows"][0], "parameters": {"N": 65}})
    compared = bench.compare(first, second)
    assert [one.row["provider"] for one in compared.differences] == ["ours"]
    assert compared.only_first == ["op, N=64, float32, fwd, 1 threads: gone"]
    assert compared.broken == ["op, N=64, float32, fwd, 1 threads: broken: mismatch: forward error 1"]
    assert compared.only_second == ["op, N=65, float32, fwd, 1 threads: ours"]


@pytest.mark.parametrize("text", ["5", "1", "five", "-1%", "5%%", "nan", "inf"])
def test_threshold_is_a_share(text):
    with pytest.raises(ValueError, match="--fail-above must be a share such as 5% or 0.05"):
        comparison.percent(text)


def test_compare_committed_results_with_themselves():
    committed = COMMITTED / "gram_volume.json"
    assert "0 slower, 0 faster" in call("compare", committed, committed)


# -------------------------------------------------------------------------------------------------------------------------------------------- report


def test_report_is_one_page_with_everything(mine):
    Path("own_functions.py").write_text("def wrong(x):\n    return x * x + 1e-2\n")
    wrong = ["--provider", "own_functions:wrong"]
    call("run", "square", "--cases", mine, *wrong, "--quick", "--rounds", 1, "--threads", 1, "--note", "<b>loud</b>", "--out", "x.json", code=1)
    call("kernel", "tile_product", "--sizes", "1", "--rounds", 1, "--out", "k.json")
    old = small(flops=1e9, bytes=1e6, flop_per_second=1e9, noisy=True, target={"ratio": 0.95, "met": True})
    bench.write_results("old.json", {**old, "schema": "modalign.bench/1"})
    call("report", "x.json", "k.json", "old.json", COMMITTED / "gram_volume.json", "--out", "page.html")
    page = Path("page.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "<script" not in page
    assert set(re.findall(r'(?:src|href)="([a-z/:]+)', page)) == {"data:image/png"} and "url(" not in page and "http" not in page
    for words in (
        "Targets: 1 of 1 met.",
        "missing peer: not installed: pip install no-such-package",
        "own_functions:wrong: mismatch: forward error",
        "Roofline: float32, 1 threads",
        "there is no roof (modalign.bench/1)",
        "op, N=64, float32, fwd, 1 threads: ours",
        "The machine",
        "dense-equivalent rate",
        "&lt;b&gt;loud&lt;/b&gt;",
        "Kernels without torch around them",
        "(noisy): the times of the row or of its floor spread by more than 10 %",
        "1 s (990 ms … 1.01 s) (noisy)",
    ):
        assert words in page, words
    assert str(ROOT) not in page
    assert "must be JSON" in call("report", mine, code=1) and "absent.json must be a JSON file, got nothing of that name" in call("report", "absent.json", code=1)


def test_report_keeps_files_of_one_name(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for folder, provider in (("a", "in a"), ("b", "in b")):
        bench.write_results(tmp_path / folder / "x.json", small(provider=provider))
    call("report", tmp_path / "a" / "x.json", tmp_path / "b" / "x.json", tmp_path / "b" / "x.json", "--out", "page.html")
    page = Path("page.html").read_text()
    assert page.count("<h2>x.json</h2>") == 2 and "in a" in page and "in b" in page
    assert "--out must end in .html, got x.json" in call("report", tmp_path / "a" / "x.json", "--out", "x.json", code=1)


def test_noisy_rows_are_marked_in_every_table():
    rate = {"median": 1e9, "q20": 0.8e9, "q80": 1.1e9}
    figures = {
        "device": "cpu",
        "matmul": [{"threads": 1, "dtype": "float32", "size": 8, "flop_per_second": rate}],
        "copy": [{"threads": 1, "bytes": 8, "byte_per_second": {"median": 1e9, "q20": 1e9, "q80": 1e9}}],
        "dispatch": {"op": "an op", "seconds": {"torch_op": rate}},
    }
    assert [line[2].endswith(" (noisy)") for line in tables.machine_rows(figures)] == [True, False, True]
    times = {"median": 1.0, "q20": 0.9, "q80": 1.2}
    entry = {"kernel": "k", "beside": "b", "parameters": {"N": 1}, "dtype": "float32", "status": "ok", "reason": "", "overhead_seconds": None}
    entry.update(kernel_seconds=times, beside_seconds=times, noisy=True)
    assert "1 s (noisy)" in kernel.cells(entry) and "1 s (noisy)" not in kernel.cells({**entry, "noisy": False})
    columns = tables.screen_columns(small()["rows"])
    rows = small()["rows"][0], small(noisy=True)["rows"][0]
    assert [any("(noisy)" in cell for cell in tables.line(row, columns)) for row in rows] == [False, True]


def test_names_are_shown_as_they_are():
    gathered = small(provider="_mine $x^$ [red]", flops=1e9, bytes=1e6, flop_per_second=1e9)
    legend = report.roofline(gathered, "float32", 1).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [" _mine \\$x^\\$ [red], fwd"]
    for shown in (tables.screen(gathered), comparison.screen(bench.compare(gathered, gathered))):
        page = console.Console(width=250, record=True, file=io.StringIO())
        page.print(shown)
        assert "_mine $x^$ [red]" in page.export_text()


def test_roof_is_the_machine_s(mine):
    call("run", "square", "--cases", mine, "--quick", "--rounds", 1, "--threads", 1, "--out", "x.json")
    gathered = bench.read_results("x.json")
    (axes,) = report.roofline(gathered, "float32", 1).axes
    corner = max(axes.lines, key=lambda line: len(line.get_xdata()))
    rate, bandwidth = gathered["machine"]["matmul"][0]["flop_per_second"]["median"], gathered["machine"]["copy"][0]["byte_per_second"]["median"]
    assert corner.get_xdata()[1] == pytest.approx(rate / bandwidth) and list(corner.get_ydata()[1:]) == [rate, rate]
    assert corner.get_ydata()[0] == pytest.approx(corner.get_xdata()[0] * bandwidth)
    assert report.roofline(gathered, "float32", 2) is None


# --------------------------------------------------------------------------------------------------------------------------------------------- sweep


SWEPT = """
import time
import torch
from modalign import bench

@bench.case(grid=[dict(N=64, D=1024)], reference=lambda x: x * x, passes=["fwd"], bytes=lambda p, pass_, size: 2 * size * p["N"] * p["D"])
def growing(maker, N, D):
    return (maker.randn(N, D),)

@bench.provider(growing, name="plain")
def plain(x):
    return x * x

@bench.provider(growing, name="square in memory")
def square_in_memory(x):
    if x.shape[0] > 600:
        torch.empty(1 << 50)
    return x * x

@bench.provider(growing, name="slow")
def slow(x):
    if x.shape[0] > 600:
        time.sleep(2.5)
    return x * x
"""


def test_sweep_survives_everything_and_goes_on_where_it_was(tmp_path, registry, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("swept.py").write_text(SWEPT)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    arguments = ["sweep", "growing", "N=512:2k", "--points", 3, "--cases", "swept.py", "--limit", 2, "--rounds", 1, "--threads", 1, "--quick"]
    measure, asked = sweep._measure, []

    def measured(case, parameters, *rest):
        asked.append(parameters["N"])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return measure(case, parameters, *rest)

    monkeypatch.setattr(sweep, "_measure", measured)
    assert "interrupted, no file is half-written" in call(*arguments, code=130)
    begun = bench.read_results("sweep_growing.json")
    assert begun["sweep"]["done"] == [512] and {row["status"] for row in begun["rows"]} == {"ok"}
    assert "must be a new file" in call(*arguments, code=1)
    assert "must continue the same sweep" in call(*arguments[:2], "N=512:4k", *arguments[3:], "--resume", code=1)
    assert "--set must leave alone what the sweep changes, got ['N']" in call(*arguments, "--set", "N=5", code=1)

    for change, name in (
        (["--set", "D=512"], "got set {} in sweep_growing.json and {'D': 512} now"),
        (["--dtype", "float64"], "got dtypes ['float32'] in sweep_growing.json and ['float64'] now"),
        (["--pass", "fwd,bwd"], "got passes ['fwd'] in"),
        (["--rounds", 2], "got rounds 1 in sweep_growing.json and 2 now"),
        (["--seed", 3], "got seed 0 in"),
        (["--providers", "plain"], "got providers ['plain', 'square in memory', 'slow'] in sweep_growing.json and ['plain'] now"),
        (["--limit", 3], "got limit_seconds 2.0 in"),
    ):
        assert name in call(*arguments, *change, "--resume", code=1), name
    elsewhere = deepcopy(begun)
    elsewhere["environment"]["cpu"]["model"] = "Another"
    bench.write_results("sweep_growing.json", elsewhere)
    assert "got cpu {'model': 'Another'}" in call(*arguments, "--resume", code=1)
    bench.write_results("sweep_growing.json", begun)

    shown = call(*arguments, "--resume")
    assert asked == [512, 1024, 1024, 2048]
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits
    gathered = bench.read_results("sweep_growing.json")
    status = {(row["provider"], row["parameters"]["N"]): row["status"] for row in gathered["rows"]}
    assert gathered["sweep"]["done"] == [512, 1024, 2048] and gathered["rows"][: len(begun["rows"])] == begun["rows"]
    for size in (512, 1024, 2048):
        assert status["plain", size] == "ok"
        assert status["square in memory", size] == ("ok" if size == 512 else "out of memory")
        assert status["slow", size] == ("ok" if size == 512 else "too slow")
    reasons = {(row["provider"], row["parameters"]["N"]): row["reason"] for row in gathered["rows"]}
    assert "can't allocate memory" in reasons["square in memory", 1024] and reasons["square in memory", 2048].endswith(", at 1k")
    assert reasons["slow", 1024].startswith("one call took 2.5")
    exponents = {one["provider"]: one["exponent"] for one in gathered["sweep"]["memory_exponents"]}
    assert exponents["plain"] == pytest.approx(1, abs=0.1) and "memory of plain, fwd, float32: ∝ size^" in shown
    assert Path("sweep_growing.png").read_bytes().startswith(b"\x89PNG") and "growing over N" in Path("sweep_growing.html").read_text()


def swept(times):
    """Results of a sweep with these medians: {provider: {size: seconds}}."""
    made = small()
    model = made["rows"].pop()
    for provider, of in times.items():
        for size, seconds in of.items():
            row = {**deepcopy(model), "provider": provider, "parameters": {"N": size}, "peak_memory_bytes": 4 * size * size << 10}
            row["seconds"] = {"median": seconds, "q20": seconds, "q80": seconds}
            made["rows"].append(row)
    made["sweep"] = {"case": "op", "parameters": ["N"], "sizes": [16, 64, 256], "done": [16, 64, 256], "limit_seconds": 1.0, "checks_ended": False}
    made["sweep"].update(crossovers=sweep.crossovers(made), memory_exponents=sweep.memory_exponents(made))
    results.validate(made)
    return made


def test_crossovers_lie_on_the_lines_between_the_sizes():
    # 1 µs at 16 and growing with the square meets a constant 25 µs where (N / 16)^2 = 25
    made = swept({"square": {n: 1e-6 * (n / 16) ** 2 for n in (16, 64, 256)}, "flat": {n: 25e-6 for n in (16, 64, 256)}})
    (one,) = made["sweep"]["crossovers"]
    assert (one["faster_below"], one["faster_above"]) == ("square", "flat") and one["size"] == pytest.approx(80)
    assert [entry["exponent"] for entry in made["sweep"]["memory_exponents"]] == pytest.approx([2, 2])
    assert not swept({"a": {16: 1.0, 64: 1.0}, "b": {64: 2.0, 256: 0.5}})["sweep"]["crossovers"]  # one size in common: nothing to cross
    titles = list(sweep.figures(made))
    assert titles == ["time, fwd, float32, 1 threads", "memory, fwd, float32"]


@pytest.mark.parametrize("text", ["N", "N=1k", "=1k:2k", "N=2k:1k", "N=0:5", "N=1K:2K", "N,=1:2"])
def test_sweep_range_refuses(text):
    with pytest.raises(ValueError, match="bench: a (sweep|size) must"):
        sizes.sweep_range(text)


# -------------------------------------------------------------------------------------------------------------------------------------------- schema


UNDERSTOOD = {"type", "enum", "const", "exclusiveMinimum", "anyOf", "not", "if", "then", "else"}
UNDERSTOOD |= {"items", "required", "properties", "additionalProperties", "$ref"}
WORDS = {"$schema", "$defs", "title", "description"}


def rules(rule):
    """Every rule inside a rule."""
    yield rule
    inner = [rule[key] for key in ("not", "if", "then", "else", "items", "additionalProperties") if key in rule]
    for one in [*inner, *rule.get("anyOf", ()), *rule.get("properties", {}).values(), *rule.get("$defs", {}).values()]:
        yield from rules(one)


def test_our_check_understands_every_word_of_the_published_schema():
    for rule in rules(results.schema()):
        assert set(rule) <= UNDERSTOOD | WORDS, rule
        assert "$ref" not in rule or rule["$ref"].removeprefix("#/$defs/") in results.schema()["$defs"]


@pytest.mark.parametrize("name", ["gram_volume.json", "ladder_gram_volume.json"])
def test_files_of_the_first_version_are_read(name):
    read = bench.read_results(COMMITTED / name)
    assert read["schema"] in ("modalign.bench/1", bench.SCHEMA) and read["rows"]


def test_fields_of_a_row_are_all_in_the_schema(mine):
    """What is written and not described would be checked by nobody."""
    call("run", "square", "--cases", mine, "--quick", "--memory", "--rounds", 1, "--threads", 1, "--profile", "traces", "--out", "x.json")
    gathered = bench.read_results("x.json")
    assert set(gathered) <= set(results.schema()["properties"])
    assert {key for row in gathered["rows"] for key in row} <= set(results.schema()["$defs"]["row"]["properties"])


def test_columns_of_old_and_new_rows():
    old = small()["rows"][0]
    assert tables.cell(old, "floor_source") == "declared" and tables.cell(old, "dense") == tables.DASH
    assert tables.cell({**old, "floor": {"source": "machine", "seconds": 1.0}}, "floor_source") == "machine"
    assert tables.cell({**old, "checked": {"N": 32}}, "error") == "checked at N=32"


# ------------------------------------------------------------------------------------------------------------------------------------------- example


@pytest.mark.parametrize("source", [[], ["x.json"]], ids=["committed", "own"])
def test_example_reads_a_benchmark(source, tmp_path):
    row = {"provider": "absent", "status": "not installed", "reason": "pip install absent"}
    made = small(noisy=True)
    made["rows"].append({key: value for key, value in {**made["rows"][0], **row}.items() if key != "seconds"})
    bench.write_results(tmp_path / "x.json", made)
    finished = subprocess.run(
        [sys.executable, ROOT / "examples" / "read_a_benchmark.py", *source], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert "× the declared floor" in finished.stdout and "groups" in finished.stdout and "noisy: " in finished.stdout
    assert ("pip install absent" in finished.stdout) == bool(source)
