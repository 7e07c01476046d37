"""Where files of cases are, and which cases a name means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .._load import PACKAGE
from .registry import Case, cases, load_cases, sources


def case_files(folder: Path = PACKAGE.parent.parent / "benchmarks") -> list[Path]:
    """Those of `folder`, which is where a checkout keeps them, otherwise those installed with the package."""
    if (folder / "cases").is_dir():
        return sorted([*folder.glob("cases/*.py"), *folder.glob("*/cases.py")])
    return sorted((PACKAGE / "bench" / "cases").glob("*.py"))


def load_all(more: Sequence[Path] = ()) -> dict[str, Case]:
    """All cases: the package's own and those of `more`."""
    _load([*case_files(), *_files_in(more)])
    return cases()


def cases_of(names: Sequence[str], more: Sequence[Path] = ()) -> list[Case]:
    """Each name is a case, or a path to a file of cases, which means all of them. `more` are files of cases or folders of such files. All are loaded
    before any name is looked up, so that the order does not matter."""
    known = load_all([*more, *(Path(name) for name in names if name.endswith(".py"))])
    chosen: dict[str, Case] = {}
    for name in names:
        if name.endswith(".py"):
            chosen.update({case.name: case for case in known.values() if case.file == str(Path(name).resolve())})
        elif name in known:
            chosen[name] = known[name]
        else:
            raise ValueError(f"bench: case must be one of {sorted(known)} or a file of cases, got {name!r}")
    if not chosen:
        raise ValueError(f"bench: case must be one of {sorted(known)} or a file that declares one, got {', '.join(names)}")
    return list(chosen.values())


def _files_in(paths: Sequence[Path]) -> list[Path]:
    found = []
    for path in paths:
        files = sorted(path.glob("*.py")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"bench: --cases must be a file of cases or a folder of such files, got {path}")
        found += files
    return found


def _load(files: Sequence[Path]) -> None:
    for path in files:
        if str(path.resolve()) not in sources():  # once per process: loading again would forget the providers added since
            load_cases(path)
