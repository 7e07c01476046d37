"""Align two feature matrices of your own: row i of both describes item i.

    python examples/align_your_features.py                          a made-up pair
    python examples/align_your_features.py sound.npy text.npy       yours (float arrays [N, D]; D may differ)

Prints retrieval on held-out items for the closed form and for trained heads, and saves the trained model in ./my_aligner.
"""

import sys

import numpy as np
import torch

from modalign.cli.experiment import ROWS, mean_r10, run_experiment
from modalign.data import from_features


def made_up(items: int = 400, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two views of the same 8 hidden numbers, each mixed with more noise dimensions than signal."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(items, 8, generator=random)
    views = {}
    for name, width in (("sound", 48), ("text", 32)):
        mixed = torch.cat([hidden, torch.randn(items, width - 8, generator=random)], dim=1)
        views[name] = mixed @ torch.randn(width, width, generator=random)
    return views


if len(sys.argv) == 3:
    features = {
        name: torch.from_numpy(np.load(path, allow_pickle=False)).float() for name, path in zip(("first", "second"), sys.argv[1:], strict=True)
    }
else:
    features = made_up()

dataset = from_features(features, name="my features")  # names=[...] keeps items of equal caption on one side of every split
experiment = run_experiment(dataset, seeds=1, steps=60)
table = experiment.seeds[0].table
for row, what in ROWS.items():
    print(f"{row:16s} mean R@10 {100 * mean_r10(table[row]):5.1f} %   {what}")

experiment.model.save_pretrained("my_aligner")
print("saved in ./my_aligner; read it with modalign.models.GramAligner.from_pretrained('my_aligner')")
