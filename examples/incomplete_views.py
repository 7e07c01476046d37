"""Clusters of pictures and captions of which many are missing and many are shuffled. [CAPIMAC, IJCAI 2025]

    python examples/incomplete_views.py                                                       # made-up views, seconds
    python examples/incomplete_views.py --data-root DIR --seeds 5 --out views.json            # `modalign prepare emoji stamps`, some minutes

Of the items a share is known to be paired; of the rest half the captions are missing and the others are shuffled. Every picture gets a cluster; what it is compared with is the
item's category. Beside the two variants of the walk: k-means on the pictures alone, and the same pipeline with anchors drawn at random.

Metric, named before any run: accuracy under the best naming of clusters; mutual information and the adjusted Rand index beside it.
"""

import argparse
import os
from pathlib import Path
from statistics import mean, stdev
from unittest import mock

import torch
import torch.nn.functional as F

from modalign.bench import environment
from modalign.data import load
from modalign.metrics import clustering
from modalign.models import IncompleteMultiview, IncompleteMultiviewConfig
from modalign.models._kmeans import kmeans

SETS, RATES, ITEMS, LEAST = {"emoji": "category", "stamps": "topic"}, (0.3, 0.5, 0.7), 1000, 20
ROWS = ("pictures alone", "random anchors", "srrw", "released")
T_95 = {2: 12.706, 3: 4.303, 5: 2.776}  # of a t distribution, by the number of seeds


def made_up():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 6
    kinds = 2 * torch.randn(6, 8, generator=generator)
    seen = kinds[labels] + 1.2 * torch.randn(300, 8, generator=generator)
    return [seen @ torch.randn(8, width, generator=generator) for width in (30, 24)], labels


def prepared(name, root):
    data = load(name, root).select(["picture", "text"])
    given = [item.get(SETS[name], "") for item in data.items]
    names = sorted({one for one in given if one and given.count(one) >= LEAST})
    labels = torch.tensor([names.index(one) if one in names else -1 for one in given])
    kept = (labels >= 0).nonzero()[:, 0]
    return [F.normalize(data.modalities[side][kept], dim=1) for side in ("picture", "text")], labels[kept]


def spoil(views, labels, rate, seed):
    """At most ITEMS of them: pictures of all, captions of the known pairs and of half the others in another order."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[:ITEMS]
    known = int(rate * len(chosen))
    rest = known + torch.randperm(len(chosen) - known, generator=generator)
    captions = torch.cat([torch.arange(known), rest[: (len(chosen) - known) // 2]])
    return [views[0][chosen], views[1][chosen[captions]]], labels[chosen], torch.arange(known)[:, None].repeat(1, 2)


def run(views, labels, rate, seed, epochs):
    spoiled, truth, paired = spoil(views, labels, rate, seed)
    classes = int(truth.max()) + 1
    found = {"pictures alone": kmeans(F.normalize(spoiled[0], dim=1), classes, seed=seed)}

    def random_anchors(x, count, *, seed, **_):
        return torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]

    with mock.patch("modalign.models.incomplete_multiview.self_repellent_anchors", random_anchors):
        found["random anchors"] = IncompleteMultiview.fit(spoiled, paired, classes, IncompleteMultiviewConfig(epochs=epochs), seed=seed).clusters
    for variant in ("srrw", "released"):
        found[variant] = IncompleteMultiview.fit(spoiled, paired, classes, IncompleteMultiviewConfig(epochs=epochs, variant=variant), seed=seed).clusters
    return {row: [100 * value for value in vars(clustering(clusters, truth)).values()] for row, clusters in found.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-root", default=os.environ.get("MODALIGN_DATA_ROOT"), help="where `modalign prepare emoji stamps` left its sets; without it one is made up")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="results as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sources = {name: prepared(name, arguments.data_root) for name in SETS} if arguments.data_root else {"made up": made_up()}
    results = {}
    print("| set | pairs known | " + " | ".join(f"{row}: accuracy (nmi, ari)" for row in ROWS) + " | srrw less pictures alone |")
    print("|---|---:|" + "---:|" * (len(ROWS) + 1))
    for name, (views, labels) in sources.items():
        for rate in RATES if arguments.data_root else (0.5,):
            by_seed = [run(views, labels, rate, seed, 200 if arguments.data_root else 40) for seed in range(arguments.seeds)]
            results[f"{name}, {rate}"] = by_seed
            shown = [[mean(one[row][column] for one in by_seed) for column in range(3)] for row in ROWS]
            gain = [one["srrw"][0] - one["pictures alone"][0] for one in by_seed]
            half = T_95.get(len(gain), float("nan")) * (stdev(gain) / len(gain) ** 0.5 if len(gain) > 1 else float("nan"))
            cells = " | ".join(f"{a:.1f} ({b:.1f}, {c:.1f})" for a, b, c in shown)
            print(f"| {name}, {int(labels.max()) + 1} classes | {rate:.0%} | {cells} | {mean(gain):+.1f} [{mean(gain) - half:+.1f} … {mean(gain) + half:+.1f}] |", flush=True)
    print(f"mean of {arguments.seeds} seeds; half the captions of the other items missing, the rest shuffled; 95 % interval of the difference within a seed")
    if arguments.out:
        from modalign._files import write_json

        content = {"metric": "accuracy under the best naming, normalised mutual information, adjusted Rand index, in percent", "seeds": arguments.seeds, "scores": results}
        write_json(arguments.out, content | {"environment": environment.describe(torch.device("cpu"), 0)})


if __name__ == "__main__":
    main()
