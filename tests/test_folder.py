"""A folder of feature files as a data set: what is read, and a message with file, expected and found for everything that cannot be."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modalign import data
from modalign.data import storage

N = 20


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "sound.npy", np.random.default_rng(0).standard_normal((N, 6)))
    save_file({"features": torch.randn(N, 4), "present": torch.arange(N) % 4 > 0}, tmp_path / "text.safetensors")
    return tmp_path


def test_what_is_read(folder):
    (folder / "names.txt").write_text("".join(f"thing {i // 2}\n" for i in range(N)), encoding="utf-8")
    found = data.load(folder)
    assert {name: (x.dtype, list(x.shape)) for name, x in found.modalities.items()} == {
        "sound": (torch.float32, [N, 6]),
        "text": (torch.float32, [N, 4]),
    }
    assert list(found.present) == ["text"] and int(found.present["text"].sum()) == 15
    assert not found.modalities["text"][~found.present["text"]].any()  # absent rows are zeros, whatever the file holds
    assert len(found.groups.unique()) == 10 and found.names[3] == "thing 1"
    split = found.splits(0)
    statistics = found.statistics(split.train)
    there = split.train[found.present["text"][split.train]]
    assert torch.allclose(statistics.mean["text"], found.modalities["text"][there].mean(0))
    assert found.digest() == data.from_folder(str(folder)).digest() != data.load("emoji-mini").digest()


def test_items_tokens_layers_and_pictures(folder):
    about = {
        "format": 2,
        "name": "things",
        "licence": "CC0-1.0",
        "test_size": 6,
        "validation_size": 3,
        "default": ["text", "sound"],
        "modalities": {"text": {"encoder": "all-MiniLM-L6-v2"}},
        "items": [{"name": f"thing {i}", "group": f"kind {i // 5}", "keywords": ["small"]} for i in range(N)],
    }
    (folder / "items.json").write_text(json.dumps(about))
    offsets = torch.arange(N + 1) * 3
    save_file({"tokens": torch.randn(3 * N, 5).half(), "offsets": offsets}, folder / "text.tokens.safetensors")
    save_file({"layers": torch.randn(N, 2, 7)}, folder / "text.layers.safetensors")
    save_file({"pictures": torch.full((N, 8, 8, 3), 7, dtype=torch.uint8)}, folder / "pictures.safetensors")
    storage.write_checksums(folder)
    found = data.load(folder)
    assert (found.name, found.licence, found.test_size, found.default) == ("things", "CC0-1.0", 6, ("text", "sound"))
    assert found.encoders == {"text": "all-MiniLM-L6-v2"} and found.keywords[0] == ["small"] and len(found.groups.unique()) == 4
    assert list(found.modalities) == ["text", "sound"]  # as items.json has them, then by name
    tokens, starts = found.tokens("text")
    assert tokens.shape == (3 * N, 5) and torch.equal(starts, offsets) and found.layers("text").shape == (N, 2, 7)
    assert found.picture(3).size == (8, 8) and found.picture(3).getpixel((0, 0)) == (7, 7, 7)
    with pytest.raises(ValueError, match=r"sound.tokens.safetensors: expected the tokens of modality 'sound', got no such file; there are tokens for \['text'\]"):
        found.tokens("sound")
    damaged = folder / "text.tokens.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ValueError, match=r"text.tokens.safetensors: expected SHA-256 \w+, got \w+"):
        data.load(folder).tokens("text")
    with pytest.raises(ValueError, match="'emoji_mini' keeps pooled features only"):
        data.load("emoji-mini").tokens("text")


def test_a_root_of_data_sets(folder, tmp_path_factory, monkeypatch):
    (folder / "items.json").write_text(json.dumps({"format": 2, "items": [{"name": f"thing {i}"} for i in range(N)]}))
    assert len(data.load(folder.name.replace("_", "-") if "-" not in folder.name else folder.name, folder.parent)) == N
    monkeypatch.setenv("MODALIGN_DATA_ROOT", str(folder.parent))
    assert len(data.load(folder.name)) == N and folder.name in data.available() and "emoji_mini" in data.available()


def items(folder, **changes):
    (folder / "items.json").write_text(json.dumps({"format": 2, "items": [{"name": "a"}] * N} | changes))


def break_(folder, what):
    """Write what a test wants to be refused."""
    rows = np.zeros((N, 6), dtype=np.float32)
    match what:
        case "one file":
            (folder / "text.safetensors").unlink()
        case "pickled files":
            (folder / "text.safetensors").unlink(), (folder / "sound.npy").unlink()
            torch.save(torch.ones(3), folder / "text.pt")
        case "archive beside":
            np.savez(folder / "touch.npz", rows)
        case "mask of nothing":
            np.save(folder / "touch.present.npy", np.ones(N, dtype=bool))
        case "other suffix":
            (folder / "touch.NPY").write_bytes((folder / "sound.npy").read_bytes())
        case "mask not listed":
            storage.write_checksums(folder)
            np.save(folder / "sound.present.npy", np.ones(N, dtype=bool))
        case "empty caption":
            (folder / "names.txt").write_text("one\n\n" + "more\n" * (N - 2))
        case "long doubles":
            np.save(folder / "sound.npy", rows.astype(np.longdouble))
        case "size as text":
            items(folder, test_size="5")
        case "modalities as list":
            items(folder, modalities=["sound"])
        case "default as text":
            items(folder, default="sound")
        case "group as number":
            items(folder, items=[{"name": "a", "group": 3}] * N)
        case "other width":
            items(folder, modalities={"sound": {"width": 9}})
        case "code as number":
            items(folder, modalities={"sound": {"encoder": "mine:Ear", "encoder_code": 5}})
        case "pickled npy":
            np.save(folder / "sound.npy", np.array([{}] * N, dtype=object), allow_pickle=True)
        case "pickle under another name":
            (folder / "sound.npy").write_bytes(pickle.dumps(rows))
        case "truncated npy":
            (folder / "sound.npy").write_bytes((folder / "sound.npy").read_bytes()[:300])
        case "empty npy":
            (folder / "sound.npy").write_bytes(b"")
        case "text npy":
            np.save(folder / "sound.npy", np.array(["a"] * N))
        case "integers":
            np.save(folder / "sound.npy", rows.astype(np.int64))
        case "vector":
            np.save(folder / "sound.npy", rows[:, 0])
        case "no columns":
            np.save(folder / "sound.npy", rows[:, :0])
        case "NaN":
            rows[3, 2] = np.nan
            np.save(folder / "sound.npy", rows)
        case "too large":
            np.save(folder / "sound.npy", np.full((N, 6), 1e300))
        case "rows differ":
            np.save(folder / "sound.npy", rows[:-1])
        case "truncated safetensors":
            (folder / "text.safetensors").write_bytes((folder / "text.safetensors").read_bytes()[:40])
        case "no features":
            save_file({"weights": torch.ones(N, 3)}, folder / "text.safetensors")
        case "mask of numbers":
            save_file({"features": torch.ones(N, 3), "present": torch.ones(N)}, folder / "text.safetensors")
        case "mask too short":
            np.save(folder / "sound.present.npy", np.ones(N - 1, dtype=bool))
        case "mask twice":
            np.save(folder / "text.present.npy", np.ones(N, dtype=bool))
        case "nothing present":
            np.save(folder / "sound.present.npy", np.zeros(N, dtype=bool))
        case "two files of one name":
            save_file({"features": torch.ones(N, 3)}, folder / "sound.safetensors")
        case "odd name":
            np.save(folder / "4d.npy", rows)
        case "names too few":
            (folder / "names.txt").write_text("one\ntwo\n")
        case "names not text":
            (folder / "names.txt").write_bytes(b"\xff\xfe\xfa" * N)
        case "items not JSON":
            (folder / "items.json").write_text("{")
        case "items of the future":
            (folder / "items.json").write_text(json.dumps({"format": 9, "items": []}))
        case "items without names":
            (folder / "items.json").write_text(json.dumps({"format": 2, "items": [{}] * N}))
        case "items too few":
            (folder / "items.json").write_text(json.dumps({"format": 2, "items": [{"name": "a"}]}))
        case "unknown default":
            (folder / "items.json").write_text(json.dumps({"format": 2, "default": ["smell"], "items": [{"name": "a"}] * N}))
        case "checksum":
            storage.write_checksums(folder)
            np.save(folder / "sound.npy", rows)
        case "file not listed":
            storage.write_checksums(folder)
            np.save(folder / "touch.npy", rows)
        case "broken list":
            (folder / "SHA256SUMS").write_text("what is this\n")
        case "pictures of another size":
            save_file({"pictures": torch.zeros(3, 8, 8, 3, dtype=torch.uint8)}, folder / "pictures.safetensors")
        case "pictures of another name":
            save_file({"photos": torch.zeros(N, 8, 8, 3, dtype=torch.uint8)}, folder / "pictures.safetensors")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("one file", r"expected at least 2 files NAME.npy or NAME.safetensors, got \['sound'\]; save one matrix per modality"),
        ("pickled files", "text.pt: expected .npy or .safetensors files alone, got one that is pickled"),
        ("archive beside", "touch.npz: expected .npy or .safetensors files alone, got one that is a zip of arrays"),
        ("mask of nothing", "touch.present.npy: expected NAME.npy, NAME.safetensors, or NAME.present.npy"),
        ("other suffix", "touch.NPY: expected NAME.npy, NAME.safetensors, or NAME.present.npy"),
        ("mask not listed", "SHA256SUMS: expected a line for sound.present.npy, got none"),
        ("empty caption", "names.txt: expected a caption in every line, got none in 1 lines, first in line 2"),
        ("long doubles", "sound.npy: expected a .npy file of numbers, got"),
        ("size as text", "items.json: expected 'test_size' to be a whole number, got '5'"),
        ("modalities as list", "items.json: expected 'modalities' to be an object of objects"),
        ("default as text", "items.json: expected 'default' to be a list of modality names, got 'sound'"),
        ("group as number", "items.json: expected 'group' of item 0 to be text, got 3"),
        ("other width", "items.json: expected 'width' of 'sound' to be 6 as in its file, got 9"),
        ("code as number", "items.json: expected 'encoder_code' of 'sound' to be text, got 5"),
        ("pickled npy", "sound.npy: expected a .npy file of numbers, got one that does not read"),
        ("pickle under another name", "sound.npy: expected a .npy file of numbers, got one that does not read"),
        ("truncated npy", "sound.npy: expected a .npy file of numbers, got one that does not read"),
        ("empty npy", "sound.npy: expected a .npy file of numbers, got one that does not read"),
        ("text npy", "sound.npy: expected a .npy file of numbers, got <U1"),
        ("integers", r"sound.npy: expected a floating-point matrix \[N, D\], got int64 \[20, 6\]"),
        ("vector", r"sound.npy: expected a floating-point matrix \[N, D\], got float32 \[20\]"),
        ("no columns", r"sound.npy: expected a floating-point matrix \[N, D\], got float32 \[20, 0\]"),
        ("NaN", "sound.npy: expected finite float32 numbers, got NaN or Inf in 1 of 20 rows, first in row 3"),
        ("too large", "sound.npy: expected finite float32 numbers, got NaN or Inf in 20 of 20 rows, first in row 0"),
        ("rows differ", "text.safetensors: expected 19 rows as in sound.npy, got 20"),
        ("truncated safetensors", "text.safetensors: expected a safetensors file, got one that does not parse"),
        ("no features", r"text.safetensors: expected a tensor 'features' and perhaps 'present', got \['weights'\]"),
        ("mask of numbers", r"text.safetensors, tensor 'present': expected bool \[20\], got float32 \[20\]"),
        ("mask too short", r"sound.present.npy: expected bool \[20\], got bool \[19\]"),
        ("mask twice", "text.present.npy: expected a mask inside text.safetensors"),
        ("nothing present", "sound.npy: expected at least one item that has this modality, got none"),
        ("two files of one name", "expected one file for modality 'sound', got sound.npy and sound.safetensors"),
        ("odd name", "4d.npy: expected a file name of letters, digits, _ and - that starts with a letter, got '4d'"),
        ("names too few", "names.txt: expected 20 items as there are rows, got 2"),
        ("names not text", "names.txt: expected UTF-8 text, got a file that does not decode"),
        ("items not JSON", "items.json: expected JSON, got a file that does not parse"),
        ("items of the future", "items.json: expected format 2, got 9; a newer modalign may have written it"),
        ("items without names", "items.json: expected 'items', a list of objects with a 'name'"),
        ("items too few", "items.json: expected 20 items as there are rows, got 1"),
        ("unknown default", r"items.json: expected 'default' to name files of this folder \['sound', 'text'\], got \['smell'\]"),
        ("checksum", r"sound.npy: expected SHA-256 \w+, got \w+"),
        ("file not listed", "SHA256SUMS: expected a line for touch.npy, got none"),
        ("broken list", "SHA256SUMS: expected lines 'SHA-256  name', got 'what is this' in line 1"),
        ("pictures of another size", r"pictures.safetensors: expected 'pictures' uint8 \[20, side, side, 3\], got U8 \[3, 8, 8, 3\]"),
        ("pictures of another name", "pictures.safetensors: expected a safetensors file with a tensor 'pictures', got one without"),
    ],
)
def test_what_cannot_be_read_is_named(folder, what, message):
    break_(folder, what)
    with pytest.raises(ValueError, match=message):
        data.from_folder(folder)


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("text.tokens", {"tokens": torch.ones(4, 2)}, r"expected tensors 'tokens' and 'offsets', got \['tokens'\]"),
        ("text.tokens", {"tokens": torch.ones(4), "offsets": torch.zeros(N + 1, dtype=torch.int64)}, r"expected floating-point 'tokens' \[T, D\], got float32 \[4\]"),
        ("text.tokens", {"tokens": torch.ones(4, 2), "offsets": torch.zeros(3, dtype=torch.int64)}, r"rising from 0 to 4, got int64 \[3\]"),
        ("text.tokens", {"tokens": torch.ones(4, 2), "offsets": torch.full((N + 1,), 4)}, "rising from 0 to 4, got others"),
        ("text.tokens", {"tokens": torch.full((N, 2), torch.nan), "offsets": torch.arange(N + 1)}, "expected finite numbers, got 40 that are NaN or Inf"),
        ("text.layers", {"layers": torch.ones(N, 2)}, r"expected floating-point 'layers' \[20, L, D\], got float32 \[20, 2\]"),
        ("text.layers", {"other": torch.ones(N, 2, 3)}, r"expected floating-point 'layers' \[20, L, D\], got none"),
    ],
)
def test_tokens_and_layers_that_do_not_fit(folder, name, tensors, message):
    save_file(tensors, folder / f"{name}.safetensors")
    with pytest.raises(ValueError, match=message):
        getattr(data.from_folder(folder), name.split(".")[1])("text")


def test_a_damaged_array_is_named_whatever_its_reader_raises(folder):
    """Every byte of the header turned, and the file cut at every length: one message, or an array that is refused for what it holds."""
    path = next(folder.glob("*.npy"))
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    damaged = [whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :] for i in range(header) for bit in (1, 4, 0x20, 0x80)]
    refused = 0
    for content in [*damaged, *(whole[:length] for length in range(0, len(whole), 7))]:
        path.write_bytes(content)
        try:
            data.load(folder)
        except ValueError as error:
            assert path.name in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > len(damaged) / 2


def test_too_few_items_and_what_is_no_folder(tmp_path):
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.ones((5, 3)))
    with pytest.raises(ValueError, match="expected at least 12 items to be split, got 5"):
        data.from_folder(tmp_path)
    with pytest.raises(ValueError, match="nowhere: expected a folder of feature files, got nothing of that name"):
        data.from_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="a.npy: expected a folder of feature files, got a file"):
        data.from_folder(tmp_path / "a.npy")


def test_masks_given_in_python():
    features = {"a": torch.randn(N, 3), "b": torch.full((N, 2), torch.nan)}
    present = {"b": torch.zeros(N, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"present\['b'\] must hold at least one item, got none"):
        data.from_features(features, present=present)
    with pytest.raises(ValueError, match=r"present must name modalities out of \['a', 'b'\], got \['c'\]"):
        data.from_features(features, present={"c": present["b"]})
    with pytest.raises(ValueError, match=r"present\['b'\] must be bool \[20\], got torch.float32 \[20\]"):
        data.from_features(features, present={"b": torch.ones(N)})
    features["b"][:5] = 1.0
    found = data.from_features(features, present={"b": torch.arange(N) < 5})
    assert torch.isfinite(found.modalities["b"]).all() and int(found.present["b"].sum()) == 5


def test_selecting_modalities():
    furniture = data.load("furniture-mini")
    assert list(furniture.select(["points", "text"]).modalities) == ["points", "text"]
    for names in (["points", "points"], ["sound"], []):
        with pytest.raises(ValueError, match="PairedDataset.select: names must be different ones out of"):
            furniture.select(names)
