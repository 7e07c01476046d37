"""Benchmarks, the kernel ladder, device.sh and the custom epilogue. Times themselves are never asserted here."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import modalign
from modalign import _load, bench, ops, testing
from modalign.bench import environment, measure, tables
from modalign.bench import run as run_module

ROOT = Path(__file__).parent.parent
GRAM = ROOT / "benchmarks" / "cases" / "gram_volume.py"
LADDER = ROOT / "benchmarks" / "ladder_gram_volume"
FAST = bench.Options(quick=True, rounds=2, memory=False, where={"k": 3}, providers=("ours", "eager", "formula"))


def results_of(path, options=FAST, only=None):
    return bench.run_cases([case for case in bench.load_cases(path) if only in (None, case.name)], options, "test")


def declare_square(wrong=False, floor=True):
    @bench.case(
        grid=[dict(N=64, D=32)],
        reference=lambda x: x.square(),
        flops=lambda p, pass_, size: p["N"] * p["D"],
        bytes=lambda p, pass_, size: 2 * size * p["N"] * p["D"],
        targets=[bench.Target(1e9, provider="mine"), bench.Target(0.0, provider="other")],
    )
    def square(maker, N, D):
        return (maker.randn(N, D),)

    bench.provider(square, name="usual", kind="formula")(lambda x: x * x)
    bench.provider(square, name="mine", kind="ours")(lambda x: x * x + (1e-3 if wrong else 0.0))
    bench.provider(square, name="other")(torch.square)
    if floor:
        bench.copy_floor(square)(square.bytes)
    return square


# ----------------------------------------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def gram_results():
    return results_of(GRAM)


def test_every_row_of_gram_volume_matches_and_is_complete(gram_results, tmp_path):
    rows = gram_results["rows"]
    assert {row["case"] for row in rows} == {"gram_volume", "gram_volume_near_zero", "triangle_area", "paired_gram_volume"}
    assert {row["provider"] for row in rows} == {"formula", "eager", "ours", "floor"}
    assert {row["parameters"].get("near_zero") for row in rows} >= {0, 1, 100}
    assert {row["pass"] for row in rows} == {"fwd", "bwd", "fwd+bwd"}
    for row in rows:
        assert row["status"] == "ok", row
        assert row["seconds"]["q20"] <= row["seconds"]["median"] <= row["seconds"]["q80"]
        assert row["rounds"] == 2 and row["calls_per_round"] >= 1 and row["plan"]
        assert math.isclose(row["byte_per_second"] * row["seconds"]["median"], row["bytes"])
        assert row["ratio_to_floor"]["median"] > 0
        if row["kind"] != "floor":
            assert row["error"]["seed"] == 1 and row["error"]["forward"]["relative"] < 1e-2 and row["error"]["backward"]["relative"] < 1e-2
        if row["provider"] == "ours":
            assert row["plan"] == _load.instruction_set()
    bench.write_results(tmp_path / "results.json", gram_results)
    assert bench.read_results(tmp_path / "results.json") == json.loads((tmp_path / "results.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]  # no temporary file stays


def test_torch_compile_is_measured_or_says_why_not():
    options = bench.Options(quick=True, rounds=1, memory=False, where={"k": 2}, passes=("fwd",), providers=("torch.compile",))
    (row,) = [row for row in results_of(GRAM, options, only="gram_volume")["rows"] if row["provider"] == "torch.compile"]
    assert (row["status"] == "ok" and row["seconds"]["median"] > 0) or (row["status"] == "unavailable" and row["reason"])


def test_backward_counts_three_products_and_the_whole_four(gram_results):
    flops = {row["pass"]: row["flops"] for row in gram_results["rows"] if row["case"] == "gram_volume" and row["provider"] == "ours"}
    B, C, D, m = 192, 160, 64, 2
    assert flops == {"fwd": 2 * B * C * m * D, "bwd": 6 * B * C * m * D, "fwd+bwd": 8 * B * C * m * D}


def test_floor_makes_products_of_the_counted_flops():
    (case,) = [case for case in bench.load_cases(GRAM) if case.name == "gram_volume"]
    parameters = dict(B=6, C=5, D=7, k=3)
    shapes = {pass_: _floor_shapes(parameters, pass_) for pass_ in ("fwd", "bwd")}
    for pass_, products in shapes.items():
        assert sum(2 * rows * depth * columns for rows, depth, columns in products) == case.cost("flops", parameters, pass_, 4)


def _floor_shapes(parameters, pass_):
    module = sys.modules["modalign_bench_cases_gram_volume"]
    return module.products(parameters, pass_)


def test_design_lines_of_gram_volume_are_in_the_grid():
    (case,) = [case for case in bench.load_cases(GRAM) if case.name == "gram_volume"]
    assert {point["k"]: (point["B"], point["C"], point["D"]) for point in case.grid} == {k: (2048, 2048, 512) for k in (2, 3, 4, 5)}
    wanted = {target.where["k"]: target.ratio for target in case.targets}
    assert wanted == {2: 1.0, 3: 0.95, 4: 0.95, 5: 0.95}


@pytest.mark.parametrize("share", [0, 1, 100])
def test_near_zero_case_has_that_share_of_near_zero_pairs(share):
    (case,) = [case for case in bench.load_cases(GRAM) if case.name == "gram_volume_near_zero"]
    anchor, others = case.make(testing.Maker(torch.float64), B=300, C=300, D=512, k=3, near_zero=share)
    q = torch.linalg.qr(torch.stack(others, -1))[0]
    residual = (anchor * anchor).sum(-1, keepdim=True) - (anchor @ q.mT.reshape(-1, 512).mT).unflatten(-1, (-1, 2)).square().sum(-1)
    assert (residual < 1e-2).double().mean().item() == pytest.approx(share / 100, abs=1e-4)


def test_case_reference_is_the_ops_reference():
    (case,) = [case for case in bench.load_cases(GRAM) if case.name == "gram_volume"]
    anchor, others = case.make(testing.Maker(torch.float64), B=5, C=6, D=9, k=4)
    torch.testing.assert_close(case.reference(anchor, others), ops.gram_volume(anchor, others), rtol=1e-10, atol=0)


def test_wrong_result_prints_no_speed(registry):
    results = bench.run_cases([declare_square(wrong=True)], bench.Options(quick=True, rounds=1, memory=False), "test")
    rows = {row["provider"]: row for row in results["rows"] if row["pass"] == "fwd"}
    assert rows["mine"]["status"] == "mismatch" and "seconds" not in rows["mine"] and rows["mine"]["reason"].startswith("forward error")
    assert rows["other"]["status"] == "ok" and rows["other"]["target"] == {"ratio": 0.0, "met": False}
    assert tables.cell(rows["mine"], "time") == "mismatch" and tables.cell(rows["mine"], "floor") == tables.DASH


def test_wrong_gradient_prints_no_speed(registry):
    case = declare_square()

    class Lying(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return 2.01 * grad * ctx.saved_tensors[0]

    bench.provider(case, name="lying")(Lying.apply)
    rows = [row for row in bench.run_cases([case], bench.Options(quick=True, rounds=1, memory=False), "test")["rows"] if row["provider"] == "lying"]
    assert rows and all(row["status"] == "mismatch" and "backward error" in row["reason"] for row in rows)


def outcome(*functions, passes=(), dtypes=()):
    """{name: (status, reason)} of functions beside each other in one case."""
    case = declare_square()
    for function in functions:
        bench.provider(case)(function)
    options = bench.Options(quick=True, rounds=1, memory=False, passes=passes, dtypes=dtypes)
    return {row["provider"]: (row["status"], row["reason"]) for row in bench.run_cases([case], options, "test")["rows"]}


def test_result_of_another_kind_is_a_mismatch(registry):
    def leading(x):
        return (x * x)[None]

    def one_column(x):
        return (x * x)[:, :1]

    def nothing(x): ...

    def pair(x):
        return x * x, x

    def wide(x):
        return x.double() * x

    found = outcome(leading, one_column, nothing, pair, wide)
    assert found["leading"] == ("mismatch", "the result must be a tensor of shape [64, 32], got [1, 64, 32]")
    assert found["one_column"] == ("mismatch", "the result must be a tensor of shape [64, 32], got [64, 1]")
    assert found["nothing"][1].endswith("got NoneType") and found["pair"][1].endswith("got tuple")
    assert found["wide"] == ("mismatch", "the result must be float32, got float64")
    assert found["other"] == ("ok", "")


def test_half_types_may_give_their_result_in_float32(registry):
    def summed_wide(x):
        return x.float() * x.float()

    assert outcome(summed_wide, dtypes=(torch.bfloat16,))["summed_wide"] == ("ok", "")


def test_provider_that_changes_its_inputs_is_named_and_spoils_nothing(registry):
    def spoils(x):
        result = x * x
        x.data.mul_(2)
        return result

    def after(x):
        return x * x

    for passes in (("fwd",), ("fwd", "bwd")):
        found = outcome(spoils, after, passes=passes)
        assert found["spoils"] == ("mismatch", "it must leave its inputs as they are, got input 0 changed in place")
        assert found["after"] == found["other"] == ("ok", "")


def test_only_passes_that_are_asked_for_are_checked(registry):
    def without_gradient(x):
        return (x * x).detach()

    assert outcome(without_gradient, passes=("fwd",))["without_gradient"] == ("ok", "")
    found = outcome(without_gradient)["without_gradient"]
    assert found == ("failed", "RuntimeError: the result must have a gradient, got one without")


def test_provider_that_fails_while_it_is_timed_leaves_the_others(registry):
    calls = []

    def tires(x):
        calls.append(x)
        if len(calls) > 4:
            raise RuntimeError("tired")
        return x * x

    found = outcome(tires, passes=("fwd",))
    assert found["tires"] == ("failed", "RuntimeError: tired") and found["other"] == ("ok", "")


def test_row_is_noisy_by_its_own_spread_or_its_floor_s(registry):
    case = declare_square()
    point = run_module.Point(case, dict(N=4, D=4), torch.float32, bench.Options(), None, lambda text: None)
    steady, spread = (measure.Timing({"fwd": dict(enumerate(times))}, {"fwd": 1}) for times in ((1.0, 1.01, 1.02), (1.0, 1.1, 1.3)))
    assert [point._speed(1, "fwd", *pair)["noisy"] for pair in itertools.product((steady, spread), repeat=2)] == [False, True, True, True]
    assert point._speed(1, "fwd", spread, None)["noisy"] and not point._speed(1, "fwd", steady, None)["noisy"]


def test_percent_of_the_machine_stands_beside_a_declared_floor(registry):
    rate = {"median": 1e3, "q20": 1e3, "q80": 1e3}
    product, copy = {"dtype": "float32", "threads": 1, "flop_per_second": rate}, {"threads": 1, "byte_per_second": rate}
    figures = {"device": "cpu", "matmul": [product], "copy": [copy]}
    point = run_module.Point(declare_square(), dict(N=4, D=4), torch.float32, bench.Options(), figures, lambda text: None)
    timing, floor = (measure.Timing({"fwd": {0: seconds}}, {"fwd": 1}) for seconds in (0.512, 0.128))
    speed = point._speed(1, "fwd", timing, floor)  # 2 * 4 * 16 bytes at 1000 a second: 0.128 s
    assert (speed["percent_of_floor"], speed["percent_of_machine"]) == pytest.approx((25, 25))
    shown = {"status": "ok", "kind": "ours", "parameters": {}, **speed}
    assert tables.cell(shown, "machine") == "25 %"
    assert tables.cell({**shown, **point._speed(1, "fwd", timing, None)}, "machine") == tables.DASH  # there it is the floor itself


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_floor_of_half_types_is_the_faster_product(faster, registry, monkeypatch):
    product, used = torch.mm, []

    def mm(left, right, out):
        used.append(left.dtype)
        if left.dtype is not faster:
            time.sleep(0.02)
        return product(left, right, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    case = declare_square(floor=False)
    bench.matmul_floor(case)(lambda p, pass_: [(p["N"], p["D"], 8)])
    floor = bench.providers_of(case)["floor"].prepare(1, dict(N=8, D=8), torch.bfloat16, torch.device("cpu"))
    assert set(used) == {torch.float32, torch.bfloat16}
    used.clear()
    floor["fwd"](0), floor["bwd"](0)
    name = str(faster).removeprefix("torch.")
    assert used == [faster, faster] and floor["plan"] == f"torch.mm: fwd in {name}, bwd in {name}"
    used.clear()
    assert "plan" not in bench.providers_of(case)["floor"].prepare(1, dict(N=8, D=8), torch.float32, torch.device("cpu"))


def test_case_has_one_floor(registry):
    with pytest.raises(ValueError, match=r"case square must have one floor, got \['floor', 'second'\]"):
        bench.copy_floor(declare_square(), name="second")(lambda p, pass_, size: 1)


def test_provider_that_cannot_run_is_listed_with_its_reason(registry):
    case = declare_square()
    bench.provider(case, name="absent", unavailable=lambda: "no such library")(torch.square)

    @bench.provider(case, name="breaks")
    def breaks(x):
        raise RuntimeError("no kernel\nlong trace")

    rows = {row["provider"]: row for row in bench.run_cases([case], bench.Options(quick=True, rounds=1, memory=False), "test")["rows"]}
    assert (rows["absent"]["status"], rows["absent"]["reason"]) == ("unavailable", "no such library")
    assert (rows["breaks"]["status"], rows["breaks"]["reason"]) == ("failed", "RuntimeError: no kernel")
    assert rows["mine"]["status"] == "ok"


def test_our_own_failure_is_not_hidden(registry):
    case = declare_square()

    @bench.provider(case, name="broken", kind="ours")
    def broken(x):
        raise RuntimeError("kernel fault")

    rows = [row for row in bench.run_cases([case], bench.Options(quick=True, rounds=1, memory=False), "test")["rows"] if row["provider"] == "broken"]
    assert rows and all((row["status"], row["reason"]) == ("failed", "RuntimeError: kernel fault") for row in rows)


def test_thread_count_is_used_and_restored(registry):
    case = declare_square()
    seen = set()

    @bench.provider(case, name="watching")
    def watching(x):
        seen.add(torch.get_num_threads())
        return x * x

    before = torch.get_num_threads()
    results = bench.run_cases([case], bench.Options(quick=True, threads=(1, 2), rounds=1, memory=False), "test")
    assert seen == {1, 2} and torch.get_num_threads() == before
    assert {row["threads"] for row in results["rows"]} == {1, 2}


def test_peak_memory_is_that_of_the_pass(tmp_path, registry):
    file = tmp_path / "big.py"
    file.write_text(
        "import torch\nfrom modalign import bench\n"
        "@bench.case(grid=[dict(N=4 << 20)], reference=lambda x: x + 1, passes=['fwd'])\n"
        "def big(maker, N):\n    return (maker.randn(N),)\n"
        "@bench.provider(big)\ndef one(x):\n    return x + 1\n"
        "@bench.provider(big)\ndef three(x):\n    a = x + 1\n    b = a * 2\n    return b - a\n"
    )
    rows = {row["provider"]: row for row in results_of(file, bench.Options(quick=True, rounds=1))["rows"]}
    size = 4 * (4 << 20)
    assert 0.9 * size < rows["one"]["peak_memory_bytes"] < 1.5 * size
    assert 2.5 * size < rows["three"]["peak_memory_bytes"] < 3.8 * size


# ------------------------------------------------------------------------------------------------------------------------------------------ measuring


def test_quantiles():
    assert measure.quantiles([3.0]) == {"median": 3.0, "q20": 3.0, "q80": 3.0}
    assert measure.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx({"median": 3.5, "q20": 2.0, "q80": 5.0})


def test_inputs_exceed_twice_the_last_cache(registry):
    sets = measure.InputSets(declare_square(), dict(N=1 << 16, D=256), torch.float32, torch.device("cpu"), 0)
    assert sets.count * (1 << 26) >= 2 * environment.last_cache_bytes()
    assert len({inputs[0].data_ptr() for inputs in sets.plain}) == sets.count
    assert all(torch.equal(inputs[0], sets.plain[0][0]) for inputs in sets.plain)


def test_rounds_interleave_and_slow_providers_take_part_in_three(registry):
    case = declare_square()
    order = []

    def recording(name, seconds):
        def function(x):
            order.append(name)
            time.sleep(seconds)
            return x * x

        return bench.Provider(name, function=function)

    sets = measure.InputSets(case, dict(N=4, D=4), torch.float32, torch.device("cpu"), 0, count=2)
    subjects = {name: measure.Subject(recording(name, seconds), sets, {}) for name, seconds in (("a", 0.021), ("b", 0.021), ("slow", 0.6))}
    order.clear()
    timings = measure.time_interleaved(subjects, ("fwd",), torch.device("cpu"), 7)
    timed = order[6:]
    assert [name for name in timed if name != "slow"][:6] == ["a", "b", "b", "a", "a", "b"]  # the order shifts from round to round
    assert len(timings["a"].samples["fwd"]) == 7 and list(timings["slow"].samples["fwd"]) == [0, 2, 4]
    assert timings["slow"].ratio_to(timings["a"], "fwd")["median"] > 20


# ---------------------------------------------------------------------------------------------------------------------------------------------- files


def small_results(**changes):
    row = {
        "case": "op",
        "parameters": {"k": 3},
        "dtype": "float32",
        "pass": "fwd",
        "threads": 1,
        "provider": "ours",
        "kind": "ours",
        "status": "ok",
        "reason": "",
        "seconds": {"median": 0.0123, "q20": 0.012, "q80": 0.013},
        "rounds": 7,
        "flop_per_second": 9.87e10,
        "ratio_to_floor": {"median": 0.9, "q20": 0.88, "q80": 0.93},
        "percent_of_floor": 111.1,
        "noisy": False,
        "target": {"ratio": 0.95, "met": True},
        "error": {"seed": 1, "forward": {"maximum": 1e-6, "relative": 2e-7}, "backward": None},
    }
    facts = {"device": "cpu", "gpu": None, "cpu": {"model": "Processor", "cores": 2, "instruction_set": "avx2"}, "torch": "2.13.0", "blas": "mkl 1"}
    results = {
        "schema": bench.SCHEMA,
        "created": "2026-01-02T03:04:05+00:00",
        "command": "python run.py op",
        "seed": 0,
        "note": "",
        "environment": facts,
        "rows": [row],
    }
    row.update(changes.pop("row", {}))
    return {**results, **changes}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda r: r | {"schema": "modalign.bench/0"}, r"schema must be one of \['modalign.bench/2', 'modalign.bench/1'\], got 'modalign.bench/0'"),
        (lambda r: {"schema": "modalign.bench/99"}, "schema must be one of"),
        (lambda r: {key: value for key, value in r.items() if key != "environment"}, "the whole must have 'environment'"),
        (lambda r: r | {"environment": {"gpu": None, "torch": "2", "blas": "mkl"}}, "environment must have 'cpu'"),
        (lambda r: r | {"rows": [r["rows"][0] | {"seconds": {"median": 0, "q20": 1, "q80": 1}}]}, r"seconds.median must be above 0, got 0"),
        (lambda r: r | {"rows": [r["rows"][0] | {"seconds": {"median": 1, "q20": -1, "q80": 1}}]}, r"seconds.q20 must be above 0, got -1"),
        (lambda r: r | {"rows": [r["rows"][0] | {"seconds": {"median": math.nan, "q20": 1, "q80": 1}}]}, "seconds.median must be number"),
        (lambda r: r | {"rows": [{key: value for key, value in r["rows"][0].items() if key != "rounds"}]}, r"rows\[0\] must have 'rounds'"),
        (lambda r: {key: value for key, value in r.items() if key != "seed"}, "the whole must have 'seed'"),
        (lambda r: r | {"seed": True}, "seed must be integer, got True"),
        (lambda r: r | {"rows": [r["rows"][0] | {"status": "fine"}]}, r"rows\[0\].status must be one of"),
        (lambda r: r | {"rows": [r["rows"][0] | {"status": "mismatch"}]}, r"rows\[0\] must not have \['seconds'\]"),
        (lambda r: r | {"rows": [{key: value for key, value in r["rows"][0].items() if key != "seconds"}]}, r"rows\[0\] must have 'seconds'"),
        (lambda r: r | {"rows": [{key: value for key, value in r["rows"][0].items() if key != "pass"}]}, r"rows\[0\] must have 'pass'"),
        (lambda r: r | {"rows": [r["rows"][0] | {"ratio_to_floor": {"median": 1}}]}, r"rows\[0\].ratio_to_floor must have 'q20'"),
    ],
)
def test_broken_results_are_refused(broken, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        bench.write_results(tmp_path / "x.json", broken(small_results()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused_when_read(number, tmp_path):
    path = tmp_path / "x.json"
    bench.write_results(path, small_results())
    path.write_text(path.read_text().replace('"median": 0.0123', f'"median": {number}'))
    with pytest.raises(ValueError, match="must be JSON, got .*, which is no number|seconds.median must be number"):
        bench.read_results(path)


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    bench.write_results(path, small_results())
    before = path.read_text()
    with pytest.raises(TypeError):
        bench.write_results(path, small_results(note="new", environment={**small_results()["environment"], "bad": object()}))
    assert path.read_text() == before and [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_not_finite_errors_become_null(tmp_path):
    path = tmp_path / "x.json"
    bench.write_results(path, small_results(row={"error": {"seed": 1, "forward": {"maximum": math.inf, "relative": math.nan}, "backward": None}}))
    assert bench.read_results(path)["rows"][0]["error"]["forward"] == {"maximum": None, "relative": None}


def test_environment_names_no_machine(gram_results):
    import getpass
    import socket

    text = json.dumps(gram_results)
    assert str(ROOT) not in text and str(Path.home()) + "/" not in text and sys.prefix not in text
    host = socket.gethostname()
    assert len(host) < 4 or host not in text
    assert f'"{getpass.getuser()}"' not in text
    facts = gram_results["environment"]
    assert (
        facts["device"] == "cpu"
        and facts["cpu"]["model"]
        and facts["blas"]
        and facts["torch"] == torch.__version__
        and facts["cpu"]["instruction_set"] == _load.instruction_set()
    )


def test_command_shows_paths_without_folders(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shown = environment.public_command(
        [str(tmp_path / "run.py"), "op", "--out", "/somewhere/else/x.json", "--note", "busy", "--note=very busy", f"--config={tmp_path}/c d.toml"]
    )
    assert shown == "python run.py op --out x.json '--config=c d.toml'"
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/modalign", "bench", "run", "op", "--out", str(tmp_path / "x.json")])
    assert environment.command_of_this_process() == "modalign bench run op --out x.json"


# --------------------------------------------------------------------------------------------------------------------------------------------- tables


def test_markdown_is_rendered_from_json_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bench.write_results("x.json", small_results())
    page = Path("page.md")
    page.write_text(
        '# Speed\n\n<!-- bench x.json rows="case=op k=3,4" columns="k provider time rate floor error target" -->\nold\n<!-- /bench -->\nend\n'
    )
    assert tables.main(["page.md", "--check"]) == 1 and "old" in page.read_text()
    assert tables.main(["page.md"]) == 0
    assert tables.main(["page.md", "--check"]) == 0
    text = page.read_text()
    assert "| 3 | ours | 12.3 ms (12 ms … 13 ms) | 98.7 GFLOP/s | 0.90 (0.88 … 0.93) | 2.0e-07 | ≤ 0.95: met |" in text
    assert "*Processor, 2 cores, avx2; torch 2.13.0, mkl 1; 2026-01-02; seed 0; `python run.py op` → `x.json`.*" in text
    assert text.startswith("# Speed\n") and text.endswith("<!-- /bench -->\nend\n")
    bench.write_results("x.json", small_results(note="a noisy machine", row={"noisy": True}))
    assert tables.main(["page.md", "--check"]) == 1
    tables.main(["page.md"])
    assert "a noisy machine." in page.read_text() and "spread by more than 10 %" in page.read_text()
    assert "12.3 ms (12 ms … 13 ms) (noisy) |" in page.read_text()
    page.write_text('<!-- bench x.json columns="provider floor" -->\n<!-- /bench -->')
    tables.main(["page.md"])
    assert "| ours | 0.90 (0.88 … 0.93) (noisy) |" in page.read_text()  # a table without the time is marked too


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ('<!-- bench x.json rows="k=9" -->\n<!-- /bench -->', "rows must keep at least one row"),
        ('<!-- bench x.json columns="speed" -->\n<!-- /bench -->', "columns must be out of"),
        ('<!-- bench x.json width="9" -->\n<!-- /bench -->', "a block takes rows and columns"),
        ("<!-- bench x.json -->\n", "must be closed"),
        ('<!-- bench x.json rows="k" -->\n<!-- /bench -->', "rows must be written as field=value"),
    ],
)
def test_bad_blocks_are_refused(block, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench.write_results("x.json", small_results())
    with pytest.raises(ValueError, match=message):
        tables.render(block)


def test_tables_of_this_repository_are_fresh(monkeypatch):
    monkeypatch.chdir(ROOT)
    pages = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if page.exists() and "<!-- bench " in page.read_text()]
    assert ROOT / "docs" / "ladder.md" in pages
    assert tables.main([*map(str, pages), "--check"]) == 0


# ------------------------------------------------------------------------------------------------------------------------------------------- commands


def run(*arguments, **options):
    finished = subprocess.run([*map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=300, **options)
    return finished


def test_script_runs_every_case_of_a_file(tmp_path):
    """What README and captions quote: python benchmarks/run.py NAME."""
    out = tmp_path / "gram.json"
    options = ["--quick", "--threads", 1, "--rounds", 1, "--pass", "fwd", "--providers", "ours", "--note", "smoke", "--out", out]
    finished = run(sys.executable, "benchmarks/run.py", "gram_volume", *options)
    assert finished.returncode == 0, finished.stderr
    results = bench.read_results(out)
    assert {row["case"] for row in results["rows"]} == {"gram_volume", "gram_volume_near_zero", "triangle_area", "paired_gram_volume"}
    assert results["command"] == "python benchmarks/run.py gram_volume --quick --threads 1 --rounds 1 --pass fwd --providers ours --out gram.json"
    assert results["note"] == "smoke" and "GFLOP/s" in finished.stdout
    refused = run(sys.executable, "benchmarks/run.py", "nothing")
    assert refused.returncode == 1 and "got 'nothing'" in refused.stderr
    assert all(f"'{path.stem}'" in refused.stderr for path in (ROOT / "benchmarks" / "cases").glob("*.py"))


DEVICE = ROOT / "benchmarks" / "device.sh"


def test_device_script_dry_run(tmp_path):
    assert run("bash", "-n", DEVICE).returncode == 0
    planned = run("bash", DEVICE, "--out", tmp_path / "out", "--quick", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    steps = [line.partition(":")[0] for line in planned.stdout.splitlines()]
    assert steps == [
        "stage",
        "configure",
        "build",
        "install",
        "battery",
        "sanitizer_memcheck",
        "sanitizer_racecheck",
        "sanitizer_synccheck",
        "ladder_build",
        "ladder_memcheck",
        "ladder_racecheck",
        "ladder_synccheck",
        "ladder",
        "bench_gram_volume",
    ]
    assert "-DMODALIGN_HOST=OFF" in planned.stdout and "--quick" in planned.stdout.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    planned = run("bash", DEVICE, "--out", tmp_path / "out", "--binary", "built/_C.so", "--dry-run")
    assert "binary: cp built/_C.so" in planned.stdout and "configure" not in planned.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--out must name a folder"),
        (("--out",), "must be followed by a value"),
        (("--speed",), "option must be"),
        (("--out", "x", "--binary", "no/such.so"), "--binary must be a file"),
    ],
)
def test_device_script_refuses(arguments, message):
    finished = run("bash", DEVICE, *arguments)
    assert finished.returncode == 2 and message in finished.stderr


def test_device_battery_runs_without_the_host_module(tmp_path):
    """What device.sh stages and runs: the package without _host, under any Python; on the CPU here."""
    stage = tmp_path / "stage"
    package = Path(modalign.__file__).parent
    shutil.copytree(package, stage / "modalign", ignore=shutil.ignore_patterns("_host*", "include", "__pycache__"))
    code = (
        "import sys, runpy; sys.argv = ['device.py', '--device', 'cpu', 'battery', '--small', '--out', sys.argv[1]]\n"
        "try: runpy.run_path('benchmarks/device.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not [name for name in sys.modules if '_host' in name or name in ('rich', 'typer', 'pytest')]"
    )
    finished = run(sys.executable, "-c", code, tmp_path / "battery.json", env={**os.environ, "PYTHONPATH": str(stage)})
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report = json.loads((tmp_path / "battery.json").read_text())
    assert len(report["checks"]) >= 12 and all(check["passed"] for check in report["checks"])


# --------------------------------------------------------------------------------------------------------------------------------------------- ladder


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    sys.path.insert(0, str(LADDER))
    before = os.environ.get("MODALIGN_LADDER_DIR")
    os.environ["MODALIGN_LADDER_DIR"] = str(tmp_path_factory.mktemp("ladder"))
    import build

    yield build
    sys.path.remove(str(LADDER))
    if before is None:
        del os.environ["MODALIGN_LADDER_DIR"]
    else:
        os.environ["MODALIGN_LADDER_DIR"] = before


@pytest.mark.parametrize("rung", ["definition", "naive", "tiled", "fused"])
def test_cpu_rungs_are_right(ladder, rung):
    maker = testing.Maker(torch.float32, seed=3)
    for B, C, D, k in ((130, 67, 40, 3), (1, 1, 3, 2), (97, 33, 65, 4), (5, 200, 16, 8), (12, 16, 1030, 2)):
        anchor, others = maker.randn(B, D), maker.randn(C, k - 1, D)
        expected = ops.gram_volume(anchor.double(), [other.double() for other in others.unbind(1)])
        for threads in (1, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                actual = ladder.run(rung, anchor, others)
            finally:
                torch.set_num_threads(before)
            testing.compare_values(actual, expected, what=f"{rung} {B} {C} {D} {k}")


def test_cpu_ladder_refuses(ladder):
    with pytest.raises(TypeError, match="ladder: tensors must be float32 on the CPU"):
        ladder.run("naive", torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 1, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="ladder: others must hold 1 to 7 modalities, got 8"):
        ladder.run("naive", torch.zeros(2, 3), torch.zeros(2, 8, 3))


def test_cuda_rungs_in_the_emulator(tmp_path):
    """The very ladder.cuh that nvcc compiles, thread by thread, in two orders: right results, no race, no bad address."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    program = tmp_path / "emulate"
    sources = [LADDER / "emulate.cpp", ROOT / "csrc" / "host" / "simt_host.cpp"]
    built = run(compiler, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-I", ROOT / "csrc", *sources, "-o", program)
    assert built.returncode == 0, built.stderr
    finished = run(program)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    errors = dict(line.split() for line in finished.stdout.splitlines())
    assert list(errors) == ["naive", "tiled", "fused"] and all(float(error) < 1e-5 for error in errors.values())


def test_emulator_sees_a_broken_rung(tmp_path):
    """Without the barrier between multiplying and the next load, the emulator reports a race: the test above can fail."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    broken = (LADDER / "ladder.cuh").read_text().replace("    }\n    barrier();\n  }\n}", "    }\n  }\n}")
    assert broken != (LADDER / "ladder.cuh").read_text()
    (tmp_path / "ladder.cuh").write_text(broken)
    for name in ("problem.h", "emulate.cpp"):
        shutil.copy(LADDER / name, tmp_path)
    program = tmp_path / "emulate"
    built = run(compiler, "-std=c++20", "-O1", "-I", ROOT / "csrc", tmp_path / "emulate.cpp", ROOT / "csrc" / "host" / "simt_host.cpp", "-o", program)
    assert built.returncode == 0, built.stderr
    finished = run(program)
    assert finished.returncode == 2 and "race" in finished.stderr


def test_ladder_results_in_the_repository_are_of_all_rungs():
    rows = bench.read_results(ROOT / "benchmarks" / "results" / "ladder_gram_volume.json")["rows"]
    assert {row["provider"] for row in rows} == {"definition", "naive", "tiled", "fused", "modalign.ops.gram_volume", "floor"}
    assert all(row["status"] == "ok" for row in rows)


# -------------------------------------------------------------------------------------------------------------------------------------------- example


def test_custom_epilogue_example():
    finished = run(sys.executable, "examples/custom_epilogue/example.py")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "crowding passes the battery" in finished.stdout
