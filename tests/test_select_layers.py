"""Layers of two encoders: every pair scored, the largest chosen, lists searched once."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from modalign import data, metrics
from modalign.cli import app
from modalign.compat.platonic import AlignmentMetrics
from modalign.testing import Maker


def encoders(n=120, seed=1):
    """Four layers and three; the third and the second share most."""
    make = Maker(torch.float32, seed=seed)
    shared = make.randn(n, 12)
    source = [make.randn(n, 10) + weight * shared @ make.randn(12, 10) for weight in (0.0, 0.2, 2.0, 0.5)]
    aligned = [make.randn(n, 8 + layer) + weight * shared @ make.randn(12, 8 + layer) for layer, weight in enumerate((0.1, 2.0, 0.3))]
    return source, aligned


@pytest.mark.parametrize("metric", ["mutual_knn", "cka", "cknna", "lcs_knn"])
def test_scores_are_those_of_pairs(metric):
    source, aligned = encoders()
    found = metrics.select_layers(source, aligned, metric=metric, k=6)
    expected = torch.tensor([[float(metrics.alignment_score(metric, a, b, 6)) for b in aligned] for a in source])
    torch.testing.assert_close(found.scores.float(), expected)
    assert found.pair == divmod(int(expected.argmax()), 3) and (found.pair == (2, 1) or metric == "cka")
    assert found.samples == 120 and found.k == (None if metric == "cka" else 6)


def test_searches_once_for_each_layer(monkeypatch):
    searches = []
    plain = metrics.select_layers.__globals__["neighbor_lists"]
    monkeypatch.setitem(metrics.select_layers.__globals__, "neighbor_lists", lambda *given, **options: searches.append(1) or plain(*given, **options))
    source, aligned = encoders()
    metrics.select_layers(source, aligned, k="rice", permutations=3)
    assert len(searches) == 7


def test_ties_samples_and_layers_left_out():
    source, _ = encoders()
    same = metrics.select_layers([source[0]] * 3, [source[0]] * 2, k=5)
    assert same.pair == (2, 1) and (same.scores == 1).all()
    stacks = metrics.select_layers(torch.stack(source, 1), torch.stack(source, 1), k=5)
    assert (stacks.scores.argmax(1) == torch.arange(4)).all()
    drawn = metrics.select_layers(source, source, k=5, samples=50, seed=3)
    assert drawn.samples == 50 and torch.equal(drawn.scores, metrics.select_layers(source, source, k=5, samples=50, seed=3).scores)
    assert not torch.equal(drawn.scores, metrics.select_layers(source, source, k=5, samples=50, seed=4).scores)
    out = metrics.select_layers(*encoders(), k=6, exclude=[(2, None), (-1, 1)])
    assert out.pair[0] in (0, 1, 3) and out.pair != (3, 1) and not out.considered[2].any() and out.scores[2].isfinite().all()


@pytest.mark.parametrize("aggregate", ["max", "mean"])
def test_calibration_of_the_best_pair(aggregate):
    source, aligned = encoders()
    found = metrics.select_layers(source, aligned, k=6, permutations=40, aggregate=aggregate)
    assert found.calibration.p_value == 1 / 41 and found.calibration.calibrated > 0.02
    noise = [Maker(torch.float32, seed=s).randn(120, 6) for s in range(5)]
    assert metrics.select_layers(noise[:2], noise[2:], k=6, permutations=40, aggregate=aggregate).calibration.calibrated < 0.01
    slow = metrics.select_layers(source, aligned, metric="cka", permutations=5, aggregate=aggregate)
    assert slow.calibration.p_value == 1 / 6


def test_pairs_of_an_ablation_and_a_picture(tmp_path):
    found = metrics.select_layers(*encoders(), k=6)
    pairs = found.quantile_pairs(4)
    assert list(pairs) == ["bin 1", "bin 2", "bin 3", "bin 4", "best", "worst", "last"] and pairs == found.quantile_pairs(4)
    scores = [float(found.scores[pairs[f"bin {n}"]]) for n in (1, 2, 3, 4)]
    assert scores == sorted(scores) and pairs["last"] == (3, 2) and found.scores[pairs["worst"]] == found.scores.min()
    with pytest.raises(ValueError, match="quantile_pairs: bins must be at most the number of pairs, 12, got 13"):
        found.quantile_pairs(13)
    found.plot(tmp_path / "layers.svg", "pictures", "texts")
    assert "pictures" in (tmp_path / "layers.svg").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(metric="l2"), "select_layers: metric must be one of mutual_knn"),
        (dict(aggregate="sum"), 'select_layers: aggregate must be "max" or "mean"'),
        (dict(source_layers=torch.ones(5, 3)), r"select_layers: source_layers must be a tensor \[n, L, D\]"),
        (dict(aligned_layers=[]), r"select_layers: aligned_layers must be a tensor \[n, L, D\] or a sequence of tensors \[n, D\], one or more"),
        (dict(aligned_layers=[torch.ones(9, 3)]), r"select_layers: layers must all have the same n items, got \[9, 120\]"),
        (dict(samples=1), "select_layers: samples must be None or a whole number of 2 or more"),
        (dict(k=120), "select_layers: k must be from 1 to n - 1 = 119, got 120"),
        (dict(exclude=[(None, None)]), "select_layers: exclude must leave a pair, got none left of 12"),
        (dict(exclude=[(4, 0)]), r"select_layers: exclude must name layers below \[4, 3\]"),
        (dict(exclude=[3]), "select_layers: exclude must hold pairs of a layer or None, got 3"),
        (dict(permutations=-1), "select_layers: permutations must be a whole number of 1 or more"),
    ],
)
def test_refused(change, message):
    source, aligned = encoders()
    given = dict(source_layers=source, aligned_layers=aligned, k=6) | change
    with pytest.raises(ValueError, match=message):
        metrics.select_layers(given.pop("source_layers"), given.pop("aligned_layers"), **given)


def test_the_names_of_the_released_metrics():
    x, y = encoders()[0][2], encoders()[1][1]
    for name, expected in (
        ("mutual_knn", metrics.mutual_knn(x, y, 5, normalize=False)),
        ("cycle_knn", metrics.cycle_knn(x, y, 5, normalize=False)),
        ("lcs_knn", metrics.lcs_knn(x, y, 5, normalize=False)),
        ("edit_distance_knn", metrics.edit_distance_knn(x, y, 5, normalize=False)),
        ("cknna", metrics.cknna(x, y, 5, normalize=False)),
    ):
        assert AlignmentMetrics.measure(name, x, y, topk=5) == float(expected)
    assert AlignmentMetrics.measure("cka", x, y) == float(metrics.cka(x, y))
    assert AlignmentMetrics.cka(x, y, unbiased=True) == AlignmentMetrics.unbiased_cka(x, y) == float(metrics.unbiased_cka(x, y))
    assert AlignmentMetrics.cka(x, y, kernel_metric="rbf", rbf_sigma=2.0) == float(metrics.cka_rbf(x, y, 2.0))
    assert AlignmentMetrics.svcca(x, y, 4) == float(metrics.svcca(x, y, 4))
    assert AlignmentMetrics.cknna(x, y) == float(metrics.cknna(x, y, 119, normalize=False))
    with pytest.raises(ValueError, match="AlignmentMetrics.measure: metric must be one of"):
        AlignmentMetrics.measure("rsa", x, y)
    with pytest.raises(ValueError, match='AlignmentMetrics.cka: kernel_metric must be "ip" or "rbf"'):
        AlignmentMetrics.cka(x, y, kernel_metric="linear")


# ----------------------------------------------------------------------------------------------------------------------------------- command line


def folder_with_layers(path, n=60):
    """A data set whose pictures have three layers and whose texts two; the second of both share most, and some items have no text."""
    make = Maker(torch.float32, seed=2)
    shared = make.randn(n, 6)
    pictures = torch.stack([make.randn(n, 10) + weight * shared @ make.randn(6, 10) for weight in (0.0, 3.0, 0.5)], 1)
    texts = torch.stack([make.randn(n, 8) + weight * shared @ make.randn(6, 8) for weight in (0.2, 3.0)], 1)
    path.mkdir()
    for name, layers in (("picture", pictures), ("text", texts)):
        np.save(path / f"{name}.npy", layers[:, -1].numpy())
        save_file({"layers": layers.half()}, path / f"{name}.layers.safetensors")
    np.save(path / "text.present.npy", np.arange(n) % 10 != 3)
    return path, pictures, texts


def test_layers_from_the_command_line(tmp_path):
    path, pictures, texts = folder_with_layers(tmp_path / "set")
    files = ["--out", str(tmp_path / "map.svg"), "--json", str(tmp_path / "found.json")]
    result = CliRunner().invoke(app, ["layers", str(path), "--k", "5", "--permutations", "9", *files], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "most alike: layer 2 of 3 of picture and layer 2 of 2 of text" in result.output and "p = 0.1000" in result.output
    found = json.loads((tmp_path / "found.json").read_text())
    split = data.load(path).splits(0)
    items = split.train[split.train % 10 != 3]
    expected = metrics.select_layers(pictures[items].half().float(), texts[items].half().float(), k=5)
    assert found["scores"] == expected.scores.tolist() and found["pair"] == [1, 1] and found["samples"] == len(items)
    assert "<svg" in (tmp_path / "map.svg").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modalities", "picture"], "modalities must be two different ones with layers, got picture; "),
        (["--modalities", "picture,sound"], "modalities must be among those with layers, got 'sound'; "),
        (["--k", "all"], "k must be a whole number or one of rice, sqrt, sturges, got 'all'"),
        (["--metric", "l2"], "metric must be one of mutual_knn"),
        (["--out", "map.png"], "--out must end in .svg, got map.png"),
    ],
)
def test_layers_refused_on_the_command_line(options, message, tmp_path):
    path, _, _ = folder_with_layers(tmp_path / "set")
    result = CliRunner().invoke(app, ["layers", str(path), *options], env={"COLUMNS": "200"})
    assert result.exit_code != 0 and message in " ".join(result.output.split()), result.output
