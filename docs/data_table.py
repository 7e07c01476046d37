"""The table of prepared sets in docs/data.md, from benchmarks/results/prepared_sets.json. `python docs/data_table.py` writes it, with --check it fails where
it is stale; with --data-root DIR it first counts what `modalign prepare` left there and writes the JSON."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/data.md"
COUNTS = ROOT / "benchmarks/results/prepared_sets.json"
BLOCK = re.compile(r"(?<=<!-- sets -->\n).*?(?=<!-- /sets -->)", re.DOTALL)


def counted(root: Path) -> dict[str, dict]:
    from modalign.data import load
    from modalign.data.sources import SOURCES

    found = {}
    for name in SOURCES:
        dataset = load(name, root)
        about = json.loads((root / name / "items.json").read_text(encoding="utf-8"))
        found[name] = {
            "packages": dataset.source,
            "items": len(dataset),
            "captions": len(set(dataset.names)),
            "groups": len(dataset.groups.unique()),
            "modalities": {key: int(dataset.present[key].sum()) if key in dataset.present else len(dataset) for key in dataset.modalities},
            "left_out": about["left_out"],
            "unreadable": {kind: len(reasons) for kind, reasons in about["unreadable"].items()},
        }
    characters = [{item["character"].replace("\ufe0f", "") for item in load(name, root).items} for name in ("emoji", "openmoji")]
    found["openmoji"]["in_emoji"] = len(characters[0] & characters[1])
    return found


def table(found: dict[str, dict]) -> str:
    lines = ["| set | packages | items | captions | not all items have | left out while reading | files that do not read |", "|---|---|---:|---:|---|---|---|"]
    for name, one in found.items():
        lacking = ", ".join(f"{key} {count:,}" for key, count in one["modalities"].items() if count < one["items"])
        left_out = "; ".join(f"{count:,} {reason}" for reason, count in one["left_out"].items())
        unreadable = ", ".join(f"{kind} {count:,}" for kind, count in one["unreadable"].items())
        cells = [f"`{name}`", one["packages"], f"{one['items']:,}", f"{one['captions']:,}", lacking or "–", left_out or "–", unreadable or "–"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    if options.data_root:
        from modalign._files import write_json

        write_json(COUNTS, counted(options.data_root))
    text = PAGE.read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) == 1, f"{PAGE.name} must hold one block from <!-- sets --> to <!-- /sets -->"
    wanted = BLOCK.sub(lambda _: table(json.loads(COUNTS.read_text(encoding="utf-8"))), text)
    if wanted != text and not options.check:
        PAGE.write_text(wanted, encoding="utf-8")
    return 1 if options.check and wanted != text else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
