"""MkDocs hook: formulas become MathML while the site is built, so that reading them needs no script and no network."""

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    def mathml(formula: re.Match[str]) -> str:
        tag, bracket, latex = formula.groups()
        display = "block" if bracket == "[" else "inline"
        return f'<{tag} class="formula">{convert(html.unescape(latex).strip(), display=display)}</{tag}>'

    return _FORMULA.sub(mathml, content)
