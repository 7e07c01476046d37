"""MkDocs hooks. Formulas become MathML while the site is built, so that reading them needs no script and no network; so do benchmark results become pages."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
REPORTS = ("gram_volume",)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    def mathml(formula: re.Match[str]) -> str:
        tag, bracket, latex = formula.groups()
        display = "block" if bracket == "[" else "inline"
        return f'<{tag} class="formula">{convert(html.unescape(latex).strip(), display=display)}</{tag}>'

    return _FORMULA.sub(mathml, content)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """reports/NAME.html: what `modalign bench report` makes of benchmarks/results/NAME.json."""
    from modalign.bench import read_results, report

    for name in REPORTS:
        source = f"benchmarks/results/{name}.json"
        files.append(File.generated(config, f"reports/{name}.html", content=report.html_report([(source, read_results(ROOT / source))])))
    return files
