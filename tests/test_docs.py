"""README and documentation say what the code does: tables are what the declarations and the JSON give, links and figures are there. Their examples are tests of their
own (pytest collects doctests of docs and README.md)."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest

from modalign import ops
from modalign.bench import tables

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
MAX_FIGURE_BYTES = 60 << 10


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def op_table():
    return module_of(DOCS / "op_table.py")


# --------------------------------------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("file", ["README.md", "docs/ops/index.md"])
def test_table_of_ops_is_what_the_code_declares(op_table, file):
    now, wanted = op_table.rendered(file)
    assert now == wanted, "run: python docs/op_table.py"


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- bench " in page.read_text()], ids=name_of)
def test_benchmark_tables_are_what_their_json_says(page, monkeypatch):
    monkeypatch.chdir(ROOT)   # sources are relative to the repository
    assert tables.render(page.read_text()) == page.read_text(), f"run: python -m modalign.bench.tables {name_of(page)}"


def test_table_of_prepared_sets_is_what_was_counted():
    module = module_of(DOCS / "data_table.py")
    assert module.main(["--check"]) == 0, "run: python docs/data_table.py"
    found = json.loads(module.COUNTS.read_text())
    page = module.PAGE.read_text()
    for name, one in found.items():
        assert re.search(rf"^\| `{name}` \| {one['items']:,} \|", page, re.MULTILINE), name  # the table above it
    assert found["openmoji"]["in_emoji"] == found["emoji"]["items"]  # what the page says


def test_table_of_losses_is_what_the_runs_gave():
    module = module_of(DOCS / "loss_table.py")
    assert module.main(check=True) == 0, "run: python docs/loss_table.py"
    mix, pairs = module.scores("gram", "volume"), module.scores("clip", "sum of cosines")
    assert all(ours > theirs for ours, theirs in zip(mix, pairs, strict=True))  # what the page says under the table


def test_table_of_views_is_what_the_run_gave():
    module = module_of(ROOT / "examples/text_weighted_views.py")
    results = json.loads((ROOT / "benchmarks/results/text_weighted_views.json").read_text())
    page = (DOCS / "losses/jma_loss.md").read_text()
    assert f"<!-- views -->\n{module.table(results)}<!-- /views -->" in page and results["command"].replace("python ", "") in page
    assert all(several > one for several, one in zip(results["r10"]["mean"], results["r10"]["one view"], strict=True))  # what the page says


def test_table_of_a_vit_that_merges_tokens_is_what_the_run_gave():
    module = module_of(ROOT / "examples/merge_tokens_in_a_vit.py")
    results = json.loads((ROOT / "benchmarks/results/merge_tokens_in_a_vit.json").read_text())
    assert f"<!-- vit -->\n{module.table(results)}<!-- /vit -->" in (DOCS / "token_merging.md").read_text()
    kept = {str(row["r"]): row["same neighbour"] for row in results["rows"]}
    assert round(kept["8"], 2) == 0.98  # what the page says


def test_tables_of_learning_under_masks_are_what_the_runs_gave():
    assert module_of(DOCS / "learning_table.py").main(check=True) == 0, "run: python docs/learning_table.py"


# ------------------------------------------------------------------------------------------------------------------------------------------ ops have pages


@pytest.mark.parametrize("op", ops.__all__)
def test_every_op_has_a_docstring_and_a_page(op):
    documentation = inspect.getdoc(getattr(ops, op))
    for part in (">>> ", "Parameters", "Returns", "Gradient", "Edges", "Raises", "Complexity", "Paper"):
        assert part in documentation, f"the docstring of {op} must have {part}"
    page = (DOCS / "ops" / f"{op}.md").read_text()
    for part in ("## Formula", "## Shapes", "## Gradient", "## Precision", "## Edge cases", "## Complexity", "../figures/", f"::: modalign.ops.{op}.{op}"):
        assert part in page, f"docs/ops/{op}.md must have {part}"
    for parameter in inspect.signature(getattr(ops, op)).parameters:
        assert f"`{parameter}`" in page, f"docs/ops/{op}.md must speak of {parameter}"


# ---------------------------------------------------------------------------------------------------------------------------------------- links and figures


def anchors(page: Path) -> set[str]:
    """What headings become in the site."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"(?<!\\)\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", link):
            continue
        if report := re.fullmatch(r"reports/(\w+)\.html", link):  # made by docs/hooks.py of the file of this name
            link = f"../benchmarks/results/{report[1]}.json"
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{name_of(page)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)}: {link}, headings there: {sorted(anchors(target))}"


def test_every_page_is_in_the_navigation():
    # MkDocs asks for its own loader to read the whole file; paths of pages stand at line ends
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n", 1)[1]
    named = re.findall(r"(\S+\.md)$", nav, re.MULTILINE)
    assert sorted(named) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_every_figure_has_its_script_and_is_shown_and_small():
    scripts = {path.stem for path in (DOCS / "figures").glob("*.py")} - {"drawing"}
    drawn = {path.stem: path for path in (DOCS / "figures").glob("*.svg")}
    assert scripts == set(drawn)
    text = "".join(page.read_text() for page in PAGES)
    for name, path in drawn.items():
        assert f"figures/{name}.svg" in text, f"{name} is on no page"
        assert path.stat().st_size <= MAX_FIGURE_BYTES, f"{name} has {path.stat().st_size} bytes"


def test_documentation_tools_are_pinned_and_without_torch():
    lines = [line for line in (ROOT / "requirements-docs.lock").read_text().splitlines() if line and not line.startswith("#")]
    assert lines and all("==" in line.split(";")[0] for line in lines)
    assert not any(line.startswith("torch") for line in lines)
