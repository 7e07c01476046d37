"""The table of losses in docs/align.md, from benchmarks/results/align_furniture_*.json. `python docs/loss_table.py` writes it, with --check it fails
where it is stale.

Metric, named before any run: text -> picture + points together, R@10, on the 200 test items of `furniture`, seeds 0 to 4, each model by the score that
it was trained for. Differences are taken within a seed; the interval is the 95 % interval of their mean (t distribution, 4 degrees of freedom)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/align.md"
BLOCK = re.compile(r"(?<=<!-- losses -->\n).*?(?=<!-- /losses -->)", re.DOTALL)
T_95 = 2.776
LOSSES = (("clip", "pairwise InfoNCE alone", "sum of cosines"), ("volume", "volume alone", "volume"), ("gram", "volume + 1/3 pairwise", "volume"))


def scores(loss: str, score: str, row: str = "trained") -> list[float]:
    results = json.loads((ROOT / f"benchmarks/results/align_furniture_{loss}.json").read_text())
    return [100 * seed["table"][row][f"text → others, joint ({score})"]["r10"] for seed in results["seeds"]]


def table() -> str:
    lines = ["| loss | scored by | R@10, mean ± standard deviation | by seed | difference to pairwise alone, 95 % interval |", "|---|---|---|---|---|"]
    baseline = scores(*LOSSES[0][::2])
    cca = scores("clip", "sum of cosines", "cca")
    for name, score, found in (("none: CCA", "sum of cosines", cca), *((title, score, scores(loss, score)) for loss, title, score in LOSSES)):
        differences = [ours - theirs for ours, theirs in zip(found, baseline, strict=True)]
        half = T_95 * stdev(differences) / len(differences) ** 0.5
        apart = "–" if found == baseline else f"{mean(differences):+.1f} ({mean(differences) - half:+.1f} … {mean(differences) + half:+.1f})"
        lines.append(f"| {name} | {score} | {mean(found):.1f} ± {stdev(found):.1f} | {', '.join(f'{value:.1f}' for value in found)} | {apart} |")
    return "\n".join(lines) + "\n"


def main(check: bool) -> int:
    text = PAGE.read_text()
    assert len(BLOCK.findall(text)) == 1, f"{PAGE.name} must hold one block from <!-- losses --> to <!-- /losses -->"
    wanted = BLOCK.sub(lambda _: table(), text)
    if wanted != text and not check:
        PAGE.write_text(wanted)
    return 1 if check and wanted != text else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
