"""What a run of `modalign align` leaves as JSON: figures of every seed, means with their spread, and differences between rows within a seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from ..bench import environment
from .experiment import ROWS, Experiment, SeedResult, mean_r10
from .settings import ALL

__all__ = ["BASELINE", "SCHEMA", "summary"]

SCHEMA = 2
FULL_BASIS = "the stored features were reduced with a basis fitted on all training items of seed 0 (not on their pairing), however few are learnt from"
BASELINE = "cca"  # rows are compared with it seed by seed: what the seeds have in common cancels


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def _paired(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Differences to the baseline within a seed: mean, standard deviation, and in how many seeds they are positive."""
    differences = [value - other for value, other in zip(values, baseline, strict=True)]
    return _spread(differences) | {"positive": sum(d > 0 for d in differences), "seeds": len(differences)}


def rows_of(seeds: Sequence[SeedResult]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for row in (row for row in ROWS if row in seeds[0].table):
        by_direction = {}
        # a direction that some seed has no test items for has no mean over seeds
        for direction in (way for way in seeds[0].table[BASELINE] if all(way in result.table[BASELINE] for result in seeds)):
            figures = [result.table[row][direction].as_dict() for result in seeds]
            by_direction[direction] = {key: _spread([f[key] for f in figures]) for key in figures[0]}
            by_direction[direction]["items"] = [result.items[direction] for result in seeds]
            baseline = [result.table[BASELINE][direction].r10 for result in seeds]
            by_direction[direction]["r10_difference"] = _paired([f["r10"] for f in figures], baseline)
        scores = [mean_r10(result.table[row]) for result in seeds]
        rows[row] = {
            "what": ROWS[row],
            "mean_r10": statistics.fmean(scores),
            "mean_r10_by_seed": scores,
            "difference": _paired(scores, [mean_r10(result.table[BASELINE]) for result in seeds]),
            "directions": by_direction,
        }
    return rows


def summary(experiment: Experiment, command: str) -> dict[str, Any]:
    """Everything that tables and pages quote: `rows` of the last number of pairs, a `curve` over all of them, every seed's own figures."""
    data, split = experiment.dataset, experiment.split()
    curve = [{"pairs": pairs, "train": seeds[0].train, "rows": rows_of(seeds)} for pairs, seeds in experiment.results.items()]
    return {
        "schema": SCHEMA,
        "command": command,
        "settings": experiment.settings.as_dict(),
        "dataset": {
            "name": data.name,
            "modalities": {name: int(data.present[name].sum()) if name in data.present else len(data) for name in data.modalities},
            "items": len(data),
            "train": len(split.train),
            "validation": len(split.validation),
            "test": len(split.test),
            "licence": data.licence,
            "sha256": data.digest(),
        }
        | ({"basis": FULL_BASIS} if data.bases and set(experiment.settings.pairs) != {ALL} else {}),
        "model": asdict(experiment.model.config) | {"parameters": sum(p.numel() for p in experiment.model.parameters())},
        "training": {row: asdict(plan) for row, plan in experiment.training.items()},
        "rows": curve[-1]["rows"],
        "curve": [{"pairs": point["pairs"], "train": point["train"], "rows": _scores(point["rows"])} for point in curve],
        "seeds": [_seed(result) | {"pairs": pairs} for pairs, seeds in experiment.results.items() for result in seeds],
        "environment": environment.describe(torch.device(experiment.settings.device), experiment.settings.first_seed)
        | {"threads": torch.get_num_threads(), "processes": experiment.processes},
    }


def _scores(rows: dict[str, Any]) -> dict[str, Any]:
    return {row: {key: figures[key] for key in ("mean_r10", "mean_r10_by_seed", "difference")} for row, figures in rows.items()}


def _seed(result: SeedResult) -> dict[str, Any]:
    return {
        "seed": result.seed,
        "train": result.train,
        "transductive": result.transductive,
        "chosen": result.chosen,
        "table": {row: {direction: figures.as_dict() for direction, figures in table.items()} for row, table in result.table.items()},
        "validation": {row: {str(step): score for step, score in history.evaluated.items()} for row, history in result.histories.items()},
        "loss": {row: history.loss for row, history in result.histories.items()},
    }
