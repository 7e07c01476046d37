"""The table of ops in README.md and docs/ops/index.md, from what the code declares. `python docs/op_table.py` writes it, with --check it fails where a table is stale.

dtypes, double backward, determinism   tests/cases.py, where the battery tests each of them
CPU                                    a compiled kernel is registered for the op
CUDA                                   the catalogue of kernels that the emulator runs, the targets of the last `make wheel` (benchmarks/results/wheel.json), and the benchmark JSON files written on a GPU
paper                                  the first line of the op's file
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("README.md", "docs/ops/index.md")
BLOCK = re.compile(r"(?<=<!-- ops -->\n).*?(?=<!-- /ops -->)", re.DOTALL)


def cuda_targets() -> str:
    built = json.loads((ROOT / "benchmarks/results/wheel.json").read_text())["built"]["cuda_targets"]
    names = [f"PTX {target[:-8]}" if target.endswith("-virtual") else f"sm_{target.removesuffix('-real')}" for target in built]
    return ", ".join(names)


def devices_that_ran(op: str) -> list[str]:
    """GPUs on which a benchmark checked the result of this op and timed it."""
    found = set()
    for path in sorted((ROOT / "benchmarks/results").rglob("*.json")):
        results = json.loads(path.read_text())
        gpu = results.get("environment", {}).get("gpu") if isinstance(results, dict) else None
        if gpu and any(row["case"] == op and row["kind"] == "ours" and row["status"] == "ok" for row in results["rows"]):
            found.add(gpu["model"])
    return sorted(found)


FAMILIES = {  # of kernels that are not named after their op
    "dynamic_mask_ends": "dynamic_mask_attention",
    "gram_contrastive_loss": "contrastive_volume",
    "triangle_contrastive_loss": "contrastive_triangle",
    "clip_loss": "contrastive_product",
    "cosine_sum_contrastive_loss": "contrastive_product",
    "pairwise_logsumexp": "contrastive_product",
    "siglip_loss": "contrastive_product",
    "attention_column_sum": "attention_scores",
}


PLAIN = ("attention_rows",)  # a few rows of a softmax


def cuda(op: str, families: set[str], covered: bool) -> str:
    if FAMILIES.get(op, op) not in families:
        return "plain torch; not yet run on a GPU" if covered else "no"
    ran = devices_that_ran(op)
    state = f"run on {', '.join(ran)}" if ran else "compiled and proved in the emulator; not yet run on a GPU"
    return f"{cuda_targets()}: {state}"


def paper(op: str) -> str:
    cited = re.search(r"\[([^\]]+)\]", (ROOT / f"python/modalign/ops/{op}.py").read_text().split("\n", 1)[0])
    assert cited, f"the first line of {op}.py names the paper in brackets"
    return cited[1]


def table(link: str) -> str:
    sys.path.insert(0, str(ROOT / "tests"))
    import cases

    from modalign import _host, info, ops

    declared = {case.name: case for case in reversed(cases.CASES)}  # the first entry of an op; later ones are samples of other sizes
    by_attention = ("masked_attention_varlen", "scaled_dot_product_attention", "neighborhood_attention", "virtual_unmerge_attention", "attention_columns", "attention_segment_mass")
    raw = {**dict.fromkeys(by_attention, "masked_attention"), "attention_power_iteration": "attention_column_sum", "dynamic_mask_attention": "dynamic_mask_ends", "merge_tokens": "match_tokens"}  # other ways to call an op
    covered, families = info.ops(), {kernel["family"] for kernel in _host.kernels().values()}
    yes = {True: "yes", False: "no"}
    lines = ["| op | CPU | CUDA | dtypes | backward | double backward | deterministic | paper |", "|---|---|---|---|---|---|---|---|"]
    for name in ops.__all__:
        if name in cases.SELECTIONS:
            continue
        case = declared[name]
        cells = [
            f"[`{name}`]({link.format(name)})",
            "plain torch" if name in PLAIN else yes["CPU" in covered[raw.get(name, name)]],
            "plain torch; not yet run on a GPU" if name in PLAIN else cuda(raw.get(name, name), families, "CUDA" in covered[raw.get(name, name)]),
            ", ".join(str(dtype).removeprefix("torch.") for dtype in case.dtypes),
            "yes",  # the battery takes gradients of every case
            "yes" if case.double_backward else "no, raises",
            yes[case.deterministic],
            paper(name),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def rendered(file: str) -> tuple[str, str]:
    """The text of the file as it is and as it should be."""
    text = (ROOT / file).read_text()
    assert len(BLOCK.findall(text)) == 1, f"{file} must hold one block from <!-- ops --> to <!-- /ops -->"
    link = "docs/ops/{}.md" if file == "README.md" else "{}.md"
    return text, BLOCK.sub(lambda _: table(link), text)


def main(check: bool) -> int:
    stale = [file for file in FILES if len(set(rendered(file))) > 1]
    for file in stale:
        print(f"{'stale' if check else 'written'}: {file}")
        if not check:
            (ROOT / file).write_text(rendered(file)[1])
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
