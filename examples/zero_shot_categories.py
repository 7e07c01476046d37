"""Pictures into categories that no pair named: zero-shot classification from few pairs, with and without STRUCTURE. [CLIP, ICML 2021; STRUCTURE, NeurIPS 2025]

    python examples/zero_shot_categories.py                                                          # made-up encoders, seconds
    python examples/zero_shot_categories.py --data-root DIR --seeds 5 --out zero_shot.json           # `modalign prepare emoji furniture stamps`, some minutes

Linear heads are trained on pictures and captions. A category is a sentence, or the mean of an ensemble of them, and a test picture goes to the nearest.

Metric, named before any run: the share of test pictures whose category is found, mean over the categories (large ones count as much as small ones).
"""

import argparse
import os
from pathlib import Path
from statistics import mean, stdev

import torch

from modalign.bench import environment
from modalign.data import load
from modalign.metrics import zero_shot
from modalign.models import CanonicalCorrelation, CanonicalCorrelationConfig, GramAligner, GramAlignerConfig, TrainingConfig, fit_aligner

SETS = {"emoji": "category", "furniture": "category", "stamps": "topic"}
PROMPTS = ["{}", "a picture of {}", "a drawing that belongs to {}", "a small image from the chapter on {}", "this is one of the {}"]
PAIRS, STEPS, WIDTH, STRUCTURE = (100, 200, 500, None), 150, 128, 10.0
REGULARIZED = {"linear heads": None, "STRUCTURE 0.05": 0.05, "STRUCTURE 0.2": 0.2}  # temperature of its neighbourhoods; 0.05 is published
LEAST = 5  # items of a category that counts
T_95 = {2: 12.706, 3: 4.303, 5: 2.776}  # of a t distribution, by the number of seeds


class MadeUp:
    """Items of eight kinds; both encoders see the kind and something of the item."""

    def __init__(self, items=700, kinds=8):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        self.labels, self.names, self.test_size = torch.arange(items) % kinds, [f"kind {k}" for k in range(kinds)], 200
        kind, groups = draw(kinds, 12), torch.arange(items)
        seen, lift = kind[self.labels] + 1.5 * draw(items, 12), {"picture": draw(12, 48), "text": draw(12, 40)}
        self.features = {name: seen @ matrix + 4 * draw(items, matrix.shape[1]) for name, matrix in lift.items()}
        self.prompts = (kind[:, None] + 0.3 * draw(kinds, len(PROMPTS), 12)) @ lift["text"]
        self.groups, self.order = groups, torch.randperm(items, generator=generator)

    def split(self, seed, pairs):
        order = self.order.roll(37 * seed)
        return order[self.test_size :][:pairs], order[: self.test_size]


class Prepared:
    def __init__(self, name, root):
        self.data = load(name, root).select(["picture", "text"])
        given = [item.get(SETS[name], "") for item in self.data.items]
        self.names = sorted({one for one in given if one and given.count(one) >= LEAST})
        self.labels = torch.tensor([self.names.index(one) if one in self.names else -1 for one in given])
        self.features, self.groups = self.data.modalities, self.data.groups
        texts = [prompt.format(name.lower()) for name in self.names for prompt in PROMPTS]
        self.prompts = self.data.encode("text", texts).view(len(self.names), len(PROMPTS), -1)

    def split(self, seed, pairs):
        split = self.data.splits(seed, pairs)
        return split.train, split.test


def score(embed, source, test):
    test = test[source.labels[test] >= 0]
    K, P, D = source.prompts.shape
    picture, prompts = embed({"picture": source.features["picture"][test], "text": source.prompts.reshape(K * P, D)})
    prompts = prompts.view(K, P, -1)
    labels = source.labels[test]
    return 100 * zero_shot(picture, prompts, labels).mean_per_class, 100 * zero_shot(picture, prompts[:, 0], labels).mean_per_class


def run(source, pairs, seed):
    """{row: (ensemble, first prompt alone)}"""
    train, test = source.split(seed, pairs)
    features = {name: x[train] for name, x in source.features.items()}
    solution = CanonicalCorrelation.fit(features, CanonicalCorrelationConfig(width=min(WIDTH, *(x.shape[1] for x in features.values()))))
    scores = {"cca": score(lambda given: solution.embed(given).values(), source, test)}
    for row, temperature in REGULARIZED.items():
        model = GramAligner(GramAlignerConfig({name: x.shape[1] for name, x in features.items()}, width=WIDTH, heads="linear", hidden=0, loss="clip"), seed=seed)
        model.set_statistics({name: x.mean(0) for name, x in features.items()}, {name: x.std() for name, x in features.items()})
        regularizer = {} if temperature is None else {"structure": STRUCTURE, "structure_temperature": temperature}
        config = TrainingConfig(steps=STEPS, batch=min(256, len(train)), learning_rate=2e-3, affine_rate=1.0, **regularizer)
        fit_aligner(model, features, source.groups[train], config, seed=seed)
        with torch.no_grad():
            scores[row] = score(lambda given, model=model: [model.embed({name: x})[name] for name, x in given.items()], source, test)
    return scores


def interval(values):
    half = T_95.get(len(values), float("nan")) * (stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan"))
    return f"{mean(values):+.1f} [{mean(values) - half:+.1f} … {mean(values) + half:+.1f}]"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-root", default=os.environ.get("MODALIGN_DATA_ROOT"), help="where `modalign prepare emoji furniture stamps` left its sets; without it one is made up")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="results as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sources = {name: Prepared(name, arguments.data_root) for name in SETS} if arguments.data_root else {"made up": MadeUp()}
    sizes = PAIRS if arguments.data_root else (100,)
    results = {}
    rows = ["cca", *REGULARIZED]
    print(f"| set, categories | pairs | {' | '.join(rows)} | ensemble less one prompt | 0.05 less without | 0.2 less without |")
    print("|---|---|" + "---:|" * (len(rows) + 3))
    for name, source in sources.items():
        results[name] = {"categories": source.names, "scores": {}}
        for pairs in sizes:
            by_seed = [run(source, pairs, seed) for seed in range(arguments.seeds)]
            results[name]["scores"][str(pairs or "all")] = by_seed
            shown = " | ".join(f"{mean(one[row][0] for one in by_seed):.1f}" for row in rows)
            ensemble = interval([one["linear heads"][0] - one["linear heads"][1] for one in by_seed])
            structure = " | ".join(interval([one[row][0] - one["linear heads"][0] for one in by_seed]) for row in rows[-2:])
            print(f"| {name}, {len(source.names)} | {pairs or 'all'} | {shown} | {ensemble} | {structure} |", flush=True)
    print(f"mean of {arguments.seeds} seeds; 95 % intervals of differences within a seed")
    if arguments.out:
        from modalign._files import write_json

        content = {"metric": "share of test pictures put into their category, mean over categories, in percent", "prompts": PROMPTS, "seeds": arguments.seeds, "sets": results}
        write_json(arguments.out, content | {"rows": "[with all prompts, with the first alone]", "environment": environment.describe(torch.device("cpu"), 0)})


if __name__ == "__main__":
    main()
