"""Two hundred pairs: which layers to align, and whether to keep neighbourhoods. [STRUCTURE, NeurIPS 2025]

    python examples/two_hundred_pairs.py                                                    # made-up encoders, seconds
    python examples/two_hundred_pairs.py --data-root DIR --seeds 5 --out pairs.json         # `modalign prepare emoji`, a minute

Two encoders keep the pooled output of every layer. The pair of layers with most neighbours in common on the training pairs is chosen, and linear heads are trained on the last layers
and on the chosen ones, each with and without the STRUCTURE regularizer at two temperatures.

Metric, named before any run: R@10, mean of both directions, test items.
"""

import argparse
import os
from pathlib import Path
from statistics import mean, stdev

import torch

from modalign.bench import environment
from modalign.data import load
from modalign.metrics import search_retrieval, select_layers
from modalign.models import GramAligner, GramAlignerConfig, TrainingConfig, fit_aligner

PAIRS, STEPS, WIDTH, STRUCTURE = 200, 150, 128, 10.0
REGULARIZED = {"": None, ", STRUCTURE 0.05": 0.05, ", STRUCTURE 0.2": 0.2}  # temperature of its neighbourhoods; 0.05 is published
ROWS = [f"{which} layers{how}" for which in ("last", "chosen") for how in REGULARIZED]
T_95 = {2: 12.706, 3: 4.303, 5: 2.776}  # of a t distribution, by the number of seeds


def made_up(items=600, layers=4):
    """Layers that show what both encoders see ever more clearly up to the third, and then less."""
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(items, 16, generator=generator)
    encoders = {}
    for name, width in (("picture", 48), ("text", 40)):
        features = [seen @ torch.randn(16, width, generator=generator) + noise * torch.randn(items, width, generator=generator) for noise in (12.0, 6.0, 3.0, 7.0)[:layers]]
        encoders[name] = torch.stack(features, 1)
    order = torch.randperm(items, generator=generator)
    return encoders, torch.arange(items), lambda seed: (order.roll(seed * 37)[:PAIRS], order.roll(seed * 37)[-200:])


def emoji(root):
    data = load("emoji", root)
    encoders = {"picture": data.layers("picture_vit").float(), "text": data.layers("text").float()}
    return encoders, data.groups, lambda seed: (data.paired(data.splits(seed, PAIRS).train), data.splits(seed).test)


def run_seed(encoders, groups, split, seed):
    train, test = split(seed)
    found = select_layers(encoders["picture"][train], encoders["text"][train])
    last = tuple(layers.shape[1] - 1 for layers in encoders.values())
    scores = {}
    for which, pair in (("last", last), ("chosen", found.pair)):
        features = {name: layers[:, layer] for (name, layers), layer in zip(encoders.items(), pair, strict=True)}
        for how, temperature in REGULARIZED.items():
            model = GramAligner(GramAlignerConfig({name: x.shape[1] for name, x in features.items()}, width=WIDTH, heads="linear", hidden=0, loss="clip"), seed=seed)
            model.set_statistics({name: x[train].mean(0) for name, x in features.items()}, {name: x[train].std() for name, x in features.items()})
            regularizer = {} if temperature is None else {"structure": STRUCTURE, "structure_temperature": temperature}
            config = TrainingConfig(steps=STEPS, batch=PAIRS, learning_rate=2e-3, affine_rate=1.0, **regularizer)
            fit_aligner(model, {name: x[train] for name, x in features.items()}, groups[train], config, seed=seed)
            with torch.no_grad():
                picture, text = model.embed({name: x[test] for name, x in features.items()}).values()
            both = [search_retrieval(a, b, query_groups=groups[test]).r10 for a, b in ((picture, text), (text, picture))]
            scores[f"{which} layers{how}"] = 100 * mean(both)
    return scores, found.pair


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-root", default=os.environ.get("MODALIGN_DATA_ROOT"), help="where `modalign prepare emoji` left its set; without it encoders are made up")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="results as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    encoders, groups, split = emoji(arguments.data_root) if arguments.data_root else made_up()
    by_seed, pairs = zip(*(run_seed(encoders, groups, split, seed) for seed in range(arguments.seeds)), strict=True)
    print(f"layers chosen, from 1: {', '.join(f'{a + 1} and {b + 1}' for a, b in pairs)}, of {' and '.join(str(layers.shape[1]) for layers in encoders.values())}")
    print("| heads on | R@10 | less the last layers alone |")
    print("|---|---:|---:|")
    for row in ROWS:
        values, difference = [seed[row] for seed in by_seed], [seed[row] - seed[ROWS[0]] for seed in by_seed]
        half = T_95.get(len(difference), float("nan")) * (stdev(difference) / len(difference) ** 0.5 if len(difference) > 1 else float("nan"))
        shown = "–" if row == ROWS[0] else f"{mean(difference):+.1f} [{mean(difference) - half:+.1f} … {mean(difference) + half:+.1f}]"
        print(f"| {row} | {mean(values):.1f} | {shown} |")
    print(f"{PAIRS} training pairs, {arguments.seeds} seeds; 95 % interval of the difference within a seed")
    if arguments.out:
        from modalign._files import write_json

        content = {"metric": "R@10, mean of both directions", "seeds": list(by_seed), "layers": [list(pair) for pair in pairs], "environment": environment.describe(torch.device("cpu"), 0)}
        write_json(arguments.out, content)


if __name__ == "__main__":
    main()
