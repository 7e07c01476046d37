"""A decoder of four layers reads real pictures under five masks: loss, FLOPs and time of a step side by side. [EE-MLLM, 2024; SAISA, 2025; AKI, 2025]

    python examples/masks_on_pictures.py --quick                                                                      # sees that it runs, seconds
    python examples/masks_on_pictures.py --seeds 5 --out benchmarks/results/masks_on_pictures.json --resume           # an hour or so on one core

The pictures are those of emoji-mini, 36 x 36 pixels, as 81 tokens of 4 x 4 pixels; behind them a question, "name" or "keyword", and the answer word by word: the name of the picture, or one of
its keywords. Words that fewer than four items have are one word, "rare". Where a mask lets no visual token look at others, its layers launch the rows of text alone. Items whose name has more
than six words are left out. Every seed splits the items anew, by caption, and gives all masks the same batches.

Metric, named before any run: the loss of a held-out word in nats, names and first keywords of test items. Beside it the same with the pictures of other items, which says what the pictures are
worth to it; FLOPs of a training step, of linear layers as torch counts them for the rows that are launched, of attention by the pairs that are kept, seven products (two forward, five
backward); milliseconds of a training step, medians of rounds in which every mask has its turn.
"""

import argparse
import json
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import mean, median, stdev

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from modalign import masks
from modalign.bench import environment
from modalign.data import load
from modalign.nn import CompositeDecoderLayer, DecoderLayer, NoVisualAttentionLayer, token_streams

KINDS = {"full": "full causal", "image_prefix": "image prefix", "composite": "composite", "naavit": "NAAViT", "modality_mutual": "modality-mutual"}
QUESTIONS = ("name", "keyword")
SIDE, PATCH, WORDS, LEAST = 36, 4, 6, 4
GRID = SIDE // PATCH
T_95 = {2: 12.706, 3: 4.303, 5: 2.776}  # of a t distribution, by the number of seeds
SETTINGS = {"width": 128, "heads": 4, "hidden": 256, "layers": 4, "steps": 400, "batch": 32, "learning_rate": 2e-3, "weight_decay": 0.1, "test_items": 500}
QUICK = SETTINGS | {"width": 32, "hidden": 64, "steps": 6, "batch": 8, "test_items": 32}
ROUNDS = 40
TOKENS = masks.layout([("prefix", 1), ("visual", (GRID, GRID)), ("question", 1), ("answer", WORDS)])
STREAMS = token_streams(TOKENS)


# ---------------------------------------------------------------------------------------------------------------------------------------------- pictures


class Pictures:
    """Pictures of emoji-mini as pixels, names and keywords as numbers of words."""

    def __init__(self):
        import numpy as np

        self.data = load("emoji-mini")
        self.pixels = torch.stack([torch.from_numpy(np.array(self.data.picture(item))) for item in range(len(self.data))]).permute(0, 3, 1, 2) / 127.5 - 1  # white is 1
        said = {"name": [[item["name"].lower().split()] for item in self.data.items], "keyword": [[each.lower().split() for each in item["keywords"]] for item in self.data.items]}
        of_items = Counter(word for both in zip(*said.values(), strict=True) for word in {word for answers in both for answer in answers for word in answer})
        self.words = ["", *QUESTIONS, "rare", *sorted(word for word, count in of_items.items() if count >= LEAST)]  # "" begins and ends; 1 and 2 are the questions
        number = {word: n for n, word in enumerate(self.words) if n > 3}
        self.answers = {
            question: [[[number.get(word, 3) for word in answer] for answer in answers if len(answer) <= WORDS] for answers in of] for question, of in said.items()
        }

    def split(self, seed):
        parts = self.data.splits(seed)
        return tuple([item for item in part.tolist() if self.answers["name"][item]] for part in (parts.train, parts.test))

    def batch(self, items, questions, generator=None):
        """patches [B, 81, 48], words and what follows each [B, 1 + 1 + 6], -100: nothing. With a generator: pictures moved by up to two pixels, any of the keywords."""
        pixels, words, follow = self.pixels[items], [], []
        for item, question in zip(items, questions, strict=True):
            answers = self.answers[question][item]
            answer = answers[int(torch.randint(len(answers), (), generator=generator)) if generator else 0]
            rest = WORDS - len(answer)
            words.append([0, 1 + QUESTIONS.index(question), *answer] + [0] * rest)
            follow.append([-100, *answer, 0] + [-100] * rest)
        if generator:
            wide, moved = F.pad(pixels, (2, 2, 2, 2), value=1.0), torch.randint(5, (len(items), 2), generator=generator).tolist()
            pixels = torch.stack([picture[:, y : y + SIDE, x : x + SIDE] for picture, (y, x) in zip(wide, moved, strict=True)])
        patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)
        return patches, torch.tensor(words), torch.tensor(follow)

    def drawn(self, items, size, generator):
        chosen = [items[n] for n in torch.randint(len(items), (size,), generator=generator).tolist()]
        questions = [QUESTIONS[n] if self.answers["keyword"][item] else "name" for item, n in zip(chosen, torch.randint(2, (size,), generator=generator).tolist(), strict=True)]
        return self.batch(chosen, questions, generator)


# ----------------------------------------------------------------------------------------------------------------------------------------------- decoders


def decoder_mask(kind):
    """Of the rows that are launched."""
    return {"full": lambda: masks.causal(len(TOKENS)), "image_prefix": lambda: masks.image_prefix(TOKENS), "modality_mutual": lambda: masks.modality_mutual(TOKENS)}.get(kind, STREAMS.text_mask)()


class Decoder(nn.Module):
    def __init__(self, kind, words, settings):
        super().__init__()
        width, options = settings["width"], {"heads": settings["heads"], "hidden": settings["hidden"]}
        self.kind, self.mask = kind, decoder_mask(kind)
        self.patches, self.places = nn.Linear(3 * PATCH**2, width), nn.Parameter(0.02 * torch.randn(GRID**2, width))
        self.words = nn.Embedding(words, width)
        layer = {"composite": CompositeDecoderLayer, "naavit": NoVisualAttentionLayer}.get(kind, DecoderLayer)
        options |= {"feature_width": width} if kind == "naavit" else {}
        self.layers = nn.ModuleList(layer(width, **options) for _ in range(settings["layers"]))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, patches, words):
        """Logits of the words that follow, [B, 8, words]."""
        visual, text = self.patches(patches) + self.places, self.words(words)
        positions = {"text_positions": STREAMS.text.index, "visual_positions": STREAMS.visual.index}
        if self.kind in ("composite", "naavit"):
            for layer in self.layers:
                if self.kind == "composite":
                    text, visual = layer(text, visual, self.mask, **positions)
                else:
                    text = layer(text, visual, self.mask, **positions)
        else:
            x = STREAMS.put(text, visual)
            for layer in self.layers:
                x = layer(x, self.mask)
            text, _ = STREAMS.take(x)
        return self.head(self.norm(text))


class Training:
    """A decoder and its optimizer."""

    def __init__(self, kind, words, seed, settings):
        torch.manual_seed(seed)
        self.decoder = Decoder(kind, words, settings)
        self.optimizer = torch.optim.AdamW(self.decoder.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"])
        up, steps = 0.1 * settings["steps"], settings["steps"]
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: max(0.0, min((step + 1) / up, (steps - step) / (steps - up))))

    def step(self, patches, words, follow):
        loss = F.cross_entropy(self.decoder(patches, words).flatten(0, 1), follow.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return float(loss.detach())


def learn(pictures, kind, seed, settings, told):
    """Held-out losses of one run."""
    train, test = pictures.split(seed)
    training, generator = Training(kind, len(pictures.words), seed, settings), torch.Generator().manual_seed(seed)
    for step in range(settings["steps"]):
        told(step + 1, training.step(*pictures.drawn(train, settings["batch"], generator)))
    found = {}
    with torch.no_grad():
        for question in QUESTIONS:
            asked = [item for item in test[: settings["test_items"]] if pictures.answers[question][item]]
            losses = {"loss": 0.0, "other_pictures": 0.0}
            for start in range(0, len(asked), 64):
                patches, words, follow = pictures.batch(asked[start : start + 64], [question] * len(asked[start : start + 64]))
                for name, seen in (("loss", patches), ("other_pictures", patches.roll(1, 0))):
                    losses[name] += float(F.cross_entropy(training.decoder(seen, words).flatten(0, 1), follow.flatten(), reduction="sum"))
            count = sum(len(pictures.answers[question][item][0]) + 1 for item in asked)
            found[question] = {name: total / count for name, total in losses.items()} | {"words": count}
    total = sum(one["words"] for one in found.values())
    return {name: sum(one[name] * one["words"] for one in found.values()) / total for name in ("loss", "other_pictures")} | {"by_question": found}


def costs(pictures, settings, rounds):
    """{kind: rows that are launched, pairs that are kept, FLOPs of a step, milliseconds of every round}"""
    batch = pictures.drawn(pictures.split(0)[0], settings["batch"], torch.Generator().manual_seed(0))
    trainings = {kind: Training(kind, len(pictures.words), 0, settings) for kind in KINDS}
    found = {}
    for kind, training in trainings.items():
        mask = training.decoder.mask
        with FlopCounterMode(display=False) as counter:  # knows nothing of our op
            training.step(*batch)
        products = 3.5 * settings["layers"] * mask.flops(settings["heads"], settings["width"] // settings["heads"], batch=settings["batch"])
        found[kind] = {"rows": mask.queries, "pairs": mask.kept() * mask.queries * mask.keys, "linear_flops": counter.get_total_flops(), "attention_flops": products, "milliseconds": []}
    for turn in range(rounds + 1):
        for kind in list(KINDS) if turn % 2 else list(reversed(KINDS)):
            began = time.perf_counter()
            trainings[kind].step(*batch)
            if turn:  # the first warms up
                found[kind]["milliseconds"].append(1e3 * (time.perf_counter() - began))
    return found


# -------------------------------------------------------------------------------------------------------------------------------------------- the results


def table(results):
    costs, count = results["costs"], len(results["seeds"])
    lines = ["| mask | rows of a layer | pairs kept | loss of a held-out word | less full causal, 95 % interval | with other pictures | GFLOP of a step | ms of a step |"]
    lines.append("|---|" + "---:|" * 7)
    losses = {kind: [results["runs"][f"{kind}, {seed}"] for seed in results["seeds"]] for kind in KINDS}
    for kind, name in KINDS.items():
        loss, apart = [one["loss"] for one in losses[kind]], "–"
        if kind != "full":
            difference = [one - other["loss"] for one, other in zip(loss, losses["full"], strict=True)]
            apart = f"{mean(difference):+.3f}"
            if count in T_95:
                half = T_95[count] * stdev(difference) / count**0.5
                apart += f" ({mean(difference) - half:+.3f} … {mean(difference) + half:+.3f})"
        one = costs[kind]
        spread = f" ± {stdev(loss):.3f}" if count > 1 else ""
        flops = one["linear_flops"] + one["attention_flops"]
        took = f"{median(one['milliseconds']):.0f}" if one["milliseconds"] else "–"
        cells = [name, f"{one['rows']}", f"{one['pairs']:.0f}", f"{mean(loss):.3f}{spread}", apart, f"{mean(each['other_pictures'] for each in losses[kind]):.3f}", f"{flops / 1e9:.2f}", took]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, help="settings are chosen on other seeds than those reported")
    parser.add_argument("--steps", type=int, help=f"default {SETTINGS['steps']}")
    parser.add_argument("--rounds", type=int, help=f"of timing, default {ROUNDS}; 0: no times, which a quiet machine can add later with --resume")
    parser.add_argument("--quick", action="store_true", help="a narrow decoder and few steps: it runs, and learns nothing to speak of")
    parser.add_argument("--out", type=Path, help="results as JSON, written after each run")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are in --out, and times if there are any")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = QUICK if arguments.quick else SETTINGS
    settings = settings | ({"steps": arguments.steps} if arguments.steps else {})
    rounds = (2 if arguments.quick else ROUNDS) if arguments.rounds is None else arguments.rounds
    seeds = list(range(arguments.first_seed, arguments.first_seed + (1 if arguments.quick else arguments.seeds)))
    runs, measured = {}, None
    if arguments.resume and arguments.out and arguments.out.exists():
        before = json.loads(arguments.out.read_text(encoding="utf-8"))
        if before["settings"] != settings:
            parser.error(f"--resume: {arguments.out.name} was made with other settings")
        runs, measured = before["runs"], before["costs"]
    pictures = Pictures()
    if measured is None or rounds and not measured["full"]["milliseconds"]:
        measured = costs(pictures, settings, rounds)

    def results():
        words = shlex.join(["python", "examples/masks_on_pictures.py", *sys.argv[1:]])
        content = {"metric": "loss of a held-out word, nats", "command": words, "settings": settings, "seeds": seeds, "runs": runs, "costs": measured}
        return content | {"environment": environment.describe(torch.device("cpu"), 0)}

    def written():
        if arguments.out:
            from modalign._files import write_json

            write_json(arguments.out, results())

    written()
    for seed in seeds:
        for kind in KINDS:
            name, began = f"{kind}, {seed}", time.monotonic()
            if name in runs:
                continue

            def told(step, loss, name=name, began=began):
                if step % 25 == 0:
                    print(f"\r{name}: step {step} of {settings['steps']}, loss {loss:.3f}, {time.monotonic() - began:.0f} s", end="", file=sys.stderr, flush=True)

            try:
                runs[name] = learn(pictures, kind, seed, settings, told)
            except KeyboardInterrupt:
                sys.exit(f"\nstopped in {name}; {'the runs before it are kept: --resume' if arguments.out else 'nothing is kept without --out'}")
            print("\r\033[K", end="", file=sys.stderr)
            print(f"{name}: loss {runs[name]['loss']:.3f}, with other pictures {runs[name]['other_pictures']:.3f}", flush=True)
            written()
    print(table(results()), end="")
    print(f"{len(seeds)} seeds; mean and standard deviation; differences within a seed")


if __name__ == "__main__":
    main()
