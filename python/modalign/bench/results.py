"""The JSON that a benchmark leaves: one file, versioned, written whole or not at all. results.schema.json beside this file says what is in it, and is
what `validate` reads."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

from .._files import write_json

SCHEMA = "modalign.bench/2"
SCHEMA_FILE = Path(__file__).with_name("results.schema.json")

_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}


@functools.cache
def schema() -> dict[str, Any]:
    """The published JSON Schema."""
    return json.loads(SCHEMA_FILE.read_text())


def validate(results: Any) -> None:
    """Raise ValueError, with the place, where `results` is not what the schema says; its version first, since everything else depends on it."""
    version = schema()["properties"]["schema"]
    if isinstance(results, dict) and (problem := _problem(results.get("schema"), version, "schema")):
        raise ValueError(f"bench results: {problem}")
    if problem := _problem(results, schema(), ""):
        raise ValueError(f"bench results: {problem}")


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _problem(value: Any, rule: dict[str, Any], place: str) -> str:
    """What is wrong first, or nothing: the part of JSON Schema that results.schema.json uses."""
    if "$ref" in rule:
        return _problem(value, schema()["$defs"][rule["$ref"].rpartition("/")[2]], place)
    here = place or "the whole"
    kinds = [rule["type"]] if isinstance(rule.get("type"), str) else rule.get("type", [])
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f"{here} must be {' or '.join(kinds)}, got {value!r:.80}"
    if "enum" in rule and value not in rule["enum"]:
        return f"{here} must be one of {rule['enum']}, got {value!r:.80}"
    if "const" in rule and value != rule["const"]:
        return f"{here} must be {rule['const']!r}, got {value!r:.80}"
    if "exclusiveMinimum" in rule and value <= rule["exclusiveMinimum"]:
        return f"{here} must be above {rule['exclusiveMinimum']}, got {value!r:.80}"
    if "anyOf" in rule and all(problems := [_problem(value, option, place) for option in rule["anyOf"]]):
        return problems[0]
    if "not" in rule and not _problem(value, rule["not"], place):
        return f"{here} must not have {rule['not'].get('required')}"
    if isinstance(value, list) and "items" in rule:
        return next((problem for index, entry in enumerate(value) if (problem := _problem(entry, rule["items"], f"{place}[{index}]"))), "")
    if isinstance(value, dict):
        for key in rule.get("required", ()):
            if key not in value:
                return f"{here} must have {key!r}"
        for key, entry in value.items():
            inner = rule.get("properties", {}).get(key, rule.get("additionalProperties"))
            if inner and (problem := _problem(entry, inner, f"{place}.{key}" if place else key)):
                return problem
    if "if" in rule:
        return _problem(value, rule.get("else" if _problem(value, rule["if"], place) else "then", {}), place)
    return ""


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
    """Write valid results; the file appears whole or, on an error or Ctrl-C, stays as it was."""
    finite = _finite(results)
    validate(finite)
    write_json(path, finite)


def _no_number(name: str) -> None:
    raise ValueError(f"{name}, which is no number")


def read_results(path: str | Path) -> dict[str, Any]:
    """Read what this version or an older one wrote. ValueError where it is something else."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        found = "a folder" if Path(path).is_dir() else "one that does not open" if Path(path).exists() else "nothing of that name"
        raise ValueError(f"bench results: {path} must be a JSON file, got {found}") from error
    except ValueError as error:
        raise ValueError(f"bench results: {path} must be JSON, got {error}") from error
    try:
        validate(results)
    except ValueError as error:
        raise ValueError(f"{error} (in {path})") from None
    return results
