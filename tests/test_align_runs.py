"""Runs of `modalign align` beyond the defaults: interrupted and killed runs, configuration files, fewer pairs, missing modalities, heads, losses; search by
pictures."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import miniature
from modalign import data, metrics, models, ops
from modalign.cli import app
from modalign.cli.align import tables
from modalign.cli.experiment import RunStore, run_experiment
from modalign.cli.report import joint_table, markdown_table
from modalign.cli.search import find
from modalign.cli.settings import AlignSettings, read_settings
from modalign.cli.summary import summary
from modalign.data.shards import encoder_code

REPOSITORY = Path(__file__).parent.parent
runner = CliRunner()


def made_up(items=120, missing=True, seed=0):
    """Three views of the same 6 hidden numbers; a third of the items has no touch."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(items, 6, generator=random)
    views = {}
    for name, width in (("sound", 20), ("text", 16), ("touch", 12)):
        noise = torch.randn(items, width - 6, generator=random)
        views[name] = torch.cat([2 * hidden, noise], 1) @ torch.randn(width, width, generator=random)
    present = {"touch": torch.rand(items, generator=random) > 1 / 3} if missing else None
    return data.from_features(views, present=present, names=[f"thing {i // 2}" for i in range(items)], name="made_up")


def write_folder(folder: Path, dataset) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, features in dataset.modalities.items():
        np.save(folder / f"{name}.npy", features.numpy())
    for name, mask in dataset.present.items():
        np.save(folder / f"{name}.present.npy", mask.numpy())
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in dataset.names))
    return folder


QUICK = AlignSettings(seeds=1, steps=12, batch=32)

# ------------------------------------------------------------------ interrupted and killed


def start(arguments, cwd):
    # A child of a shell in the background may ignore SIGINT; a terminal's child does not.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from modalign.cli import main; sys.argv = ['modalign', *sys.argv[1:]]; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "align", *arguments], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, child, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def everything_in(folder: Path) -> dict[str, bytes]:
    """Contents, less the place where the run was made, which the model remembers its data by."""
    place = str(folder.parent).encode()
    return {path.relative_to(folder).as_posix(): path.read_bytes().replace(place, b"HERE") for path in sorted(folder.rglob("*")) if path.is_file()}


ARGUMENTS = ["set", "--seeds", "2", "--steps", "200", "--batch", "64", "--pairs", "40,all"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_folder(folder / "set", made_up())
    whole = start([*ARGUMENTS, "--out", "out"], folder)
    assert whole.wait(timeout=300) == 0, whole.communicate()
    return everything_in(folder / "out")


@pytest.mark.parametrize(
    ("how", "when"),
    [
        (signal.SIGINT, "run.json"),
        (signal.SIGKILL, "*-trained-choose.safetensors"),
        (signal.SIGKILL, "all-0.json"),
    ],
    ids=["interrupt", "kill in a seed", "kill between seeds"],
)
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, uninterrupted, how, when):
    """The resumed run leaves what an uninterrupted one does, byte for byte."""
    write_folder(tmp_path / "set", made_up())
    child = start([*ARGUMENTS, "--out", "out"], tmp_path)
    progress = tmp_path / "out" / "progress"
    wait_for(lambda: any(progress.glob(when)), child)
    if how is signal.SIGINT:
        time.sleep(1)  # into the training; the state is written when the interrupt comes
    child.send_signal(how)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == (130 if how is signal.SIGINT else -signal.SIGKILL)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["progress"]  # no half of a result
    if how is signal.SIGINT:
        assert "interrupted, no file is half-written" in errors
    resumed = start([*ARGUMENTS, "--out", "out", "--resume"], tmp_path)
    assert resumed.wait(timeout=300) == 0, resumed.communicate()
    assert everything_in(tmp_path / "out") == uninterrupted


def test_resuming_takes_up_the_state_and_not_the_start(tmp_path, monkeypatch):
    """A finished training run is not repeated: the number of steps taken after the stop shows it."""
    dataset, taken = made_up(), []

    class Stop(Exception):
        pass

    def count(what, done, total, limit=None):
        taken.append(what)
        if limit and len(taken) == limit:
            raise Stop

    identity = {"settings": QUICK.as_dict()}
    with pytest.raises(Stop):
        store = RunStore(tmp_path / "p", identity, resume=False, seconds=0.0)  # the state of every step is written
        run_experiment(dataset, QUICK, progress=lambda *args: count(*args, limit=20), store=store)
    os.close(store.lock)  # as the end of the process would
    taken.clear()
    resumed = run_experiment(dataset, QUICK, progress=count, store=RunStore(tmp_path / "p", identity, resume=True, seconds=0.0))
    steps_after = len(taken)
    taken.clear()
    whole = run_experiment(dataset, QUICK, progress=count)
    assert steps_after < len(taken)
    assert resumed.results == whole.results
    for a, b in zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_resumed_is_named(tmp_path):
    first = RunStore(tmp_path / "p", {"settings": {"steps": 10}, "data": "x"})
    with pytest.raises(ValueError, match="p: is in use by another run"):
        RunStore(tmp_path / "p", {"settings": {"steps": 10}, "data": "x"}, resume=True)
    os.close(first.lock)
    with pytest.raises(ValueError, match="p: holds an unfinished run; go on with --resume, or throw it away with --restart"):
        RunStore(tmp_path / "p", {"settings": {"steps": 10}, "data": "x"})
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="q: expected the folder of an unfinished run or nothing, got something else"):
        RunStore(tmp_path / "q", {}, restart=True)
    with pytest.raises(ValueError, match=r"run.json: expected to go on with data = 'x', got 'y'; --restart throws the run away"):
        RunStore(tmp_path / "p", {"settings": {"steps": 10}, "data": "y"}, resume=True)
    model = models.GramAligner(models.GramAlignerConfig({"a": 4, "b": 3}, width=3))
    features = {"a": torch.randn(20, 4), "b": torch.randn(20, 3)}
    checkpoint = models.Checkpoint(tmp_path / "c.safetensors")
    plan = models.TrainingConfig(steps=4, batch=10)
    models.fit_aligner(model, features, torch.arange(20), plan, seed=0, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="c.safetensors: expected the state of this very run, got that of another"):
        models.fit_aligner(model, features, torch.arange(20), plan, seed=1, checkpoint=checkpoint)
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:100])
    with pytest.raises(ValueError, match="c.safetensors: expected a safetensors file, got one that does not parse"):
        models.fit_aligner(model, features, torch.arange(20), plan, seed=0, checkpoint=checkpoint)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"seed": 0', b"\xff\xfe", b"[1, 2]"])
@pytest.mark.parametrize("name", ["run.json", "all-0.json", "all-0-trained-choose.safetensors", "model/config.json"])
def test_a_damaged_file_of_an_unfinished_run_is_named_with_the_way_out(tmp_path, name, content):
    folder = tmp_path / "p"
    os.close(RunStore(folder, {"data": "x"}).lock)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{folder / Path(name).parts[0]}: expected .*, got .*; --restart throws the run away"):
        store = RunStore(folder, {"data": "x"}, resume=True)
        store.result("all-0")
        store.checkpoint("all-0-trained-choose")
        store.model()


# ------------------------------------------------------------------ settings


def test_a_configuration_file_and_flags_that_overrule_it(tmp_path):
    write_folder(tmp_path / "set", made_up())
    config = tmp_path / "run.toml"
    config.write_text(f'data = "{tmp_path / "set"}"\nseeds = 1\nsteps = 5\npairs = [40, "all"]\nloss = "clip"\nheads = "linear"\nmodalities = ["text", "sound"]\n')
    result = runner.invoke(app, ["align", "--config", str(config), "--steps", "6", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["steps"] == 6 and results["settings"]["loss"] == "clip" and results["settings"]["pairs"] == [40, "all"]
    assert list(results["dataset"]["modalities"]) == ["text", "sound"] and results["model"]["heads"] == "linear"
    assert "--steps 6" in results["command"] and "--pairs 40,all" in results["command"] and str(tmp_path) not in results["command"]
    again = runner.invoke(app, ["align", "--config", str(tmp_path / "out" / "config.toml"), "--out", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "again" / "results.json").read_text()) == results


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steps = ", "run.toml: expected TOML, got a file that does not parse"),
        ("stepz = 3", r"run.toml: expected keys among .*, got unknown \['stepz'\]"),
        ("steps = 0", "align: steps must be at least 1, got 0"),
        ("steps = 'many'", "align: steps must be int, got 'many'"),
        ("loss = 'triplet'", "align: loss must be one of gram, volume, clip, siglip, got 'triplet'"),
        ("heads = 'deep'", "align: heads must be one of linear, lowrank, mlp, got 'deep'"),
        ("pairs = [100, 100]", r"align: pairs must be different numbers or 'all', got \[100, 100\]"),
        ("pairs = ['most']", "align: pairs must be different numbers or 'all'"),
        ("device = 'abacus'", "align: device must be cpu or cuda, got 'abacus'"),
        ("pairs = 100", "align: pairs must be a list, got 100"),
        ("modalities = 'x,y'", "align: modalities must be a list, got 'x,y'"),
        ("threads = 'two'", "align: threads must be a positive number, got 'two'"),
        ("out = 5", "align: out must be a path, got 5"),
        ("temperature = inf", "align: temperature must be finite, got inf"),
        ("device = 'meta'", "align: device must be cpu or cuda, got 'meta'"),
        ("heads = 'linear'\nhidden = 9", "align: hidden must be 0 for linear heads, which have no branch, got 9"),
        ("loss = 'siglip'\ntemperature = 0.2", "align: temperature must be left alone with loss siglip, which does not use it, got 0.2"),
        ("loss = 'siglip'\nlearn_temperature = true", "align: learn_temperature must be left alone with loss siglip, which does not use it, got True"),
        ("nproc = 0", "align: nproc must be a positive number, got 0"),
        ("width = 1", "align: width must be at least 2, or 0 for the usual, got 1"),
    ],
)
def test_bad_settings(tmp_path, content, message):
    path = tmp_path / "run.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_settings(path, {})


def test_a_number_of_pairs_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"pairs must be in 8..90, the training items of 'made_up' with two modalities or more, got 500"):
        run_experiment(made_up(), AlignSettings(seeds=1, steps=2, pairs=(500,)))


def grouped(sizes, present=None, names=("a", "b", "c")):
    """Made-up items in groups of these sizes."""
    captions = [f"kind {number}" for number, size in enumerate(sizes) for _ in range(size)]
    return data.from_features({name: torch.randn(len(captions), 5) for name in names}, names=captions, present=present)


@pytest.mark.parametrize(
    ("dataset", "changes", "message"),
    [
        (lambda: grouped([60]), {}, "items must make a test part of whole groups, got 0 for it from 60 items in 1 groups, the largest of 60"),
        (lambda: grouped([5] * 12), {"pairs": (12,)}, "items must make a validation part of whole groups"),
        (lambda: grouped([1] * 60, {"c": torch.arange(60) < 2}), {}, r"modality 'c' must be had by at least 3 of the .* items to fit on \(seed"),
        (lambda: grouped([1] * 60, {"b": torch.arange(60) % 2 > 0, "a": torch.arange(60) % 2 < 1}, "ab"), {}, "must be had together by items of 2 different captions of the fit part"),
        (lambda: grouped([1] * 60), {"modalities": ("a",)}, "modalities must be at least 2, got \\['a'\\]"),
        (lambda: grouped([1] * 60), {"width": 6}, "width must not exceed the narrowest modality, got 6"),
        (lambda: grouped([1] * 60, names=("a", "keys")), {}, "modalities must not have a '.' in their names or one that torch keeps for itself, got 'keys'"),
        (lambda: data.from_features({"a": torch.ones(40, 3), "b": torch.randn(40, 3)}), {}, "modality 'a' must vary"),
    ],
)
def test_what_cannot_be_learnt_from_is_said_before_anything_runs(dataset, changes, message):
    with pytest.raises(ValueError, match=message):
        run_experiment(dataset(), AlignSettings(seeds=3, steps=2, **changes))


def test_a_wrong_setting_costs_no_unfinished_run(tmp_path):
    write_folder(tmp_path / "set", made_up())
    progress = tmp_path / "out" / "progress"
    progress.mkdir(parents=True)
    (progress / "run.json").write_text("{}")
    for flags in (["--pairs", "7"], ["--steps", "2"], ["--width", "99"]):
        result = runner.invoke(app, ["align", str(tmp_path / "set"), "--out", str(tmp_path / "out"), *flags])
        assert result.exit_code == 1 and "Traceback" not in result.output and (progress / "run.json").read_text() == "{}"
    restarted = ["align", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--steps", "2", "--seeds", "1", "--restart"]
    assert runner.invoke(app, restarted).exit_code == 0 and not progress.exists()


def test_a_renamed_folder_splits_alike(tmp_path):
    first, second = (data.load(write_folder(tmp_path / name, made_up())) for name in ("one", "two"))
    assert torch.equal(first.splits(0).test, second.splits(0).test) and first.digest() == second.digest()


def test_a_direction_without_test_items_in_some_seed_has_no_mean():
    dataset = grouped([1] * 60, {"c": torch.arange(60) < 9}, ("a", "b", "c"))
    experiment = run_experiment(dataset, AlignSettings(seeds=4, steps=2, batch=4))
    results = summary(experiment, "test")
    common = set.intersection(*(set(seed.items) for seed in experiment.seeds))
    assert set(results["rows"]["cca"]["directions"]) == common
    assert results["rows"]["cca"]["directions"]["a → b"]["items"] == [15] * 4


# ------------------------------------------------------------------ fewer pairs, missing modalities, heads and losses


def test_fewer_pairs_come_from_the_training_part_and_lie_in_one_another():
    emoji = data.load("emoji-mini")
    whole, small, smaller = emoji.splits(3), emoji.splits(3, 200), emoji.splits(3, 100)
    assert torch.equal(whole.test, small.test) and torch.equal(small.test, smaller.test)
    assert (len(small.train), len(small.validation), len(small.fit)) == (200, 50, 150)
    assert set(small.train.tolist()) <= set(whole.train.tolist())
    assert len(set(smaller.train.tolist()) & set(small.train.tolist())) >= 95
    assert not set(emoji.groups[small.fit].tolist()) & set(emoji.groups[small.validation].tolist())


def test_pairs_are_items_with_two_modalities():
    there = torch.arange(200) % 2 < 1
    dataset = grouped([2] * 100, {"b": there, "c": torch.arange(200) % 4 < 1})
    dataset = data.from_features(dataset.modalities, names=dataset.names, present=dataset.present | {"a": torch.arange(200) < 180})
    with_two = sum(dataset.present[name].int() for name in "abc") > 1
    split, whole = dataset.splits(1, 40), dataset.splits(1)
    assert len(split.train) == 40 and with_two[split.train].all() and set(split.train.tolist()) < set(whole.train.tolist())
    assert (len(split.validation), len(split.fit)) == (10, 30) and torch.equal(split.test, whole.test)
    count = int(with_two[whole.train].sum())
    assert count < len(whole.train) == 150
    with pytest.raises(ValueError, match=rf"pairs must be in 8..{count}, the training items of 'features' with two modalities or more, got 150"):
        dataset.splits(1, 150)
    experiment = run_experiment(dataset, AlignSettings(seeds=1, first_seed=1, steps=2, batch=16, pairs=(40, "all"), width=4))
    assert [experiment.results[pairs][0].train for pairs in (40, "all")] == [40, count]  # what the curve is drawn over


def test_choices_look_at_the_volume_of_items_that_have_all():
    model = models.GramAligner(models.GramAlignerConfig({name: 5 for name in "abc"}, width=4), seed=0).eval()
    features, groups = {name: torch.randn(40, 5) for name in "abc"}, torch.arange(40)
    present = {"c": torch.arange(40) < 25}
    plan = models.TrainingConfig(steps=1, batch=8)
    history = models.fit_aligner(model, features, groups, plan, seed=0, present=present, stop_after=0, validation=(features, groups, present))
    embedded = model.embed(features)
    found = []
    for names, items in ((("a", "b"), 40), (("a", "c"), 25), (("b", "c"), 25)):
        scores = embedded[names[0]][:items] @ embedded[names[1]][:items].T
        found += [metrics.retrieval(s) for s in (scores, scores.T)]
    a, b, c = (e[:25] for e in embedded.values())
    volume = ops.gram_volume(a, [b, c])
    found += [metrics.retrieval(v, larger_is_better=False) for v in (volume, volume.T)]
    assert history.evaluated[0] == pytest.approx(sum(f.r10 + 0.1 * f.r1 for f in found) / 8)
    nobody = present | {"b": torch.arange(40) >= 25}  # no item has all: pairs alone
    assert models.validation_score(embedded, groups, "a", nobody) == models.validation_score(embedded, groups, None, nobody) > 0


def test_more_pairs_help_and_every_figure_has_its_spread(tmp_path):
    result = runner.invoke(app, ["align", "emoji-mini", "--pairs", "100,all", "--seeds", "2", "--steps", "3", "--out", str(tmp_path)], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "results.json").read_text())
    few, many = results["curve"]
    assert (few["train"], many["train"]) == (100, 1349)
    assert few["rows"]["cca"]["mean_r10"] < 0.6 * many["rows"]["cca"]["mean_r10"]
    difference = results["rows"]["trained"]["difference"]
    by_seed = [a - b for a, b in zip(*(results["rows"][row]["mean_r10_by_seed"] for row in ("trained", "cca")), strict=True)]
    assert difference["mean"] == pytest.approx(sum(by_seed) / 2) and difference["std"] == pytest.approx(abs(by_seed[0] - by_seed[1]) / 2**0.5)
    assert difference["seeds"] == 2
    printed = result.output.partition("wrote ")[0]
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 81  # 80 columns (and a newline of the progress bar) hold every figure
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Mean R@10 by number of training pairs" in page and page.count("±") > 50 and "ΔR@10" in page
    assert "What is confused" in page and "rank of the right one" in page
    for text in (result.output, page, results["dataset"]["basis"]):  # which fewer pairs alone would not have given
        assert "basis fitted on all training items of seed 0" in " ".join(text.split())
    assert not re.search(r"(src|href)=['\"](?!data:)", page)


def test_one_seed_has_no_spread(tmp_path):
    experiment = run_experiment(made_up(missing=False), QUICK)
    results = summary(experiment, "test")
    headings, lines = joint_table(results)
    assert headings == ["row", "query", "volume", "ΔR@10", "sum of cosines", "ΔR@10", "text alone", "touch alone"]
    assert len(lines) == 12 and not any("±" in cell for line in lines for cell in line)
    figures = results["rows"]["trained"]["directions"]["sound → others, joint (volume)"]
    line = next(line for line in lines if line[:2] == ["trained", "sound → others"])
    assert line[3] == f"{100 * figures['r10_difference']['mean']:+.1f}"
    assert all(line[3] == line[5] == "–" for line in lines if line[0] in ("CCA", "chance"))


def test_with_and_without_the_structure_regularizer(tmp_path):
    """Two rows more, the others as they were; more of the neighbourhoods is left; modalities that items lack are left out."""
    dataset = made_up(300)
    settings = AlignSettings(seeds=1, steps=40, batch=64, heads="linear")
    plain, both = run_experiment(dataset, settings), run_experiment(dataset, replace(settings, structure=10.0, structure_temperature=0.2))
    assert list(both.seeds[0].table)[-2:] == ["structure", "structure_random"] and "structure" not in plain.seeds[0].table
    assert all(both.seeds[0].table[row] == table for row, table in plain.seeds[0].table.items())
    losses = both.seeds[0].histories["structure"].loss, both.seeds[0].histories["trained"].loss
    assert losses[0][0] == losses[1][0] and losses[0][2] > losses[1][2]  # none in the first step

    def moved(structure):
        """How far neighbourhoods of the modality that some items lack are from those of its features, after 60 steps from random heads."""
        model = models.GramAligner(models.GramAlignerConfig({name: x.shape[1] for name, x in dataset.modalities.items()}, width=12, hidden=0), seed=0)
        config = models.TrainingConfig(steps=60, batch=128, learning_rate=1e-2, affine_rate=1.0, structure=structure, structure_temperature=0.2)
        models.fit_aligner(model, dataset.modalities, dataset.groups, config, seed=0, present=dataset.present)
        rows = dataset.present["touch"]
        return float(ops.structure_loss(dataset.modalities["touch"][rows], model.embed(dataset.modalities)["touch"][rows], temperature=0.2))

    assert moved(10.0) < 0.8 * moved(0.0)
    results = summary(both, "test")
    assert {"structure", "structure_random"} <= set(results["rows"]) and results["training"]["structure"]["structure"] == 10
    assert "with STRUCTURE" in markdown_table(results) and "structure" not in summary(plain, "test")["rows"]
    for settings, message in (
        (dict(structure=-1.0), "structure must not be negative and structure_temperature positive, got -1.0 and 0.05"),
        (dict(structure_temperature=0.1), "structure_temperature must be left alone without structure"),
    ):
        with pytest.raises(ValueError, match=message):
            AlignSettings(**settings)
    with pytest.raises(ValueError, match="TrainingConfig: structure must be 0 or more and structure_temperature positive, got -1 and 0.05"):
        models.TrainingConfig(structure=-1)


def test_missing_modalities_are_learnt_from_where_they_are():
    dataset = made_up(300)
    assert 90 < int((~dataset.present["touch"]).sum()) < 110
    experiment = run_experiment(dataset, AlignSettings(seeds=1, steps=40, batch=64))
    table = experiment.seeds[0].table
    assert table["cca"]["sound → touch"].r10 > 0.5
    assert table["trained"]["sound → touch"].r10 > 0.5
    # chance knows that fewer items have the modality
    assert table["chance"]["sound → touch"].r10 > table["chance"]["sound → text"].r10


def test_what_absent_rows_hold_reaches_nothing():
    dataset = made_up()
    absent = ~dataset.present["touch"]
    other = {name: x.clone() for name, x in dataset.modalities.items()}
    other["touch"][absent] = 1e6
    changed = data.PairedDataset(**{**vars(dataset), "modalities": other})
    first, second = (run_experiment(d, QUICK) for d in (dataset, changed))
    assert first.seeds[0].table == second.seeds[0].table and first.seeds[0].histories == second.seeds[0].histories
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_mask_without_gaps_changes_no_pair(monkeypatch):
    config = models.GramAlignerConfig({"a": 5, "b": 4}, width=4, hidden=0, dropout=0.0, loss="clip")
    model, batch = models.GramAligner(config), {"a": torch.randn(9, 5), "b": torch.randn(9, 4)}
    everything = {"b": torch.ones(9, dtype=torch.bool)}
    assert torch.equal(model(batch, present=everything).loss, model(batch).loss)
    some = torch.tensor([True] * 5 + [False] * 4)
    assert torch.allclose(model(batch, present={"b": some}).loss, model({n: x[:5] for n, x in batch.items()}).loss)
    only_one = torch.zeros(9, dtype=torch.bool).index_fill(0, torch.tensor([3]), True)
    assert model(batch, present={"b": only_one}).loss is None  # no pair, no loss
    with pytest.raises(ValueError, match=r"present must map modalities to bool \[9\], got torch.bool \[5\] for 'b'"):
        model(batch, present={"b": some[:5]})


def test_the_volume_of_an_item_is_that_of_the_vectors_it_has():
    config = models.GramAlignerConfig({"a": 5, "b": 4, "c": 3}, width=4, hidden=0, dropout=0.0, label_smoothing=0.0, loss="volume", temperature=0.3)
    model = models.GramAligner(config).eval()
    batch = {"a": torch.randn(6, 5), "b": torch.randn(6, 4), "c": torch.randn(6, 3)}
    present = {"b": torch.tensor([1, 1, 0, 1, 1, 0]).bool(), "c": torch.tensor([1, 0, 1, 1, 1, 0]).bool()}
    output = model(batch, present=present)
    e, items = output.embeddings, [0, 1, 2, 3, 4]  # the last has the anchor alone

    def volume(i, j):
        vectors = torch.stack([e["a"][i]] + [e[n][j] for n in "bc" if present[n][j]])
        return torch.linalg.det(vectors @ vectors.T).clamp_min(0).sqrt()

    logits = -torch.stack([torch.stack([volume(i, j) for j in items]) for i in items]) / 0.3
    target = torch.arange(5)
    expected = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_cca_over_pairs_that_are_there():
    features = {"a": torch.randn(60, 6), "b": torch.randn(60, 5), "c": torch.randn(60, 4)}
    config = models.CanonicalCorrelationConfig(width=4)
    whole = models.CanonicalCorrelation.fit(features, config)
    masked = models.CanonicalCorrelation.fit(features, config, present={"c": torch.ones(60, dtype=torch.bool)})
    assert torch.equal(whole.correlation, masked.correlation)
    # two modalities, one of them missing in the last 20: as if those items were not there, but for the covariance of the other
    mask = torch.arange(60) < 40
    pair = {"a": features["a"], "b": torch.where(mask[:, None], features["b"], torch.nan)}
    some = models.CanonicalCorrelation.fit(pair, config, present={"b": mask})
    assert all(torch.isfinite(x).all() for x in (*some.weight.values(), *some.bias.values()))
    with pytest.raises(ValueError, match=r"present\['b'\] must hold at least 2 items, got 1"):
        models.CanonicalCorrelation.fit(pair, config, present={"b": torch.arange(60) < 1})


@pytest.mark.parametrize("heads", ["linear", "lowrank", "mlp"])
@pytest.mark.parametrize("loss", ["gram", "volume", "clip", "siglip"])
def test_every_head_learns_under_every_loss(heads, loss):
    config = models.GramAlignerConfig({"a": 20, "b": 20}, width=16, heads=heads, hidden=0 if heads == "lowrank" else 16, dropout=0.0, loss=loss)
    model, batch = models.GramAligner(config), {name: torch.randn(12, 20) for name in "ab"}
    before = model(batch).loss.item()
    plan = models.TrainingConfig(steps=80, batch=12, learning_rate=1e-2, affine_rate=1.0)
    history = models.fit_aligner(model, batch, torch.arange(12), plan, seed=0)
    assert history.loss[-1] < 0.7 * before
    model(batch).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    saved = models.GramAlignerConfig(**{**vars(config)})
    assert saved == config


def test_a_gate_that_starts_shut_warns_and_stays_shut():
    with pytest.warns(UserWarning, match="gate = 0 shuts the low-rank branch for ever"):
        config = models.GramAlignerConfig({"a": 6, "b": 5}, width=4, heads="lowrank", hidden=0, gate=0.0, dropout=0.0)
    model = models.GramAligner(config)
    model({"a": torch.randn(8, 6), "b": torch.randn(8, 5)}).loss.backward()
    head = model.heads["a"]
    assert head.branch_in.weight.shape == (8, 6)  # the published rank: at least 8, else a quarter of the width
    assert not head.branch_out.weight.grad.any() and not head.branch_in.weight.grad.any()
    assert torch.allclose(head.linear.weight @ head.linear.weight.T, torch.eye(4), atol=1e-5) and head.linear.bias is None


def test_early_stop():
    model = models.GramAligner(models.GramAlignerConfig({"a": 6, "b": 6}, width=4))
    features = {name: torch.randn(40, 6) for name in "ab"}  # nothing to learn, so validation soon stops rising
    plan = models.TrainingConfig(steps=400, batch=20, patience=3)
    history = models.fit_aligner(model, features, torch.arange(40), plan, seed=0, validation=(features, torch.arange(40)))
    longest = max(history.evaluated)
    assert longest < 400 and longest == history.best_step + 30


def test_wide_features_are_reduced_on_training_items_and_the_saved_model_takes_raw_ones(tmp_path):
    dataset = made_up(missing=True)
    experiment = run_experiment(dataset, AlignSettings(seeds=1, steps=6, batch=32, reduce=10))
    config = experiment.model.config
    assert config.components == {"sound": 10, "text": 10, "touch": 10} and config.modalities == {"sound": 20, "text": 16, "touch": 12}
    split = dataset.splits(0)
    reduction = models.PrincipalComponents.fit(dataset.modalities["text"][split.train], 10)
    assert torch.equal(reduction.components, experiment.model.heads["text"].projection)
    experiment.model.save_pretrained(tmp_path)
    again = models.GramAligner.from_pretrained(tmp_path)
    raw = dataset.features(split.test)
    for name, embedding in experiment.model.embed(raw).items():
        assert torch.equal(again.embed(raw)[name], embedding)
    # the same model before the reduction was built in
    inner = models.GramAligner(models.GramAlignerConfig({"text": 10, "sound": 10}, width=4, hidden=0))
    outer = inner.on_raw_features({"text": reduction}).eval()
    assert torch.allclose(inner.eval().embed({"text": reduction(raw["text"])})["text"], outer.embed({"text": raw["text"]})["text"], atol=1e-5)


# ------------------------------------------------------------------ search


@pytest.fixture(scope="module")
def emoji_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "emoji-mini"
    result = runner.invoke(app, ["align", "emoji-mini", "--seeds", "1", "--steps", "10", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


def test_search_by_a_picture_and_by_a_picture_with_words(emoji_run, tmp_path):
    emoji = data.load("emoji-mini")
    apple = emoji.names.index("red apple")
    picture = tmp_path / "apple.png"
    emoji.picture(apple).save(picture)
    alone = runner.invoke(app, ["search", str(emoji_run), "--picture", str(picture), "--target", "picture", "--top", "3", "--out", str(tmp_path / "a.png")])
    assert alone.exit_code == 0, alone.output
    assert "red apple" in alone.output.splitlines()[5] and "cosine" in alone.output
    both = runner.invoke(app, ["search", str(emoji_run), "green", "--picture", str(picture), "--top", "3", "--out", str(tmp_path / "b.png")])
    assert both.exit_code == 0, both.output
    assert "green apple" in both.output and "volume" in both.output
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_two_modalities_are_ranked_by_volume(emoji_run):
    emoji, model = data.load("emoji-mini"), models.GramAligner.from_pretrained(emoji_run / "model")
    query = {name: emoji.modalities[name][10:11] for name in ("text", "picture")}
    items, scores = find(model, emoji, query, 5, "picture")
    e = model.embed(emoji.modalities)
    vectors = torch.stack([torch.stack([e["picture"][item], e["text"][10], e["picture"][10]]) for item in items]).double()
    expected = torch.linalg.det(vectors @ vectors.mT).clamp_min(0).sqrt()
    assert scores == sorted(scores) and torch.allclose(torch.tensor(scores).double(), expected, atol=1e-3)
    assert items[0] == 10 and scores[0] < 1e-3


def test_what_a_search_is_for_where_no_modality_is_called_picture(emoji_run):
    """Another encoder's pictures are shown too, also for words and a picture together."""
    emoji, model = data.load("emoji-mini"), models.GramAligner.from_pretrained(emoji_run / "model")
    renamed = models.GramAligner(replace(model.config, modalities={"text": 256, "picture_vit": 256}, anchor="text"), seed=0).eval()
    dataset = replace(emoji, modalities={"text": emoji.modalities["text"], "picture_vit": emoji.modalities["picture"]}, default=())
    query = {name: dataset.modalities[name][10:11] for name in ("text", "picture_vit")}
    assert find(renamed, dataset, query, 5) == find(renamed, dataset, query, 5, "picture_vit")
    alone = {"picture_vit": query["picture_vit"]}
    assert find(renamed, dataset, alone, 5) == find(renamed, dataset, alone, 5, "text")
    words = models.GramAligner(models.GramAlignerConfig({"text": 256, "text_fr": 256}, width=8), seed=0).eval()
    both = {name: query["text"] for name in ("text", "text_fr")}
    with pytest.raises(ValueError, match="find: target must be given where the query has all modalities, got a query of"):
        find(words, dataset, both, 5)


def test_the_table_of_pairs_fits_into_80_columns(emoji_run):
    results = json.loads((emoji_run / "results.json").read_text())
    (point,) = results["curve"]
    for row in point["rows"].values():  # deviations with two digits before the point
        row["mean_r10_by_seed"] = [0.1, 0.6, 0.9]
    results["curve"] = [point, point]
    console = Console(width=80, record=True, file=io.StringIO())
    for table in tables(results):
        console.print(table)
    shown = console.export_text()
    assert shown.count("mean R@10 by number of training pairs") == 2 and "trained − CCA" in " ".join(shown.split()) and "…" not in shown


def test_search_passes_over_items_without_the_target():
    dataset = made_up()
    experiment = run_experiment(dataset, QUICK)
    items, _ = find(experiment.model, dataset, {"text": dataset.modalities["text"][:1]}, 120, "touch")
    assert set(items) == set(dataset.present["touch"].nonzero()[:, 0].tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--picture", "nowhere.png"], "nowhere.png: expected a picture, got"),
        (["--picture", __file__], "test_align_runs.py: expected a picture, got"),
        (["cat", "--target", "smell"], r"query and target must be modalities of model and data set out of ['picture', 'text'], got ['smell']"),
    ],
)
def test_search_refuses(emoji_run, arguments, message):
    result = runner.invoke(app, ["search", str(emoji_run), *arguments])
    assert result.exit_code == 1 and message in result.output.replace("\n", "") and "Traceback" not in result.output


def test_a_place_that_cannot_be_written_is_refused_before_the_encoders_run(emoji_run, tmp_path, monkeypatch):
    def encoded(*arguments):
        raise AssertionError("encoded")

    monkeypatch.setattr(data.PairedDataset, "encode", encoded)
    shutil.copytree(emoji_run / "model", tmp_path / "model")
    (tmp_path / "model/search.png").mkdir()
    for arguments, message in (
        ([emoji_run, "--out", f"{__file__}/sheet.png"], f"--out must be a place to write to, got {__file__}/sheet.png: Not a directory"),
        ([tmp_path / "model"], f"--out must be a file, got {tmp_path / 'model/search.png'}"),
    ):
        result = runner.invoke(app, ["search", *map(str, arguments), "cat"])
        assert result.exit_code == 1 and f"modalign search: {message}" in result.output
    with pytest.raises(AssertionError, match="encoded"):
        runner.invoke(app, ["search", str(emoji_run), "cat", "--out", str(tmp_path / "new/sheet.png")], catch_exceptions=False)
    assert not (tmp_path / "new").exists()


def described_folder(folder: Path, encoder: str = "miniature:ToyTextEncoder") -> Path:
    """A feature folder whose texts come from a known encoder."""
    names = [f"a {colour} {thing}" for thing in ("card", "bead", "leaf", "kite") for colour in ("red", "green", "blue", "gold", "black", "navy")]
    dataset = data.from_features({"text": miniature.ToyTextEncoder()(names), "sound": torch.randn(24, 8)}, names=names)
    write_folder(folder, dataset)
    about = {"format": 2, "name": folder.name, "modalities": {"text": {"encoder": encoder}}, "items": [{"name": name} for name in names]}
    (folder / "items.json").write_text(json.dumps(about))
    return folder


def trained_on(source, folder, *options) -> Path:
    result = runner.invoke(app, ["align", str(source), "--seeds", "1", "--steps", "2", "--out", str(folder), *options])
    assert result.exit_code == 0, result.output
    return folder


def searched(model, *options):
    result = runner.invoke(app, ["search", str(model), "a", "red", "card", *options], env={"COLUMNS": "300"})
    assert "Traceback" not in result.output
    return result


def test_search_finds_the_data_from_elsewhere(tmp_path, monkeypatch):
    described_folder(tmp_path / "sets" / "cards")
    monkeypatch.chdir(tmp_path / "sets")
    by_path = trained_on("cards", tmp_path / "by_path")
    monkeypatch.chdir(tmp_path)
    by_name = trained_on("cards", tmp_path / "by_name", "--data-root", "sets")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for model in (by_path, by_path / "model", by_name, by_name / "model"):
        result = searched(model)
        assert result.exit_code == 0 and "among 24 items of cards" in result.output and "have changed" not in result.output
    for run in (by_path, by_name):  # what is meant to be passed on does not tell where it was made
        for file in ("results.json", "report.html", "config.toml"):
            assert str(tmp_path) not in (run / file).read_text(encoding="utf-8")
    (tmp_path / "sets").rename(tmp_path / "moved")
    for run, lost in ((by_path, f"'{tmp_path / 'sets' / 'cards'}'"), (by_name, f"'cards' below {tmp_path / 'sets'}")):
        refused, expected = searched(run), f"the data of MODEL must be where they were, got no {lost}; say where they are now with --data"
        assert refused.exit_code == 1 and expected in refused.output
    assert searched(by_path, "--data", str(tmp_path / "moved" / "cards")).exit_code == 0
    assert searched(by_name, "--data-root", str(tmp_path / "moved")).exit_code == 0


def test_search_compares_the_data_with_those_that_the_model_was_trained_on(tmp_path):
    folder = described_folder(tmp_path / "cards")
    model = trained_on(folder, tmp_path / "run")
    sound = np.load(folder / "sound.npy")
    np.save(folder / "sound.npy", sound + 1)
    changed = searched(model)
    assert changed.exit_code == 0 and "the data of cards are not those that the model was trained on" in changed.output
    assert "have changed" not in searched(model, "--data", str(folder)).output  # asked for by name
    np.save(folder / "sound.npy", sound)
    described_folder(folder, "miniature:OtherTextEncoder")
    for whose, options in (("the data of MODEL", []), ("--data", ["--data", str(folder)])):
        other = searched(model, *options)
        expected = "text features of encoder 'miniature:ToyTextEncoder', as MODEL was trained on, got those of 'miniature:OtherTextEncoder' in cards"
        assert other.exit_code == 1 and f"modalign search: {whose} must have {expected}" in other.output
    described_folder(folder)
    np.save(folder / "sound.npy", sound[:, 1:])
    for whose, options in (("the data of MODEL", []), ("--data", ["--data", str(folder)])):
        other = searched(model, *options)
        expected = "sound features of 8 columns, as MODEL was trained on, got 7 columns in cards"
        assert other.exit_code == 1 and f"modalign search: {whose} must have {expected}" in other.output


def test_search_tells_features_of_other_code_of_the_same_encoder(tmp_path):
    """Also where the data are named by --data, and their own encoder is as it was when it made them."""

    def described(folder, code):
        about = json.loads((described_folder(folder) / "items.json").read_text())
        about["modalities"]["text"]["encoder_code"] = code
        (folder / "items.json").write_text(json.dumps(about))
        return folder

    now = encoder_code(miniature.ToyTextEncoder)
    model = trained_on(described(tmp_path / "cards", "0" * 64), tmp_path / "run")
    other, told = described(tmp_path / "other", now), "the text features of {} were made by other code of encoder 'miniature:ToyTextEncoder'"
    assert told.format("other") in searched(model, "--data", str(other)).output
    assert told.format("cards") not in searched(model).output
    again = trained_on(other, tmp_path / "again")
    assert told.format("other") not in searched(again).output and told.format("cards") in searched(again, "--data", str(tmp_path / "cards")).output


def test_captions_with_brackets_are_shown_as_they_are(tmp_path):
    folder = described_folder(tmp_path / "cards [2]")
    (folder / "items.json").write_text((folder / "items.json").read_text().replace("a red", "a [red]"))
    model = trained_on(folder, tmp_path / "run [1]")
    result = searched(model)
    assert result.exit_code == 0 and "a [red] card" in result.output and "24 items of cards [2]" in result.output


def test_example_with_your_own_features(tmp_path):
    finished = subprocess.run([sys.executable, REPOSITORY / "examples/align_your_features.py"], cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "'touch': 264" in finished.stdout and (tmp_path / "my_aligner" / "model.safetensors").is_file()


def test_going_on_and_starting_anew_are_not_asked_for_together(tmp_path):
    result = CliRunner().invoke(app, ["align", "emoji-mini", "--resume", "--restart", "--out", str(tmp_path / "run")])
    assert result.exit_code == 1 and "modalign align: resume and restart must not be given together" in result.output
    assert not (tmp_path / "run").exists()
