"""`modalign encode`: a feature folder of people's own pictures and captions, with any encoder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import miniature
from modalign import data
from modalign._files import read_tensors
from modalign.cli import app
from modalign.data import encode, encoders, shards
from modalign.data.storage import sha256

runner = CliRunner()
REPOSITORY = Path(__file__).parent.parent
COLOURS = ("red", "green", "blue", "gold", "black", "navy", "teal", "plum", "peru", "pink", "grey", "lime", "cyan", "tan")


# Encoders that a person might write by mistake, where "module:Class" can reach them.


class OneRow(miniature.ToyPictureEncoder):
    def __call__(self, pictures):
        return super().__call__(pictures)[:1]


class Leaving:
    def __call__(self, pictures):
        sys.exit("no licence")


class LeavingAtOnce:
    def __init__(self):
        sys.exit(3)


class Integers(miniature.ToyPictureEncoder):
    def __call__(self, pictures):
        return super().__call__(pictures).long()


class NotFinite(miniature.ToyPictureEncoder):
    def __call__(self, pictures):
        return super().__call__(pictures) / 0


class NotFiniteInFloat32(miniature.ToyPictureEncoder):
    def __call__(self, pictures):
        return super().__call__(pictures).double() + 1e300


class NoWidth(miniature.ToyPictureEncoder):
    def __call__(self, pictures):
        return super().__call__(pictures)[:, :0]


class AList(miniature.ToyPictureEncoder):
    def __call__(self, pictures):
        return super().__call__(pictures).tolist()


class ChangingWidth(miniature.ToyPictureEncoder):
    def __init__(self):
        self.width = 10

    def __call__(self, pictures):
        self.width += 1
        return super().__call__(pictures)[:, : self.width]


class Silent:
    pass


class WithSettings(miniature.ToyPictureEncoder):
    def __init__(self, size):
        self.size = size


class Failing(miniature.ToyPictureEncoder):
    def __call__(self, pictures):
        return pictures[0].no_such_thing


class FailingTokens(miniature.ToyPictureEncoder):
    encode = property()

    def __call__(self, pictures):
        return torch.zeros(len(pictures), 3)

    def tokens(self, pictures):
        raise KeyError("tokens")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = ["file,caption,group,caption_fr"]
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (30, 20 + number), colour).save(folder / f"{number}.png")
        caption = "" if number == 3 else f"a {colour} card"
        lines.append(f"{number}.png,{caption},g{number // 2},{'' if number > 5 else f'une carte {colour}'}")
    (tmp_path / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


def run(tmp_path, *options, encoder="miniature:ToyPictureEncoder"):
    command = ["encode", str(tmp_path / "photos"), "--captions", str(tmp_path / "captions.csv"), "--out", str(tmp_path / "out")]
    return runner.invoke(app, [*command, "--encoder", encoder, "--text-encoder", "miniature:ToyTextEncoder", *options], env={"COLUMNS": "300"})


def test_a_folder_of_pictures_becomes_a_data_set(pictures, tmp_path):
    result = run(tmp_path, "--tokens")
    assert result.exit_code == 0, result.output
    assert "1 of 14 items have an empty caption: their text is marked as missing" in result.output
    loaded = data.load(tmp_path / "out")
    assert len(loaded) == 14 and loaded.names[0] == "a red card" and loaded.names[3] == "3.png"
    assert set(loaded.modalities) == {"picture", "text", "text_fr"}
    assert read_tensors(tmp_path / "out/text.safetensors")["present"].logical_not().nonzero().flatten().tolist() == [3]
    assert read_tensors(tmp_path / "out/text_fr.safetensors")["present"].sum() == 6
    direct = miniature.ToyPictureEncoder()([Image.open(pictures / f"{number}.png") for number in range(14)])
    assert torch.equal(read_tensors(tmp_path / "out/picture.safetensors")["features"], direct)
    assert len(read_tensors(tmp_path / "out/picture.tokens.safetensors")["tokens"]) == 14 * 8
    about = json.loads((tmp_path / "out/items.json").read_text())
    toy, code = "miniature:ToyPictureEncoder", sha256(miniature.__file__)
    assert about["modalities"]["picture"] == {"encoder": toy, "encoder_code": code, "width": 24, "tokens_encoder": toy}
    assert [item["group"] for item in about["items"][:3]] == ["g0", "g0", "g1"]
    assert "already encoded" in run(tmp_path, "--tokens").output
    Image.new("RGB", (30, 20), "white").save(pictures / "0.png")
    assert "wrote" in run(tmp_path, "--tokens").output  # a picture has changed


def test_an_interrupted_run_is_taken_up(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 4)
    encoded = []
    call = miniature.ToyPictureEncoder.__call__

    def interrupted(self, batch):
        encoded.append(len(batch))
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return call(self, batch)

    monkeypatch.setattr(miniature.ToyPictureEncoder, "__call__", interrupted)
    result = run(tmp_path)
    assert result.exit_code == 130 and "continue by the same command" in result.output
    assert run(tmp_path).exit_code == 0
    assert encoded == [4, 4, 4, 4, 2]
    features = read_tensors(tmp_path / "out/picture.safetensors")["features"]
    assert torch.equal(features, call(miniature.ToyPictureEncoder(), [Image.open(pictures / f"{number}.png") for number in range(14)]))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("file,caption", "name,caption", "expected a first line with the columns file, caption and perhaps group, caption_LANG"),
        ("caption_fr", "author", "with the columns file, caption and perhaps group, caption_LANG"),
        ("2.png", "two.png", "captions.csv, row 4: expected a file in"),
        ("2.png", "../captions.csv", "expected a path below the folder of pictures"),
        ("2.png", "../photos/2.png", "got '../photos/2.png', an absolute path or one with '..'"),
        ("2.png", "/etc/hosts", "got '/etc/hosts', an absolute path or one with '..'"),
        ("2.png", "out.png", "got 'out.png', a link out of it"),
        ("2.png", "./1.png", "captions.csv, row 4: expected each file once, got './1.png', which is in row 3 as well"),
        ("caption_fr", "caption_é", "caption_LANG (LANG: a letter, then letters a to z, digits and _), each once, got file,caption,group,"),
        ("group,caption_fr", "caption_FR,caption_fr", "expected one column for each language, got 2 that make text_fr"),
        ("2.png", "1.png", "captions.csv, row 4: expected each file once, got '1.png', which is in row 3 as well"),
        ("a blue card", "a blue, card", "captions.csv, row 4: expected 4 fields, got 5"),
        ("a blue card", '"a blue card', "expected a CSV file in UTF-8, got one that does not read"),
    ],
)
def test_captions_that_do_not_fit(pictures, tmp_path, old, new, expected):
    path = tmp_path / "captions.csv"
    path.write_text(path.read_text().replace(old, new, 1))
    (tmp_path / "elsewhere.png").write_bytes(miniature.png("red"))
    (pictures / "out.png").symlink_to(tmp_path / "elsewhere.png")
    result = run(tmp_path)
    assert result.exit_code == 1 and expected in result.output and not (tmp_path / "out").exists()


def test_captions_that_do_not_read(pictures, tmp_path):
    path = tmp_path / "captions.csv"
    path.write_bytes(path.read_bytes() + b"\xff\xfe")
    assert f"{path}: expected a CSV file in UTF-8" in run(tmp_path).output
    path.write_text("file,caption\n")
    assert "expected at least one row below the first line, got none" in run(tmp_path).output
    path.write_text("file,caption\n0.png,\n")
    assert "expected at least one caption, got 1 empty ones" in run(tmp_path).output
    path.unlink()
    assert f"{path}: expected a CSV file, got one that does not open" in run(tmp_path).output
    assert (
        "photos2: expected a folder of pictures, got nothing of that name"
        in runner.invoke(app, ["encode", str(tmp_path / "photos2"), "--captions", "c.csv", "--out", "o"], env={"COLUMNS": "300"}).output
    )


@pytest.mark.parametrize("content", [b"", b"no picture", miniature.png("red")[:45]])
def test_broken_pictures_are_named_before_the_work_begins(pictures, tmp_path, content):
    (pictures / "9.png").write_bytes(content)
    result = run(tmp_path)
    assert result.exit_code == 1 and f"{pictures / '9.png'}: expected a picture, got one that does not read" in result.output
    assert not (tmp_path / "out").exists()


def test_a_picture_broken_further_down(pictures, tmp_path):
    path = pictures / "9.jpg"
    Image.effect_noise((200, 200), 90).save(path)
    path.write_bytes(path.read_bytes()[:6000])
    (tmp_path / "captions.csv").write_text("file,caption\n9.jpg,noise\n")
    result = run(tmp_path)
    assert result.exit_code == 1 and f"{path}: expected a picture, got one that does not read" in result.output
    assert not (tmp_path / "out/items.json").exists()


@pytest.mark.parametrize(
    ("encoder", "expected"),
    [
        ("OneRow", "output must be a floating-point tensor [14, D], got float32 [1, 24]"),
        ("Integers", "output must be a floating-point tensor [14, D], got int64 [14, 24]"),
        ("AList", "output must be a floating-point tensor [14, D], got list"),
        ("NotFinite", "output must be finite, got"),
        ("NotFiniteInFloat32", "output must be finite, got 336 numbers that are NaN or Inf in float32"),
        ("NoWidth", "output must be [14, D] with D at least 1, got [14, 0]"),
        ("Silent", "must be callable with a list of inputs, got an object of Silent that is not"),
        ("WithSettings", "'test_encode:WithSettings' must be made without arguments, got TypeError: "),
        ("Failing", "encoder 'test_encode:Failing': must take a list of inputs, got AttributeError: 'Image' object has no attribute 'no_such_"),
        ("Leaving", "encoder 'test_encode:Leaving': must take a list of inputs, got SystemExit: no licence (test_encode.py, line "),
        ("LeavingAtOnce", "'test_encode:LeavingAtOnce' must be made without arguments, got SystemExit: 3 (test_encode.py, line "),
        ("Missing", "'Missing' must be in module 'test_encode', got"),
    ],
)
def test_encoders_that_do_not_do(pictures, tmp_path, encoder, expected):
    result = run(tmp_path, encoder=f"test_encode:{encoder}")
    assert result.exit_code == 1 and expected in result.output and result.output.count("\n") <= 2  # one line under the progress bar


def test_encoders_that_are_for_something_else(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    miniature.write(tmp_path / "half_written.py", "class Encoder:\n    def __call__(self\n")
    miniature.write(tmp_path / "needing_more.py", "import a_package_that_is_not_there\n")
    for encoder, expected in (
        ("half_written:Encoder", "the module of 'half_written:Encoder' must be importable, got SyntaxError: "),
        ("needing_more:Encoder", "the module of 'needing_more:Encoder' must be importable, got ModuleNotFoundError: No module named 'a_package"),
        ("torch.nn:Linear", "'torch.nn:Linear' must be made without arguments, got TypeError: "),
        ("miniature:ToyTextEncoder", "encoder 'miniature:ToyTextEncoder': must take a list of inputs, got AttributeError: "),
        ("torch.nn:ReLU", "encoder 'torch.nn:ReLU': must take a list of inputs, got TypeError: "),
    ):
        result = run(tmp_path, encoder=encoder)
        assert result.exit_code == 1 and expected in result.output and result.output.count("\n") <= 2
    tokens = run(tmp_path, "--tokens", encoder="test_encode:FailingTokens")
    assert "encoder 'test_encode:FailingTokens': must take a list of inputs, got KeyError: 'tokens' (test_encode.py, line" in tokens.output


def test_an_encoder_of_changing_width(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BATCH", 7)
    assert "output must have one width, got 11 and then 12" in run(tmp_path, encoder="test_encode:ChangingWidth").output


def test_tokens_are_checked():
    class Encoder(miniature.ToyTextEncoder):
        encode = property()  # not the way in

        def __call__(self, texts):
            return torch.zeros(len(texts), 3)

        def tokens(self, texts):
            return self.made

    for made, expected in (
        ([torch.zeros(2, 3)], "tokens must be a list of 2 tensors [T, D], got 1 of them"),
        (torch.zeros(2, 2, 3), "tokens must be a list of 2 tensors [T, D], got Tensor"),
        ([torch.zeros(2, 3), torch.zeros(3)], "output must be a floating-point tensor [T, D] for each input's tokens, got float32 [3]"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], "tokens must have one width, got [3, 4]"),
        ([torch.zeros(2, 3), torch.full((2, 3), torch.inf)], "output must be finite, got 6 numbers"),
    ):
        encoder = Encoder()
        encoder.made = made
        with pytest.raises(ValueError) as caught:
            shards.run_encoder("mine", encoder, ["a", "b"], tokens=True, layers=False)
        assert expected in str(caught.value)
    with pytest.raises(ValueError, match="expected numbers within ±65504"):
        shards.halves("tokens", torch.tensor([7e4]))


def test_tokens_of_an_encoder_without_any(pictures, tmp_path, monkeypatch):
    monkeypatch.delattr(miniature.ToyPictureEncoder, "tokens")
    assert "must have a method tokens(inputs) for --tokens, got 'miniature:ToyPictureEncoder' without one" in run(tmp_path, "--tokens").output


def test_the_folder_of_somebody_else_is_left_alone(pictures, tmp_path):
    other = miniature.write(tmp_path / "out/thesis.tex", "chapter 1")
    assert "got one with other files" in run(tmp_path).output and other.read_text() == "chapter 1"


def test_files_that_it_did_not_write_stay(pictures, tmp_path):
    assert run(tmp_path).exit_code == 0
    notes, matrix = miniature.write(tmp_path / "out/notes.txt", "mine"), miniature.write(tmp_path / "out/audio.safetensors", "mine")
    (tmp_path / "captions.csv").write_text((tmp_path / "captions.csv").read_text().replace(",caption_fr", ",caption_de"))
    for _ in range(2):
        result = run(tmp_path, "--force")
        assert result.exit_code == 0 and "left alone, since this command did not write them: audio.safetensors, notes.txt" in result.output
        assert notes.read_text() == matrix.read_text() == "mine"
        assert not (tmp_path / "out/text_fr.safetensors").exists() and (tmp_path / "out/text_de.safetensors").exists()
    theirs = miniature.write(tmp_path / "out/text_fr.safetensors", "mine")
    (tmp_path / "captions.csv").write_text((tmp_path / "captions.csv").read_text().replace(",caption_de", ",caption_fr"))
    assert f"{theirs}: expected no file of this name but our own, got one that is not in SHA256SUMS" in run(tmp_path).output
    assert theirs.read_text() == "mine" and shards.prepared(tmp_path / "out")


def test_a_run_killed_while_it_writes_knows_its_files(pictures, tmp_path, monkeypatch):
    unlink = Path.unlink

    def killed(path, *rest, **options):
        if path.name == "own.json":  # the last of the swap
            raise KeyboardInterrupt
        return unlink(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        assert run(tmp_path).exit_code == 130 and (tmp_path / "out/text_fr.safetensors").exists()
    (tmp_path / "captions.csv").write_text((tmp_path / "captions.csv").read_text().replace(",caption_fr", ",caption_de"))
    result = run(tmp_path)
    assert result.exit_code == 0 and "left alone" not in result.output and not (tmp_path / "out/text_fr.safetensors").exists()


def test_a_run_that_is_killed_or_finds_the_disk_full_loses_nothing(pictures, tmp_path, monkeypatch):
    """At every file that it writes, moves or removes: what was there is there still, or is refused until the same command has made the folder whole."""
    assert run(tmp_path).exit_code == 0
    out = tmp_path / "out"
    whole = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    stops, kept, refused = 0, 0, 0
    while True:
        left = stops

        def stopping(act, place, kill):
            def acted(path, *rest, **options):
                nonlocal left
                if out in Path(place(path, *rest)).parents:
                    if left == 0:
                        raise KeyboardInterrupt if kill else OSError(errno.ENOSPC, "No space left on device", str(path))
                    left -= 1
                return act(path, *rest, **options)

            return acted

        with monkeypatch.context() as patch:
            for name in ("write_tensors", "write_json", "write_checksums"):
                patch.setattr(shards, name, stopping(getattr(shards, name), lambda path, *rest: path / "x" if path.is_dir() else path, stops % 2))
            patch.setattr(os, "replace", stopping(os.replace, lambda path, to: to if Path(to).parent == out else "/", True))
            patch.setattr(Path, "unlink", stopping(Path.unlink, lambda path, *rest: path if path.parent == out or path.name == "own.json" else "/", True))
            result = run(tmp_path, "--force")
        if result.exit_code == 0:
            break
        if result.exit_code == 1:
            assert "expected room for more, got a full disk" in result.output and "what is done is kept: make room, run the same command" in result.output
        if (out / ".cache/own.json").exists():
            refused += 1
            with pytest.raises(ValueError, match="expected a finished folder, got one whose writing was interrupted; run the same command again"):
                data.load(out if stops % 2 else "out", tmp_path)  # by path and by name
        else:
            kept += 1
            assert len(data.load(out)) == len(COLOURS) and {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == whole
        assert run(tmp_path).exit_code == 0 and len(data.load(out)) == len(COLOURS)
        stops += 1
    assert kept >= 5 and refused >= 8
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == whole


@pytest.mark.parametrize("option", ["--force", "--tokens"])
def test_a_run_killed_at_a_removal_is_taken_up(option, pictures, tmp_path, monkeypatch):
    """At each file that it removes, and with its cache half removed: the first command makes a whole folder again, though its settings may be others."""
    out, kills = tmp_path / "out", 0
    unlink, rmtree = Path.unlink, shutil.rmtree
    assert run(tmp_path).exit_code == 0
    while True:
        left = kills

        def killed_unlink(path, *rest, **options):
            nonlocal left
            if out in (path.parent, path.parent.parent):
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1
            return unlink(path, *rest, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", killed_unlink)
            result = run(tmp_path, option)
        assert run(tmp_path).exit_code == 0 and len(data.load(out)) == len(COLOURS)
        if result.exit_code == 0:
            break
        assert result.exit_code == 130
        kills += 1
    assert kills >= 4

    def half_removed(path, *rest, **options):
        if Path(path) == out / ".cache":
            for part in [part for part in Path(path).iterdir() if part.is_dir()]:
                rmtree(part)
            raise KeyboardInterrupt
        rmtree(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half_removed)
        assert run(tmp_path, option).exit_code == 130
    assert len(data.load(out)) == len(COLOURS)  # it was whole before
    assert run(tmp_path).exit_code == 0 and len(data.load(out)) == len(COLOURS)


def test_own_encoders_run_without_a_graph():
    seen = []

    class Learns(torch.nn.Linear):
        def forward(self, inputs):
            seen.append(torch.is_grad_enabled())
            return super().forward(torch.ones(len(inputs), 3))

    assert not shards.run_encoder("mine", Learns(3, 4), ["a", "b"], tokens=False, layers=False).pooled.requires_grad and seen == [False]


def test_force_encodes_anew(pictures, tmp_path, monkeypatch):
    run(tmp_path)
    before = read_tensors(tmp_path / "out/picture.safetensors")["features"]
    call = miniature.ToyPictureEncoder.__call__
    monkeypatch.setattr(miniature.ToyPictureEncoder, "__call__", lambda self, batch: call(self, batch) + 1)
    assert "already encoded" in run(tmp_path).output
    assert "wrote" in run(tmp_path, "--force").output
    assert torch.equal(read_tensors(tmp_path / "out/picture.safetensors")["features"], before + 1)


def test_an_interrupted_force_is_taken_up(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 4)
    run(tmp_path)
    encoded = []
    call = miniature.ToyPictureEncoder.__call__

    def interrupted(self, batch):
        encoded.append(len(batch))
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return call(self, batch)

    monkeypatch.setattr(miniature.ToyPictureEncoder, "__call__", interrupted)
    result = run(tmp_path, "--force")
    assert result.exit_code == 130 and "continue by the same command without --force" in result.output
    assert "wrote" in run(tmp_path).output and encoded == [4, 4, 4, 4, 2]
    assert "already encoded" in run(tmp_path).output


@pytest.mark.parametrize("threads", ["0", "100000"])
def test_more_threads_than_cores(pictures, tmp_path, threads):
    result = run(tmp_path, "--threads", threads)
    assert result.exit_code and not (tmp_path / "out").exists()
    assert threads == "0" or "threads must be from 1 to the" in result.output and result.output.strip().endswith("got 100000")


def test_too_few_items_for_align(pictures, tmp_path):
    assert "needs at least" not in run(tmp_path).output
    (tmp_path / "captions.csv").write_text("\n".join((tmp_path / "captions.csv").read_text().splitlines()[:12]) + "\n")
    assert "only 11 items: `modalign align` needs at least 12" in run(tmp_path).output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--encoder", "all-MiniLM-L6-v2"], "--encoder must be EfficientNet-Lite0, ViT-S/14 or module:Class of your own, got 'all-Mini"),
        (["--text-encoder", "EfficientNet-Lite0"], "--text-encoder must be all-MiniLM-L6-v2 or module:Class of your own, got 'Efficient"),
        (["--encoder", "modalign.data.points:PointDescriptor"], "got 'modalign.data.points:PointDescriptor', which is not for pictures"),
    ],
)
def test_encoders_of_the_wrong_kind(pictures, tmp_path, options, expected):
    result = run(tmp_path, *options)
    assert result.exit_code == 1 and expected in result.output and not (tmp_path / "out").exists()


def test_pictures_are_opened_as_they_look(tmp_path):
    grey = torch.tensor([[0, 257, 32896], [65535, 65535, 65535]], dtype=torch.int32).numpy()
    for name, values in (("short.png", grey.astype("uint16")), ("short.tif", grey.astype(">u2")), ("int.tif", grey)):
        Image.fromarray(values).save(tmp_path / name)
        picture = encoders.open_picture(tmp_path / name)
        assert picture.mode == "RGBA" and [pixel[0] for pixel in picture.get_flattened_data()] == [0, 1, 128, 255, 255, 255]
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its left side
    Image.new("RGB", (30, 20), "red").save(tmp_path / "lying.jpg", exif=exif)
    assert encoders.open_picture(tmp_path / "lying.jpg").size == (20, 30)
    assert encoders.open_picture("in an archive", miniature.png("red")).mode == "RGBA"


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (torch.tensor([[0.0, 0.5], [1.0, 2.0]]).numpy(), "whole numbers, got one of floating-point numbers"),
        (torch.tensor([[0, 70000], [1, 2]], dtype=torch.int32).numpy(), "numbers from 0 to 65535, got one from 0 to 70000"),
        (torch.tensor([[-5, 3], [1, 2]], dtype=torch.int16).numpy(), "numbers from 0 to 65535, got one from -5 to 3"),
    ],
)
def test_pictures_whose_range_is_unknown_are_refused(pictures, tmp_path, values, found):
    path = pictures / "odd.tif"
    Image.fromarray(values).save(path)
    with pytest.raises(ValueError) as caught:
        encoders.open_picture(path)
    assert str(caught.value).startswith(f"{path}: expected a picture of ") and found in str(caught.value)
    (tmp_path / "captions.csv").write_text("file,caption\n" + "".join(f"{n}.png,card {n}\n" for n in range(13)) + "odd.tif,odd\n")
    result = run(tmp_path)
    assert result.exit_code == 1 and f"{path}: expected a picture of" in result.output and not (tmp_path / "out/items.json").exists()


def test_names_of_encoders(tmp_path, monkeypatch):
    assert isinstance(encoders.make("all-MiniLM-L6-v2"), data.MiniLMTextEncoder)
    with pytest.raises(ValueError, match="name must be one of all-MiniLM-L6-v2, EfficientNet-Lite0, .*, or module:Class, got 'CLIP'"):
        encoders.make("CLIP")
    with pytest.raises(ValueError, match="the module of 'nowhere.to:Be' must be importable, got none named 'nowhere'"):
        encoders.make("nowhere.to:Be")
    monkeypatch.chdir(tmp_path)
    miniature.write(tmp_path / "beside_me.py", "import torch\ndef flat(inputs):\n    return torch.zeros(len(inputs), 2)\n")
    assert encoders.make("beside_me:flat")(["a"]).shape == (1, 2)


def test_an_own_encoder_that_was_edited_since_is_told_of(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions.csv").write_text("file,caption\n" + "".join(f"{number}.png,a {colour} card\n" for number, colour in enumerate(COLOURS)))
    own = miniature.write(tmp_path / "own_words.py", "import miniature\nclass Words(miniature.ToyTextEncoder):\n    pass\n")
    assert run(tmp_path, "--text-encoder", "own_words:Words").exit_code == 0
    trained = runner.invoke(app, ["align", str(tmp_path / "out"), "--seeds", "1", "--steps", "2", "--out", str(tmp_path / "run")])
    assert trained.exit_code == 0, trained.output

    def searched():
        result = runner.invoke(app, ["search", str(tmp_path / "run"), "a", "red", "card"], env={"COLUMNS": "300"})
        assert result.exit_code == 0, result.output
        return result.output

    told = "encoder 'own_words:Words' is in a file that differs from the one that made the features of 'text'"
    assert "own_words" not in searched()
    own.write_text(own.read_text() + "# no longer the same\n")
    assert searched().count(told) == 1
    with pytest.warns(UserWarning, match=f"PairedDataset.encode: {told}; encode them anew"):
        data.load(tmp_path / "out").encode("text", ["a red card"])
    assert run(tmp_path, "--text-encoder", "own_words:Words").exit_code == 0  # encoded anew
    again = searched()
    assert told not in again and "features of out were made by other code of encoder 'own_words:Words' than those that the model was trained on" in again


def test_the_example_runs(tmp_path):
    example = REPOSITORY / "examples/encode_your_pictures.py"
    done = subprocess.run([sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 items: picture [24, 12], text [24, 26]" in done.stdout
    assert len(data.load(tmp_path / "my_pictures/features")) == 24
    assert encode.read_captions(tmp_path / "my_pictures/captions.csv", tmp_path / "my_pictures")[1] == []
