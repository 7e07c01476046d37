"""Align features of your own: a folder with one matrix per modality, row i of all of them describing item i.

    python examples/align_your_features.py                    a made-up folder: two modalities, and a third that only some items have
    python examples/align_your_features.py FOLDER             yours: NAME.npy or NAME.safetensors, perhaps names.txt (see docs/data.md)

The same from the command line: modalign align FOLDER. Prints retrieval on held-out items for the closed form and for trained heads, and saves the
trained model in ./my_aligner.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from modalign import data
from modalign.cli.experiment import ROWS, mean_r10, run_experiment
from modalign.cli.settings import AlignSettings


def write_made_up(folder: Path, items: int = 400, seed: int = 0) -> None:
    """Three views of the same 8 hidden numbers, each mixed with more noise dimensions than signal; a third of the items has no touch."""
    random = np.random.default_rng(seed)
    hidden = random.standard_normal((items, 8))
    for name, width in (("sound", 48), ("text", 32), ("touch", 24)):
        mixed = np.concatenate([hidden, random.standard_normal((items, width - 8))], axis=1)
        np.save(folder / f"{name}.npy", mixed @ random.standard_normal((width, width)))
    np.save(folder / "touch.present.npy", random.random(items) > 1 / 3)
    # captions keep items of equal meaning on one side of every split
    (folder / "names.txt").write_text("".join(f"recording {i}\n" for i in range(items)))


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # a training step on a few hundred items gains nothing from more
    dataset = data.from_folder(folder)
    held = {name: int(dataset.present[name].sum()) if name in dataset.present else len(dataset) for name in dataset.modalities}
    print(f"{len(dataset)} items: {held}")
    experiment = run_experiment(dataset, AlignSettings(seeds=1, steps=60))
    table = experiment.seeds[0].table
    for row in table:
        print(f"{row:16s} mean R@10 {100 * mean_r10(table[row]):5.1f} %   {ROWS[row]}")
    experiment.model.save_pretrained("my_aligner")
    print("saved in ./my_aligner; read it with modalign.models.GramAligner.from_pretrained('my_aligner')")


if len(sys.argv) == 2:
    main(Path(sys.argv[1]))
else:
    with tempfile.TemporaryDirectory() as made_up:
        write_made_up(Path(made_up))
        main(Path(made_up))
