"""The JSON that a benchmark leaves: one file, versioned, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

SCHEMA = "modalign.bench/1"
STATUSES = ("ok", "mismatch", "unavailable")

_TOP = {"schema": str, "created": str, "command": str, "seed": int, "note": str, "environment": dict, "rows": list}
_ROW = {"case": str, "parameters": dict, "dtype": str, "pass": str, "threads": int, "provider": str, "kind": str, "status": str, "reason": str}


def validate(results: dict[str, Any]) -> None:
    """Raise ValueError, with the place, where `results` is not what this version writes and reads."""
    if results.get("schema") != SCHEMA:
        raise ValueError(f"bench results: schema must be {SCHEMA!r}, got {results.get('schema')!r}")
    for key, kind in _TOP.items():
        if not isinstance(results.get(key), kind):
            raise ValueError(f"bench results: {key} must be {kind.__name__}, got {results.get(key)!r}")
    for index, row in enumerate(results["rows"]):
        for key, kind in _ROW.items():
            if not isinstance(row.get(key), kind):
                raise ValueError(f"bench results: rows[{index}].{key} must be {kind.__name__}, got {row.get(key)!r}")
        if row["status"] not in STATUSES:
            raise ValueError(f"bench results: rows[{index}].status must be one of {STATUSES}, got {row['status']!r}")
        if (row["status"] == "ok") != ("seconds" in row):
            raise ValueError(f"bench results: rows[{index}] must have a speed exactly where its result matched, got status {row['status']!r}")


def _finite(value: Any) -> Any:
    """JSON has no infinity: an error that is not finite becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    validate(results)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(results), indent=1, allow_nan=False) + "\n"
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_results(path: str | Path) -> dict[str, Any]:
    try:
        results = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"bench results: {path} must be JSON, got {error}") from error
    validate(results)
    return results
