"""Encode items piece by piece, so that a kill at any moment loses at most one piece, and make a feature folder of the pieces.

A shard is one file, written whole or not at all. Its content depends on the items and settings alone, so that a resumed run ends in the same bytes as
one that was never interrupted. Shards lie in a folder named by a fingerprint of everything they depend on; another version of a package, another
encoder or another setting makes another fingerprint, and what lies under the old one is never read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import write_json, write_tensors
from .encoders import ENCODERS, Encoded, EncoderUnavailable, on_white_square, told
from .folder import FORMAT_VERSION, PICTURES, UNFINISHED
from .sources import Item, Modality
from .storage import CHECKSUMS, read_checksums, sha256, verify_checksums, write_checksums

__all__ = ["Encoding", "complete", "encoder_code", "encoder_identity", "file_identity", "prepared"]

CACHE = ".cache"
OWN = "own.json"  # in the cache while files change places: names of those that are ours
NEW = "new"  # in the cache: the folder to be
LOCK = ".lock"  # stays, as a mark that the folder is ours
SHARD = 256  # items
BATCH = 32  # items whose inputs are in memory at once
PICTURE = "picture"
PICTURE_SIDE = 128
# Features, layers and tokens of one item and its small picture, generously; twice, since shards and result lie side by side for a while.
BYTES_PER_ITEM = 2 * 250_000
Progress = Callable[[int, int], None]


def encoder_class(encoder: Any) -> Any:
    return encoder if inspect.isroutine(encoder) or isinstance(encoder, type) else type(encoder)


def encoder_code(encoder: Any) -> str:
    """SHA-256 of the file that an encoder's class (or function) is in."""
    try:
        return sha256(inspect.getfile(encoder_class(encoder)))
    except (TypeError, OSError):  # built in, or typed at a prompt
        return "unknown"


def encoder_identity(encoder: Any) -> dict[str, str]:
    """What the output of an encoder depends on: its code and the versions of its packages."""
    kind = encoder_class(encoder)
    versions = {package: importlib.metadata.version(package) for package in getattr(encoder, "packages", ())}
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "code": encoder_code(encoder)} | versions


def file_identity(root: Path, paths: Sequence[Path]) -> str:
    """A digest of files and of all files below folders: names (from `root`, which may move), sizes and times of change."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            status = file.lstat()
            digest.update(f"{file.relative_to(root)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def own_identity() -> dict[str, str]:
    """Our own code that shards depend on, and the libraries that could round differently."""
    here = Path(__file__).parent
    code = [here / "shards.py", here / "points.py", here / "pads.py", *here.glob("sources/*.py"), *here.glob("encoders/*.py")]
    digest = hashlib.sha256("".join(sha256(path) for path in sorted(code)).encode()).hexdigest()
    versions = {}
    for package in ("torch", "numpy", "pillow", "scipy", "resvg-py", "soundfile", "tokenizers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"modalign": digest, **versions}


def complete(folder: Path) -> bool:
    """Whether the folder is a finished one, by the files that are there."""
    return (folder / CHECKSUMS).is_file() and not (folder / UNFINISHED).is_file()


def prepared(folder: Path, fingerprint: str | None = None) -> bool:
    """Whether the folder is a finished one (made by these very settings, where a fingerprint is given), with every file as it was written."""
    if not complete(folder):
        return False
    try:
        about = json.loads((folder / "items.json").read_text(encoding="utf-8"))
        if fingerprint is not None and about.get("fingerprint") != fingerprint:
            return False
        verify_checksums(folder)
    except (OSError, ValueError):
        return False
    return True


@dataclass
class Encoding:
    """Items on their way to a feature folder.

    A broken input of an item is reported and leaves the item out (if `required`) or the modality absent; with `strict`, it raises.
    """

    folder: Path
    items: list[Item]
    modalities: dict[str, Modality]
    encoders: Mapping[str, Any]
    required: Sequence[str]
    about: dict[str, Any]  # name, licence, source, test_size, validation_size, default
    settings: dict[str, Any]  # what the result depends on besides items, modalities and encoders
    strict: bool = False
    fingerprint: str = field(init=False)
    foreign: list[str] = field(init=False, default_factory=list)  # files in the folder that are not ours, once written
    widths: dict[str, int] = field(init=False, default_factory=dict)  # of each encoder's output, once seen

    def __post_init__(self) -> None:
        depends = {
            "format": FORMAT_VERSION,
            "shard": [SHARD, BATCH, PICTURE_SIDE],
            "threads": torch.get_num_threads(),
            "own": own_identity(),
            "encoders": {name: encoder_identity(encoder) for name, encoder in self.encoders.items()},
            "modalities": {name: asdict(modality) for name, modality in self.modalities.items()},
            "items": [[item.name, item.keywords, sorted(item.inputs), item.names, item.group, item.about] for item in self.items],
            "about": self.about,
            "settings": self.settings,
        }
        self.fingerprint = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]
        self.cache = self.folder / CACHE / self.fingerprint

    def run(self, progress: Progress = lambda done, total: None, *, anew: bool = False) -> dict[str, list[str]]:
        """Encode what is missing (`anew`: everything), write the folder, remove the cache. Returns what was left out or absent: reasons and names."""
        with self._alone(), self._full_disk_told():
            self._own()
            if anew:
                shutil.rmtree(self.cache, ignore_errors=True)
                self.cache.mkdir(parents=True)  # from now on the run is unfinished
            self._demand_space()
            for number, start in enumerate(range(0, len(self.items), SHARD)):
                path = self._shard(number)
                if not path.is_file():
                    tensors, notes = self._encode(start, progress)
                    write_tensors(path, tensors, {"notes": json.dumps(notes)})
                progress(min(start + SHARD, len(self.items)), len(self.items))
            report = self._write(self.folder / CACHE / NEW)
            self._take_over(self.folder / CACHE / NEW)
            shutil.rmtree(self.folder / CACHE)
        return report

    def finished(self) -> bool:
        """Whether the folder holds what this would make, and no run of the same (a forced one) was interrupted since."""
        return not self.cache.exists() and prepared(self.folder, self.fingerprint)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Two runs at once would remove each other's shards; and a folder of other files is no place for a data set, which replaces what is there."""
        if self.folder.exists() and (not self.folder.is_dir() or (any(self.folder.iterdir()) and not (self.folder / LOCK).exists())):
            found = "one with other files" if self.folder.is_dir() else "a file"
            raise ValueError(f"{self.folder}: expected a new folder, an empty one or one that was written by the same command, got {found}")
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / LOCK, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(f"{self.folder}: expected a folder that no other run is writing, got one that is being written now") from error
            yield

    @contextlib.contextmanager
    def _full_disk_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            free = f"{shutil.disk_usage(self.folder).free / 1e9:.1f} GB"
            raise ValueError(f"{self.folder}: expected room for more, got a full disk ({free} free); what is done is kept: make room, run the same command") from error

    def _own(self) -> tuple[set[str], list[str]]:
        """Files that are ours to replace (written by the last run, or by one that was killed while it wrote), and those that this run may write."""
        planned = [f"{name}{kind}.safetensors" for name in self.modalities for kind in ("", ".tokens", ".layers")]
        planned += [PICTURES, "items.json", CHECKSUMS]
        ours = {CHECKSUMS}
        if (self.folder / CHECKSUMS).is_file():
            ours |= set(read_checksums(self.folder))
        if (self.folder / CACHE / OWN).is_file():
            ours |= set(json.loads((self.folder / CACHE / OWN).read_text(encoding="utf-8")))
        for file in planned:
            if file not in ours and (self.folder / file).exists():
                raise ValueError(f"{self.folder / file}: expected no file of this name but our own, got one that is not in {CHECKSUMS}; move it away")
        return ours, planned

    def _demand_space(self) -> None:
        missing = sum(not self._shard(number).is_file() for number in range(-(-len(self.items) // SHARD)))
        needed, free = missing * min(SHARD, len(self.items)) * BYTES_PER_ITEM, shutil.disk_usage(self.folder).free
        if free < needed:
            raise ValueError(f"{self.folder}: expected about {needed / 1e9:.1f} GB of free disk space, got {free / 1e9:.1f} GB")

    def _shard(self, number: int) -> Path:
        return self.cache / f"{number:05d}.safetensors"

    # ------------------------------------------------------------------------------------------------------------------------ one shard

    def _encode(self, first: int, progress: Progress) -> tuple[dict[str, Tensor], list[list[str]]]:
        notes: list[list[str]] = []  # item, input, reason
        parts: dict[str, list[Tensor]] = {}
        last = min(first + SHARD, len(self.items))
        for start in range(first, last, BATCH):
            stop = min(start + BATCH, last)
            for name, tensor in self._encode_batch(self.items[start:stop], notes).items():
                parts.setdefault(name, []).append(tensor)
            progress(stop, len(self.items))
        return {name: torch.cat(tensors) for name, tensors in parts.items()}, notes

    def _encode_batch(self, items: Sequence[Item], notes: list[list[str]]) -> dict[str, Tensor]:
        """Tensors of a batch. An item that is left out has kept = False and is absent from every modality."""
        used = dict.fromkeys([*self.required, *(modality.input for modality in self.modalities.values())])
        inputs: list[dict[str, Any]] = []
        kept = torch.ones(len(items), dtype=torch.bool)
        for row, item in enumerate(items):
            made = {}
            for name in used:
                if name not in item.inputs:
                    continue
                try:
                    made[name] = item.inputs[name]()
                except (ValueError, OSError, MemoryError) as error:
                    if self.strict:
                        raise
                    notes.append([item.about.get("file", item.name), name, str(error)])
            kept[row] = all(name in made for name in self.required)
            inputs.append(made if kept[row] else {})
        tensors = {"kept": kept}
        encoded: dict[tuple[str, str], Encoded | None] = {}
        rows = {name: [row for row, made in enumerate(inputs) if name in made] for name in used}
        for modality in self.modalities.values():
            for encoder in (modality.encoder, modality.tokens):
                key = (encoder, modality.input)
                if encoder is not None and key not in encoded:
                    uses = [m for m in self.modalities.values() if m.input == modality.input]
                    tokens, layers = any(m.tokens == encoder for m in uses), any(m.layers and m.encoder == encoder for m in uses)
                    chosen = [inputs[row][modality.input] for row in rows[modality.input]]
                    encoded[key] = self._call(encoder, chosen, tokens, layers) if chosen else None
        for name, modality in self.modalities.items():
            there = rows[modality.input]
            present = torch.zeros(len(items), dtype=torch.bool)
            present[there] = True
            tensors[f"{name}.present"] = present
            pooled = encoded[modality.encoder, modality.input]
            if pooled is None:
                continue
            tensors[f"{name}.features"] = pooled.pooled
            if modality.layers and pooled.layers is not None:
                tensors[f"{name}.layers"] = halves(f"layers of {modality.encoder}", pooled.layers)
            if modality.tokens is not None:
                source = encoded[modality.tokens, modality.input]
                if source is not None and source.tokens is not None:
                    tensors[f"{name}.tokens"] = halves(f"tokens of {modality.tokens}", torch.cat(source.tokens))
                    tensors[f"{name}.lengths"] = torch.tensor([len(tokens) for tokens in source.tokens])
        if PICTURE in used:
            import numpy as np

            small = np.full((len(items), PICTURE_SIDE, PICTURE_SIDE, 3), 255, dtype=np.uint8)  # an item without one is seen as a white square
            for row in rows[PICTURE]:
                small[row] = on_white_square(inputs[row][PICTURE], PICTURE_SIDE)
            tensors["pictures"] = torch.from_numpy(small)[kept]
        return tensors

    def _call(self, encoder: str, inputs: Sequence[Any], tokens: bool, layers: bool) -> Encoded:
        encoded = run_encoder(encoder, self.encoders[encoder], inputs, tokens, layers)
        width = encoded.pooled.shape[1]
        if self.widths.setdefault(encoder, width) != width:
            raise ValueError(f"encoder '{encoder}': output must have one width, got {self.widths[encoder]} and then {width}")
        return encoded

    # ------------------------------------------------------------------------------------------------------------------ the whole folder

    def _column(self, name: str) -> list[Tensor]:
        """A tensor of every shard that has it."""
        from safetensors import safe_open

        found = []
        for number in range(-(-len(self.items) // SHARD)):
            with safe_open(self._shard(number), "pt") as shard:
                if name in shard.keys():  # noqa: SIM118  a safetensors file is no mapping
                    found.append(shard.get_tensor(name))
        return found

    def _write(self, new: Path) -> dict[str, list[str]]:
        """Make the whole folder, while the one that it will replace is as it was."""
        from safetensors import safe_open

        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        kept = torch.cat(self._column("kept"))
        if not bool(kept.any()):
            raise ValueError(f"{self.folder}: expected at least one item that can be encoded, got none of {len(self.items)}")
        described = {}
        for name, modality in self.modalities.items():
            present = torch.cat(self._column(f"{name}.present"))[kept]
            if bool(present.any()):
                described[name] = self._write_modality(new, name, modality, present)
        if any(modality.input == PICTURE and name in described for name, modality in self.modalities.items()) or PICTURE in self.required:
            write_tensors(new / PICTURES, {"pictures": torch.cat(self._column("pictures"))})
        items = [item_entry(item) for item, keep in zip(self.items, kept.tolist(), strict=True) if keep]
        report: dict[str, list[str]] = {}
        for number in range(-(-len(self.items) // SHARD)):
            with safe_open(self._shard(number), "pt") as shard:
                for item, name, reason in json.loads(shard.metadata()["notes"]):
                    report.setdefault(name, []).append(f"{item}: {reason}")
        about = self.about | {"default": [name for name in self.about["default"] if name in described]}
        head = {"format": FORMAT_VERSION, **about, "fingerprint": self.fingerprint, "modalities": described, "unreadable": report}
        write_json(new / "items.json", head | {"items": items}, indent=None)
        write_checksums(new)
        return report

    def _take_over(self, new: Path) -> None:
        """The new files change places with those of an earlier run. Nothing can fail here for want of room; a kill leaves a folder that is not read until
        the same command has made it whole."""
        ours, planned = self._own()
        write_json(self.folder / CACHE / OWN, sorted({*ours, *planned}))
        for file in sorted(ours):  # an earlier version may have had other modalities
            (self.folder / file).unlink(missing_ok=True)
        self.foreign = sorted(file.name for file in self.folder.iterdir() if file.name not in (CACHE, LOCK))
        for file in sorted(new.iterdir()):
            os.replace(file, self.folder / file.name)
        (self.folder / CACHE / OWN).unlink()

    def _write_modality(self, new: Path, name: str, modality: Modality, present: Tensor) -> dict[str, Any]:
        features = torch.cat(self._column(f"{name}.features"))
        entry: dict[str, Any] = {"encoder": modality.encoder, "width": features.shape[1]}
        if modality.encoder not in ENCODERS:
            entry["encoder_code"] = encoder_code(self.encoders[modality.encoder])
        if bool(present.all()):
            write_tensors(new / f"{name}.safetensors", {"features": features})
        else:
            matrix = torch.zeros(len(present), features.shape[1])
            matrix[present] = features
            write_tensors(new / f"{name}.safetensors", {"features": matrix, "present": present})
        if tokens := self._column(f"{name}.tokens"):
            lengths = torch.zeros(len(present), dtype=torch.int64)
            lengths[present] = torch.cat(self._column(f"{name}.lengths"))
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
            write_tensors(new / f"{name}.tokens.safetensors", {"tokens": torch.cat(tokens), "offsets": offsets})
            entry["tokens_encoder"] = modality.tokens
        if layers := self._column(f"{name}.layers"):
            stacked = torch.zeros(len(present), *layers[0].shape[1:], dtype=torch.float16)
            stacked[present] = torch.cat(layers)
            write_tensors(new / f"{name}.layers.safetensors", {"layers": stacked})
            entry["layers"] = stacked.shape[1]
        if modality.language is not None:
            entry["language"] = modality.language
        return entry


def item_entry(item: Item) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": item.name, "keywords": item.keywords}
    if item.group is not None:
        entry["group"] = item.group
    if item.names:
        entry["names"] = item.names
    return entry | item.about


def run_encoder(name: str, encoder: Any, inputs: Sequence[Any], tokens: bool, layers: bool) -> Encoded:
    """Call an encoder, one of ours or somebody's own, and check what comes back."""
    try:
        with torch.no_grad():  # one of somebody's own may not think of it, and a shard would keep its graph
            if layers or (tokens and hasattr(encoder, "encode")):
                encoded = encoder.encode(inputs)
            else:
                encoded = Encoded(encoder(inputs), encoder.tokens(inputs) if tokens else None)
    except (Exception, SystemExit) as error:
        if name in ENCODERS or isinstance(error, EncoderUnavailable):
            raise
        raise ValueError(f"encoder '{name}': must take a list of inputs, got {told(error)}") from error
    pooled = check_output(name, encoded.pooled, f"[{len(inputs)}, D]", len(inputs), 2)
    if tokens:
        if not isinstance(encoded.tokens, list) or len(encoded.tokens) != len(inputs):
            found = f"{len(encoded.tokens)} of them" if isinstance(encoded.tokens, list) else type(encoded.tokens).__name__
            raise ValueError(f"encoder '{name}': tokens must be a list of {len(inputs)} tensors [T, D], got {found}")
        for matrix in encoded.tokens:
            check_output(name, matrix, "[T, D] for each input's tokens", None, 2)
        if len({matrix.shape[1] for matrix in encoded.tokens}) > 1:
            raise ValueError(f"encoder '{name}': tokens must have one width, got {sorted({matrix.shape[1] for matrix in encoded.tokens})}")
    if layers:
        check_output(name, encoded.layers, f"[{len(inputs)}, L, D] for layers", len(inputs), 3)
    return Encoded(pooled, encoded.tokens, encoded.layers)


def check_output(name: str, output: Any, expected: str, rows: int | None, dimensions: int) -> Tensor:
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() != dimensions or (rows is not None and len(output) != rows):
        found = f"{str(output.dtype).removeprefix('torch.')} {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"encoder '{name}': output must be a floating-point tensor {expected}, got {found}")
    if output.shape[-1] == 0:
        raise ValueError(f"encoder '{name}': output must be {expected} with D at least 1, got {list(output.shape)}")
    output = output.float()
    bad = int((~torch.isfinite(output)).sum())
    if bad:
        raise ValueError(f"encoder '{name}': output must be finite, got {bad} numbers that are NaN or Inf in float32")
    return output


def halves(what: str, values: Tensor) -> Tensor:
    half = values.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise ValueError(f"{what}: expected numbers within ±65504 (they are kept as float16), got {float(values.abs().max()):.4g}")
    return half
