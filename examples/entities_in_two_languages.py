"""The same things in two languages as two graphs whose pictures are often missing. [UMAEA, ISWC 2023]

    python examples/entities_in_two_languages.py                                                    # made-up graphs, seconds
    python examples/entities_in_two_languages.py --data-root DIR --seeds 5 --out entities.json      # `modalign prepare emoji`, half an hour

Emoji with English names and one picture encoder on the left, German names and another on the right; an edge joins two that are mutual neighbours by name in their language. 30 % of the links are
known. Rows: what stands for a missing picture, and with links that were mutual neighbours through ten checks.

Metric, named before any run: Hits@1 of the unknown links, mean of both directions, by CSLS; Hits@10 and the mean reciprocal rank beside it.
"""

import argparse
import os
from pathlib import Path
from statistics import mean, stdev

import torch

from modalign.bench import environment
from modalign.data import load
from modalign.models import EntityAligner, EntityAlignerConfig, EntityGraph
from modalign.ops import knn_graph

KNOWN, MISSING, NEIGHBORS = 0.3, (0.0, 0.4, 0.8), 5
ROWS = {
    "no pictures": None,
    "noise": {"missing": "noise"},
    "left out": {"missing": "leave_out"},
    "imagined": {"missing": "imagine"},
    "imagined, pseudo-labels": {"missing": "imagine", "check_every": 5},
}
T_95 = {2: 12.706, 3: 4.303, 5: 2.776}  # of a t distribution, by the number of seeds


def made_up(N=200):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    about = draw(N, 10)
    return [(about[:, :5] @ draw(5, 24) + 1.5 * draw(N, 24), about @ draw(10, 32) + draw(N, 32)) for _ in range(2)]


def emoji(root):
    data = load("emoji", root)
    return [(data.modalities[text], data.modalities[picture]) for text, picture in (("text", "picture"), ("text_de", "picture_vit"))]


def run(sides, missing, seed, config):
    N = len(sides[0][0])
    generator = torch.Generator().manual_seed(seed)
    graphs = []
    for name, picture in sides:
        edges = knn_graph(name, NEIGHBORS, symmetrize="mutual").edge_index
        there = torch.rand(N, generator=generator) >= missing
        graphs.append((EntityGraph({"name": name}, edges), EntityGraph({"name": name, "picture": picture}, edges, {"picture": there})))
    order = torch.randperm(N, generator=generator)
    turned = torch.randperm(N, generator=generator)  # the right graph counts its entities in another order
    right = [EntityGraph({key: x[turned] for key, x in graph.features.items()}, turned.argsort()[graph.edges], {key: x[turned] for key, x in graph.present.items()}) for graph in graphs[1]]
    links = torch.stack([order, turned.argsort()[order]], 1)
    known = int(KNOWN * N)
    found = {}
    for row, options in ROWS.items():
        without = options is None
        model = EntityAligner(graphs[0][not without], right[not without], EntityAlignerConfig(**config, **(options or {})), seed=seed).fit(links[:known])
        ranks = model.ranks(links[known:])
        found[row] = [100 * ranks.hits1, 100 * ranks.hits10, 100 * ranks.reciprocal_rank]
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-root", default=os.environ.get("MODALIGN_DATA_ROOT"), help="where `modalign prepare emoji` left its set; without it graphs are made up")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="results as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sides = emoji(arguments.data_root) if arguments.data_root else made_up()
    config = {"width": 128, "epochs": (80, 30, 40)} if arguments.data_root else {"width": 32, "hidden": 32, "epochs": (40, 10, 20)}
    results = {}
    print("| pictures missing | " + " | ".join(f"{row}: Hits@1 (10, MRR)" for row in ROWS) + " | imagined less left out |")
    print("|---:|" + "---:|" * (len(ROWS) + 1))
    for missing in MISSING if arguments.data_root else (0.5,):
        by_seed = [run(sides, missing, seed, config) for seed in range(arguments.seeds)]
        results[str(missing)] = by_seed
        cells = " | ".join("{:.1f} ({:.1f}, {:.1f})".format(*(mean(one[row][column] for one in by_seed) for column in range(3))) for row in ROWS)
        gain = [one["imagined"][0] - one["left out"][0] for one in by_seed]
        half = T_95.get(len(gain), float("nan")) * (stdev(gain) / len(gain) ** 0.5 if len(gain) > 1 else float("nan"))
        print(f"| {missing:.0%} | {cells} | {mean(gain):+.1f} [{mean(gain) - half:+.1f} … {mean(gain) + half:+.1f}] |", flush=True)
    print(f"mean of {arguments.seeds} seeds, {KNOWN:.0%} of the links known; 95 % interval of the difference within a seed")
    if arguments.out:
        from modalign._files import write_json

        content = {"metric": "Hits@1, Hits@10 and mean reciprocal rank of unknown links, both directions, in percent", "seeds": arguments.seeds, "config": config, "scores": results}
        write_json(arguments.out, content | {"environment": environment.describe(torch.device("cpu"), 0)})


if __name__ == "__main__":
    main()
