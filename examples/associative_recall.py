"""What a small decoder recalls when every query keeps all keys, the last 64, or 64 that it chooses. [Zoology, ICLR 2024; Dynamic Mask Attention, 2025]

    python examples/associative_recall.py --quick                                                                     # sees that it runs, seconds
    python examples/associative_recall.py --seeds 5 --out benchmarks/results/associative_recall.json --resume         # two hours or so on one core

Multi-query associative recall: pairs of a key and a value, then some of the places are the keys again, and there the value is asked for; everything else is noise. Places follow Zoology's
power law (most of the questions come soon, some late). Needle: one pair in the first half of the noise, asked for at the very end. One model for each kind of attention and seed learns all
of them at once, the same sequences for each kind: two layers, rotary positions, and nothing but attention that moves between tokens. Training goes from sequences of 64 tokens, where all kinds
keep the same keys, to those of 512 that are tested; a length has the numbers of pairs that leave half of it to the questions.

Dynamic masks score a key by its value, A softplus(dt_proj v), and add the score to the logits; A starts at 0, where equal scores make a window of the last 64. So "dynamic" begins as
"window" and has 2 (width + 1) numbers a layer more.

Metric, named before any run: the share of questions answered right on test sequences that are the same for all.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn
from torch.nn import functional as F

from modalign import masks
from modalign.bench import environment
from modalign.nn import DecoderLayer, DynamicMaskAttention

KINDS = {"full": "all keys", "window": "the last ones", "dynamic": "chosen by the dynamic mask"}
KEYS, VALUES, NOISE = 128, 128, 64  # tokens of each sort, one after the other
POWER = 0.01  # of the law of places
TASKS = (4, 8, 16, 32, 64, "needle")  # numbers of pairs
T_95 = {2: 12.706, 3: 4.303, 5: 2.776}  # of a t distribution, by the number of seeds
STAGES = [[64, 0.5], [128, 0.2], [256, 0.15], [512, 0.15]]  # lengths and their share of the steps
SETTINGS = {"keep": 64, "width": 64, "heads": 2, "layers": 2, "steps": 3000, "stages": STAGES, "tokens": 6144, "learning_rate": 3e-3, "test_rows": 64, "tasks": list(TASKS)}
QUICK = SETTINGS | {"keep": 16, "width": 32, "steps": 20, "stages": [[16, 0.5], [64, 0.5]], "tokens": 1024, "test_rows": 16, "tasks": [4, 8, "needle"]}


# ---------------------------------------------------------------------------------------------------------------------------------------------- the task


def recall(rows, pairs, length, generator):
    """tokens and answers [rows, length]; -100 where nothing is asked."""
    tokens = torch.randint(KEYS + VALUES, KEYS + VALUES + NOISE, (rows, length), generator=generator)
    answers = torch.full((rows, length), -100)
    keys, values = (torch.rand(rows, count, generator=generator).argsort(1)[:, :pairs] for count in (KEYS, VALUES))
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, KEYS + values
    places = torch.arange(1, (length - 2 * pairs) // 2 + 1, dtype=torch.float64) ** (POWER - 1)
    asked = 2 * pairs + 2 * torch.multinomial(places.expand(rows, -1), pairs, generator=generator)
    return tokens.scatter(1, asked, keys), answers.scatter(1, asked, values)


def needle(rows, length, generator):
    tokens, answers = recall(rows, 1, length, generator)
    key, value = tokens[:, :1].clone(), tokens[:, 1:2].clone()
    tokens = torch.randint(KEYS + VALUES, KEYS + VALUES + NOISE, (rows, length), generator=generator)
    at = torch.randint(length // 2 - 1, (rows, 1), generator=generator)
    tokens = tokens.scatter(1, at, key).scatter(1, at + 1, value)
    tokens[:, -1:], answers = key, torch.full_like(answers, -100)
    answers[:, -1:] = value - KEYS
    return tokens, answers


def sequences(task, rows, length, generator):
    return needle(rows, length, generator) if task == "needle" else recall(rows, task, length, generator)


# --------------------------------------------------------------------------------------------------------------------------------------------- the model


class DynamicDecoderLayer(DecoderLayer):
    """A decoder layer that chooses the keys it keeps."""

    def __init__(self, width, heads, keep):
        super().__init__(width, heads)
        self.self_attn = DynamicMaskAttention(width, heads, keep=keep, rotary=self.self_attn.rotary)

    def forward(self, x):
        return self.feed_forward(x + self.self_attn(self.input_layernorm(x)))


class Decoder(nn.Module):
    def __init__(self, kind, settings):
        super().__init__()
        width, heads, keep = settings["width"], settings["heads"], settings["keep"]
        self.embedding = nn.Embedding(KEYS + VALUES + NOISE, width)
        layers = [DynamicDecoderLayer(width, heads, keep) if kind == "dynamic" else DecoderLayer(width, heads) for _ in range(settings["layers"])]
        self.layers, self.norm, self.head = nn.ModuleList(layers), nn.RMSNorm(width), nn.Linear(width, VALUES, bias=False)
        self.mask = {"full": masks.causal, "window": lambda length: masks.causal(length, window=keep)}.get(kind)

    def forward(self, tokens):
        x, mask = self.embedding(tokens), (self.mask(tokens.shape[1]),) if self.mask else ()
        for layer in self.layers:
            x = layer(x, *mask)
        return self.head(self.norm(x))


def training_batch(step, settings, generator):
    """Sequences of the length that is due, as many of every task."""
    ends = torch.tensor([share for _, share in settings["stages"]]).cumsum(0) * settings["steps"]
    length = settings["stages"][min(int((step >= ends).sum()), len(ends) - 1)][0]
    tasks = [task for task in settings["tasks"] if task == "needle" or 4 * task <= length]
    rows = settings["tokens"] // (length * len(tasks))
    return map(torch.cat, zip(*(sequences(task, rows, length, generator) for task in tasks), strict=True))


def learn(kind, seed, settings, told):
    torch.manual_seed(seed)
    model = Decoder(kind, settings)
    generator = torch.Generator().manual_seed(seed)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=settings["learning_rate"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings["learning_rate"], total_steps=settings["steps"], pct_start=0.1)
    for step in range(settings["steps"]):
        tokens, answers = training_batch(step, settings, generator)
        asked = answers >= 0
        each = F.cross_entropy(model(tokens)[asked], answers[asked], reduction="none")
        loss = (each / asked.sum(1, keepdim=True).expand_as(asked)[asked]).sum() / len(tokens)  # every sequence counts as much
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        told(step + 1, float(loss.detach()))
    return model


@torch.no_grad()
def rate(model, settings):
    """{task: percent of the questions answered right}"""
    found = {}
    for number, task in enumerate(settings["tasks"]):
        tokens, answers = sequences(task, settings["test_rows"], settings["stages"][-1][0], torch.Generator().manual_seed(10**6 + number))
        right = torch.cat([model(part).argmax(2) for part in tokens.split(16)]) == answers
        found[str(task)] = 100 * float(right[answers >= 0].double().mean())
    return found


# -------------------------------------------------------------------------------------------------------------------------------------------- the results


def shown(values):
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def gain(one, other):
    """Mean difference within a seed and its 95 % interval."""
    difference = [a - b for a, b in zip(one, other, strict=True)]
    if len(difference) not in T_95:
        return f"{mean(difference):+.1f}"
    half = T_95[len(difference)] * stdev(difference) / len(difference) ** 0.5
    return f"{mean(difference):+.1f} [{mean(difference) - half:+.1f} … {mean(difference) + half:+.1f}]"


def table(results):
    tasks = [str(task) for task in results["settings"]["tasks"]]
    lines = ["| keys of a query | " + " | ".join(task if task == "needle" else f"{task} pairs" for task in tasks) + " |", "|---|" + "---:|" * len(tasks)]
    scores = {kind: [results["runs"][f"{kind}, {seed}"] for seed in results["seeds"]] for kind in KINDS}
    for kind, what in KINDS.items():
        name = what if kind == "full" else f"{results['settings']['keep']}, {what}"
        lines.append(f"| {name} | " + " | ".join(shown([one[task] for one in scores[kind]]) for task in tasks) + " |")
    lines.append("| chosen less last | " + " | ".join(gain(*([one[task] for one in scores[kind]] for kind in ("dynamic", "window"))) for task in tasks) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, help="settings are chosen on other seeds than those reported")
    parser.add_argument("--steps", type=int, help=f"default {SETTINGS['steps']}")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of attention; a table needs all")
    parser.add_argument("--quick", action="store_true", help="short sequences and few steps: it runs, and learns nothing to speak of")
    parser.add_argument("--out", type=Path, help="results as JSON, written after each run")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are in --out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = QUICK if arguments.quick else SETTINGS
    settings = settings | ({"steps": arguments.steps} if arguments.steps else {})
    seeds = list(range(arguments.first_seed, arguments.first_seed + (2 if arguments.quick else arguments.seeds)))
    runs = {}
    if arguments.resume and arguments.out and arguments.out.exists():
        before = json.loads(arguments.out.read_text(encoding="utf-8"))
        if before["settings"] != settings:
            parser.error(f"--resume: {arguments.out.name} was made with other settings")
        runs = before["runs"]

    def results():
        words = shlex.join(["python", "examples/associative_recall.py", *sys.argv[1:]])
        content = {"metric": "percent of the questions answered right", "command": words, "settings": settings, "seeds": seeds, "runs": runs}
        return content | {"environment": environment.describe(torch.device("cpu"), 0)}

    for seed in seeds:
        for kind in arguments.kinds:
            name, began = f"{kind}, {seed}", time.monotonic()
            if name in runs:
                continue

            def told(step, loss, name=name, began=began):
                if step % 25 == 0:
                    print(f"\r{name}: step {step} of {settings['steps']}, loss {loss:.3f}, {time.monotonic() - began:.0f} s", end="", file=sys.stderr, flush=True)

            try:
                runs[name] = rate(learn(kind, seed, settings, told), settings)
            except KeyboardInterrupt:
                sys.exit(f"\nstopped in {name}; {'the runs before it are kept: --resume' if arguments.out else 'nothing is kept without --out'}")
            print("\r\033[K", end="", file=sys.stderr)
            print(f"{name}: " + ", ".join(f"{task} {score:.1f}" for task, score in runs[name].items()), flush=True)
            if arguments.out:
                from modalign._files import write_json

                write_json(arguments.out, results())
    if set(arguments.kinds) == set(KINDS):
        print(table(results()), end="")
        print(f"percent of the questions answered right, {len(seeds)} seeds; mean and standard deviation, 95 % interval of the difference within a seed")


if __name__ == "__main__":
    main()
