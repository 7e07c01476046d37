"""The tables of docs/learning_under_masks.md, from benchmarks/results/associative_recall.json and masks_on_pictures.json. `python docs/learning_table.py` writes them, with --check it fails
where one is stale. The examples that made the JSON make the tables too; runs that nobody has made yet are told by their command."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/learning_under_masks.md"
EXAMPLES = ("associative_recall", "masks_on_pictures")


def table(name: str) -> str:
    path = ROOT / f"benchmarks/results/{name}.json"
    if not path.exists():
        return f"Not run yet: `python examples/{name}.py --seeds 5 --out benchmarks/results/{name}.json --resume`.\n"
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = json.loads(path.read_text(encoding="utf-8"))
    return f"{module.table(results)}\n*`{results['command']}`*\n"


def main(check: bool) -> int:
    text = wanted = PAGE.read_text(encoding="utf-8")
    for name in EXAMPLES:
        block = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
        assert len(block.findall(text)) == 1, f"{PAGE.name} must hold one block from <!-- {name} --> to <!-- /{name} -->"
        wanted = block.sub(lambda _, name=name: table(name), wanted)
    if wanted != text and not check:
        PAGE.write_text(wanted, encoding="utf-8")
    return 1 if check and wanted != text else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
