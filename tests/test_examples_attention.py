"""The examples of masks and of dynamic masks run, and what they compare is what they say."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def run(name, folder, *arguments):
    finished = subprocess.run([sys.executable, ROOT / "examples" / f"{name}.py", *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def associative():
    return example("associative_recall")


@pytest.fixture(scope="module")
def reading():
    return example("masks_on_pictures")


def test_your_own_mask(tmp_path):
    assert "outputs and gradients are those of the dense matrix" in run("your_own_mask", tmp_path)


# -------------------------------------------------------------------------------------------------------------------------------------- associative recall


def test_a_stopped_recall_goes_on_to_what_an_undisturbed_one_gives(tmp_path, associative):
    said = run("associative_recall", tmp_path, "--quick", "--out", "whole.json")
    assert "| chosen less last |" in said
    run("associative_recall", tmp_path, "--quick", "--kinds", "window", "--out", "parts.json")
    assert "full, 0" in run("associative_recall", tmp_path, "--quick", "--out", "parts.json", "--resume")
    whole, parts = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "parts"))
    assert whole["runs"] == parts["runs"] and len(whole["runs"]) == 6
    assert associative.table(whole) in said and str(tmp_path) not in json.dumps(whole)


def test_training_goes_to_longer_sequences(associative):
    lengths = [list(associative.training_batch(step, associative.SETTINGS, torch.Generator().manual_seed(0)))[0].shape for step in (0, 1600, 2200, 2999)]
    assert lengths == [(96, 64), (45, 128), (24, 256), (12, 512)]


@pytest.mark.parametrize("task", [4, 64, "needle"])
def test_answers_of_recall_stand_behind_their_key(associative, task):
    tokens, answers = associative.sequences(task, 8, 512, torch.Generator().manual_seed(3))
    assert (answers >= 0).sum(1).tolist() == [1 if task == "needle" else task] * 8
    for row, place in (answers >= 0).nonzero().tolist():
        (first, *_), same = (tokens[row] == tokens[row, place]).nonzero()[:, 0].tolist(), int((tokens[row] == tokens[row, place]).sum())
        assert same == 2 and first + 1 < place and tokens[row, first + 1] == associative.KEYS + answers[row, place]
        assert place == 511 and first < 256 if task == "needle" else first < 2 * task


def test_a_dynamic_mask_begins_as_the_window(associative):
    models = {}
    for kind in ("window", "dynamic"):
        models[kind] = associative.Decoder(kind, associative.QUICK)
    missing, unexpected = models["dynamic"].load_state_dict(models["window"].state_dict(), strict=False)
    assert not unexpected and {name.partition("self_attn.")[2] for name in missing} == {"A", "dt_proj.weight"}
    tokens, _ = associative.sequences(8, 4, 64, torch.Generator().manual_seed(0))
    assert torch.allclose(models["dynamic"](tokens), models["window"](tokens), atol=1e-5)
    full = associative.Decoder("full", associative.QUICK)
    full.load_state_dict(models["window"].state_dict())
    assert not torch.allclose(full(tokens), models["window"](tokens), atol=1e-3)


# --------------------------------------------------------------------------------------------------------------------------------------- masks on pictures


def test_pictures_are_read_under_every_mask(tmp_path, reading):
    said = run("masks_on_pictures", tmp_path, "--quick", "--out", "first.json", "--rounds", 0)
    assert "| modality-mutual | 89 |" in said and "| NAAViT | 8 |" in said
    first = json.loads((tmp_path / "first.json").read_text())
    again = run("masks_on_pictures", tmp_path, "--quick", "--out", "first.json", "--resume")
    results = json.loads((tmp_path / "first.json").read_text())
    assert "full, 0: loss" not in again and results["runs"] == first["runs"]  # only times were added
    assert all(len(one["milliseconds"]) == 2 for one in results["costs"].values())
    assert reading.table(results) in again and str(tmp_path) not in json.dumps(results)


@pytest.mark.parametrize("kind", ["full", "image_prefix", "composite", "naavit", "modality_mutual"])
def test_no_mask_shows_a_word_that_is_still_to_come(reading, kind):
    torch.manual_seed(0)
    decoder = reading.Decoder(kind, 30, reading.QUICK)
    patches, words = torch.randn(1, 81, 48), torch.randint(30, (1, 8))
    with torch.no_grad():
        before, other = decoder(patches, words), words.clone()
        other[:, 4:] = (other[:, 4:] + 1) % 30
        assert torch.allclose(decoder(patches, other)[:, :4], before[:, :4], atol=1e-6)
        assert not torch.allclose(decoder(patches, other)[:, 4:], before[:, 4:], atol=1e-3)
        assert not torch.allclose(decoder(patches + 1, words)[:, 1:], before[:, 1:], atol=1e-3)  # the picture is seen


def test_flops_are_those_of_the_formula(reading):
    settings = reading.QUICK
    pictures = reading.Pictures()
    found = reading.costs(pictures, settings, 0)
    B, w, h, L, V, T = settings["batch"], settings["width"], settings["hidden"], settings["layers"], 81, 8
    around = 2 * B * (2 * V * 48 * w + 3 * T * w * len(pictures.words))  # the pixels need no gradient
    mlp, projection = 3 * w * h, w * w
    assert found["full"]["linear_flops"] == around + 6 * B * L * (V + T) * (4 * projection + mlp)
    assert found["composite"]["linear_flops"] == around + 6 * B * L * (T * (4 * projection + mlp) + V * (3 * projection + mlp)) - dead_ends(B, V, w, mlp, projection)
    assert found["naavit"]["linear_flops"] == around + 6 * B * L * (T * (4 * projection + mlp) + V * 4 * projection)
    for kind, pairs in {"full": 89 * 90 / 2, "composite": 8 * 9 / 2 + 7 * 81}.items():
        assert found[kind]["attention_flops"] == pytest.approx(7 * B * L * 2 * w * pairs)


def dead_ends(B, V, w, mlp, projection):
    """The visual tokens behind the last composite layer are seen by nobody, and get no gradient."""
    return 4 * B * V * (mlp + projection)
