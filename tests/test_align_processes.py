"""`modalign align` in several processes: the figures of one, whatever starts them; stopped, refused and resumed; and the training behind it, rank by rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from typer.testing import CliRunner

from modalign import data, models
from modalign.cli import app, processes
from ranks import run_ranks
from test_align_runs import everything_in, wait_for, write_folder


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """A short run on emoji-mini, as a folder of its features: without pictures there are few figures to draw."""
    folder = tmp_path_factory.mktemp("data") / "emoji-mini"
    return ["align", str(write_folder(folder, data.load("emoji-mini"))), "--seeds", "1", "--steps", "10", "--out"]


def start(folder: Path, *arguments: str, program: tuple[str, ...] = ("-m", "modalign")) -> subprocess.Popen:
    """In a session of its own, as a terminal's foreground job is one, and with Ctrl-C as a terminal leaves it."""
    code = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", code, *program, *arguments]
    environment = dict(os.environ, COLUMNS="200", OMP_NUM_THREADS="1")
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finished(child: subprocess.Popen) -> tuple[int, str, str]:
    try:
        output, errors = child.communicate(timeout=120)
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    return child.returncode, output, errors


@pytest.fixture(scope="module")
def by_torchrun_and_by_one(tmp_path_factory, arguments) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("torchrun")
    child = start(folder, *arguments, "out", program=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "modalign"))
    alone = CliRunner().invoke(app, [*arguments, str(folder / "alone")])
    status, output, errors = finished(child)
    assert alone.exit_code == 0 and status == 0, alone.output + errors
    assert output.count("wrote out/results.json") == 1 and output.count("Figures of the test part") == 1  # rank 0 alone speaks
    return folder / "out", folder / "alone"


def test_two_processes_have_the_figures_of_one(by_torchrun_and_by_one):
    two, one = (json.loads((folder / "results.json").read_text()) for folder in by_torchrun_and_by_one)
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    assert two["command"] == one["command"] + " --nproc 2"
    assert one["settings"] == two["settings"] and one["seeds"][0]["chosen"] == two["seeds"][0]["chosen"]
    for row in ("trained", "trained_random"):
        assert two["seeds"][0]["loss"][row] == pytest.approx(one["seeds"][0]["loss"][row], rel=1e-5)
        for direction, figures in one["seeds"][0]["table"][row].items():
            for name in ("r1", "r5", "r10"):  # two items of 500 may lie where rounding decides
                assert two["seeds"][0]["table"][row][direction][name] == pytest.approx(figures[name], abs=0.0041)


def test_ctrl_c_one_line_of_refusal_and_resuming_to_the_same_bits(tmp_path, arguments, by_torchrun_and_by_one):
    arguments = [*arguments, "out", "--nproc", "2"]
    child = start(tmp_path, *arguments)
    progress = tmp_path / "out" / "progress"
    wait_for(lambda: any(progress.glob("*-choose.safetensors")), child)  # written at the end of the first training run at the latest
    os.killpg(child.pid, signal.SIGINT)
    status, output, errors = finished(child)
    assert status == 130
    assert output.count("kept what is done in out/progress; the same command with --resume goes on") == 1
    assert errors == "modalign align: interrupted, no file is half-written\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["progress"]

    refused = finished(start(tmp_path, *arguments))  # rank 0 alone finds the run; rank 1, which waits for it, ends too
    assert refused == (1, refused[1], "modalign align: out/progress: holds an unfinished run; go on with --resume, or throw it away with --restart\n")
    assert json.loads((progress / "run.json").read_text())["nproc"] == 2  # with another number the last bits are others: not the same run

    status, _, errors = finished(start(tmp_path, *arguments, "--resume"))
    assert (status, errors) == (0, "")
    assert everything_in(tmp_path / "out") == everything_in(by_torchrun_and_by_one[0])


def test_nproc_is_torchruns_business_under_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")
    result = CliRunner().invoke(app, ["align", "emoji-mini", "--nproc", "2"], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "modalign align: nproc must be left out under torchrun, which says how many processes there are, got 2" in result.output


@pytest.mark.parametrize(
    ("status", "recorded", "kind", "text"),
    [
        (1, "ValueError: data must be there, got none", ValueError, "^data must be there, got none$"),
        (1, "KeyError: 'x'", RuntimeError, "^rank 1 failed:\nTraceback of KeyError: 'x'$"),
        (-9, None, ValueError, "^rank 1 must come to its end, got SIGKILL$"),
        (130, None, KeyboardInterrupt, "^$"),
    ],
)
def test_what_ended_a_rank_is_told(tmp_path, monkeypatch, status, recorded, kind, text):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")
    about = {"message": recorded, "extraInfo": {"py_callstack": f"Traceback of {recorded}", "timestamp": "1"}}
    if recorded:
        (tmp_path / "error.json").write_text(json.dumps({"message": about}))

    def fail(*arguments):
        raise ChildFailedError("align", {1: ProcessFailure(local_rank=1, pid=1, exitcode=status, error_file=str(tmp_path / "error.json"))})

    monkeypatch.setattr(processes, "elastic_launch", lambda config, entry: fail)
    with pytest.raises(kind, match=text):
        processes.launch(2, "cpu", print)


# ------------------------------------------------------------------ training, rank by rank

PLAN = models.TrainingConfig(steps=6, batch=7, learning_rate=1e-2, affine_rate=1.0, evaluate_every=2)


def one_run(loss: str, group=None, **options):
    """Three modalities, two with gaps; groups of two; dropout; batches of 4 to 7 items, so that of three ranks some have none for a term."""
    random = torch.Generator().manual_seed(3)
    features = {name: torch.randn(21, 6, generator=random) for name in "abc"}
    present = {name: torch.rand(21, generator=random) > 0.4 for name in "bc"}
    learn = {"learn_temperature": loss != "siglip"}
    config = models.GramAlignerConfig({name: 6 for name in "abc"}, width=4, hidden=5, loss=loss, **learn)
    model = models.GramAligner(config, seed=0 if group is None else dist.get_rank())  # rank 0's weights are the start
    groups, validation = torch.arange(21) // 2, (features, torch.arange(21), present)
    history = models.fit_aligner(model, features, groups, PLAN, seed=5, present=present, validation=validation, process_group=group, **options)
    return history, model.state_dict()


def train(rank: int, world: int) -> dict:
    found = {loss: one_run(loss, dist.group.WORLD) for loss in ("gram", "volume", "clip", "siglip")}
    folder = os.environ["CHECKPOINTS"]
    checkpoint = models.Checkpoint(Path(folder) / "state.safetensors", seconds=0.0)  # every rank says where; rank 0 alone has anything there
    stopped = "stopped by rank 1"

    def stop(step: int) -> None:
        if step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGINT)  # which is seen after step 4

    try:
        one_run("gram", dist.group.WORLD, checkpoint=checkpoint if rank == 0 else None, progress=stop)
        stopped = ""
    except KeyboardInterrupt:
        pass
    return found | {stopped: one_run("gram", dist.group.WORLD, checkpoint=checkpoint if rank == 0 else None)}


def test_ranks_train_what_one_process_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("CHECKPOINTS", str(tmp_path))
    first, *others = run_ranks(3, "test_align_processes:train", str(tmp_path))
    for loss in ("gram", "volume", "clip", "siglip"):
        history, weights = one_run(loss)
        assert len(history.loss) == 6 and list(history.evaluated) == [0, 2, 4, 6]
        assert first[loss][0].loss == pytest.approx(history.loss, rel=1e-4) and first[loss][0].evaluated == pytest.approx(history.evaluated, abs=0.03)
        for name, value in weights.items():
            assert torch.allclose(first[loss][1][name], value, rtol=1e-3, atol=1e-4), (loss, name)
    for other in others:  # not a bit apart
        for what, (history, weights) in first.items():
            assert other[what][0] == history and all(torch.equal(other[what][1][name], value) for name, value in weights.items())
    history, weights = first["stopped by rank 1"]
    assert history == first["gram"][0] and all(torch.equal(weights[name], value) for name, value in first["gram"][1].items())


def test_a_state_of_another_number_of_processes_is_refused(tmp_path):
    checkpoint = models.Checkpoint(tmp_path / "state.safetensors")
    one_run("clip", checkpoint=checkpoint)
    with safe_open(checkpoint.path, "pt") as file:
        kept = json.loads(file.metadata()["history"])
    kept["identity"] = kept["identity"].replace('"processes": 1', '"processes": 2')
    save_file(load_file(checkpoint.path), checkpoint.path, {"history": json.dumps(kept)})
    with pytest.raises(ValueError, match="expected the state of this very run, got that of another"):
        one_run("clip", checkpoint=checkpoint)
