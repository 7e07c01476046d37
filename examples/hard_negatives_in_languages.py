"""Pictures meet captions in several languages, with negatives mined out of all captions of a language. [mmE5, ACL Findings 2025]

    python examples/hard_negatives_in_languages.py                                          # made-up tables, seconds
    python examples/hard_negatives_in_languages.py --data-root DIR --seeds 5 --out mined.json    # `modalign prepare emoji`, a few minutes

Two linear heads, one for pictures and one for the captions of all languages, learn for a while with the negatives of their batch alone. Then captions are mined
for every training picture, in each language: the k nearest that are not its own, without the very nearest and those that are too similar, which may be right.
Three ways to go on for as many steps again: the batch alone, mined negatives beside it, and mined ones without the two limits.

Metric, named before any run: picture -> caption, R@10 on test items, mean over languages.
"""

import argparse
import os
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn

from modalign.bench import environment
from modalign.data import load
from modalign.metrics import search_retrieval
from modalign.models.training import first_of_groups
from modalign.nn import LinearHead
from modalign.nn.functional import hard_negative_infonce
from modalign.ops import mine_hard_negatives

LANGUAGES = {"text": "English", "text_fr": "French", "text_de": "German", "text_es": "Spanish", "text_ru": "Russian", "text_ja": "Japanese"}
WAYS = {"batch": "the batch alone", "mined": "3 mined negatives, limited", "nearest": "the 3 nearest, without limits"}
STEPS, BATCH, WIDTH, TEMPERATURE = 300, 128, 256, 0.05
NEGATIVES, SKIPPED, MOST_SIMILAR = 3, 2, 0.9
T_95 = {2: 12.706, 3: 4.303, 5: 2.776}  # of a t distribution, by the number of seeds


def made_up(items=400, languages=3):
    """Captions of each language are a turned and blurred copy of what the pictures show."""
    generator = torch.Generator().manual_seed(0)
    shown = torch.randn(items, 24, generator=generator)
    features = {"picture": shown @ torch.randn(24, 64, generator=generator) + 8 * torch.randn(items, 64, generator=generator)}
    for name in list(LANGUAGES)[:languages]:
        features[name] = shown @ torch.randn(24, 48, generator=generator) + 8 * torch.randn(items, 48, generator=generator)
    order = torch.randperm(items, generator=generator)
    return features, torch.arange(items), lambda seed: (order[: items * 3 // 4], order[items * 3 // 4 :])


def emoji(root):
    """The emoji set, without items that lack a language."""
    data = load("emoji", root)
    names = ["picture", *(name for name in LANGUAGES if name in data.modalities)]
    whole = torch.stack([data.present.get(name, torch.ones(len(data), dtype=torch.bool)) for name in names]).all(0)

    def split(seed):
        parts = data.splits(seed)
        return parts.train[whole[parts.train]], parts.test[whole[parts.test]]

    return {name: data.modalities[name].float() for name in names}, data.groups, split


def train(heads, features, groups, train_items, languages, steps, generator, mined=None):
    """InfoNCE from pictures to captions of one language at a time; `mined`: captions [n, k] by language, places among the training items, -1 for none."""
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(steps):
        language = languages[step % len(languages)]
        drawn = torch.randperm(len(train_items), generator=generator)[:BATCH]
        drawn = drawn[first_of_groups(groups[train_items[drawn]])]  # one caption once
        chosen = train_items[drawn]
        negatives, present = None, None
        if mined is not None:
            places = mined[language][drawn]
            present = places >= 0
            negatives = heads["text"](features[language][train_items[places.clamp(min=0)]])
        pictures, captions = heads["picture"](features["picture"][chosen]), heads["text"](features[language][chosen])
        negatives = captions[:, None, :][:, :0] if negatives is None else negatives
        loss = hard_negative_infonce(pictures, captions, negatives, temperature=TEMPERATURE, present=present)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def mine(heads, features, groups, train_items, languages, limited):
    """Places of mined captions among the training items, for every training picture in each language."""
    pictures, found = heads["picture"](features["picture"][train_items]), {}
    limits = {"skip_top": SKIPPED, "max_similarity": MOST_SIMILAR} if limited else {}
    for language in languages:
        captions = heads["text"](features[language][train_items])
        found[language] = mine_hard_negatives(pictures, captions, (groups[train_items], groups[train_items]), NEGATIVES, **limits).indices
    return found


@torch.no_grad()
def scores(heads, features, groups, items, languages):
    """R@10 in percent, by language."""
    pictures = heads["picture"](features["picture"][items])
    return {language: 100 * search_retrieval(pictures, heads["text"](features[language][items]), query_groups=groups[items]).r10 for language in languages}


def run_seed(features, groups, split, seed, steps):
    languages = [name for name in features if name != "picture"]
    train_items, test_items = split(seed)
    features = {name: (x - x[train_items].mean(0)) / x[train_items].std() for name, x in features.items()}

    def fresh():
        torch.manual_seed(seed)
        return nn.ModuleDict({name: LinearHead(features[name].shape[1], WIDTH) for name in ("picture", "text")})

    first = fresh()
    train(first, features, groups, train_items, languages, steps, torch.Generator().manual_seed(seed))
    found = {}
    for way in WAYS:
        heads = fresh()
        heads.load_state_dict(first.state_dict())
        mined = None if way == "batch" else mine(first, features, groups, train_items, languages, limited=way == "mined")
        train(heads, features, groups, train_items, languages, steps, torch.Generator().manual_seed(seed + 1), mined)
        found[way] = scores(heads, features, groups, test_items, languages)
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-root", default=os.environ.get("MODALIGN_DATA_ROOT"), help="where `modalign prepare emoji` left its set; without it tables are made up")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, help="results as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    features, groups, split = emoji(arguments.data_root) if arguments.data_root else made_up()
    by_seed = [run_seed(features, groups, split, seed, arguments.steps) for seed in range(arguments.seeds)]
    languages = [name for name in features if name != "picture"]
    means = {way: [mean(seed[way].values()) for seed in by_seed] for way in WAYS}
    print(f"| negatives | {' | '.join(LANGUAGES[name] for name in languages)} | mean | less the batch alone |")
    print("|---|" + "---:|" * (len(languages) + 2))
    for way, what in WAYS.items():
        difference = [value - base for value, base in zip(means[way], means["batch"], strict=True)]
        half = T_95.get(len(difference), float("nan")) * (stdev(difference) / len(difference) ** 0.5 if len(difference) > 1 else float("nan"))
        shown = "–" if way == "batch" else f"{mean(difference):+.1f} [{mean(difference) - half:+.1f} … {mean(difference) + half:+.1f}]"
        print(f"| {what} | {' | '.join(f'{mean(seed[way][name] for seed in by_seed):.1f}' for name in languages)} | {mean(means[way]):.1f} | {shown} |")
    print(f"R@10 in percent, picture to caption, test items, {arguments.seeds} seeds; 95 % interval of the difference within a seed")
    if arguments.out:
        from modalign._files import write_json

        write_json(arguments.out, {"metric": "picture -> caption R@10, mean over languages", "seeds": by_seed, "environment": environment.describe(torch.device("cpu"), 0)})


if __name__ == "__main__":
    main()
