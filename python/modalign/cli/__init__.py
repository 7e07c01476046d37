"""The command line. `app` holds the commands, `main` is the entry point."""

from __future__ import annotations

import sys

__all__ = ["main"]

REMEDY = "modalign: this command needs the package '{}', which is not installed. Install the commands' packages with: pip install 'modalign[cli]'"


def main() -> None:
    """Run `modalign …`. Without the optional packages `modalign info` still works, and everything else says what to install."""
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich", "click"}:
            raise
        if sys.argv[1:2] == ["info"]:
            from modalign import info

            return info.main("--json" in sys.argv[2:])
        sys.exit(REMEDY.format(error.name))
    app(prog_name="modalign")


def __getattr__(name: str) -> object:
    # `from modalign.cli import app` needs typer, `main` must not: it is what reports that typer is missing.
    if name == "app":
        from .commands import app

        return app
    raise AttributeError(f"module 'modalign.cli' has no attribute '{name}'")
