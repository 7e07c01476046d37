"""The alignment experiment behind `modalign align`: per seed, choose on validation items, train, read the test part once."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from ..bench import environment
from ..data import PairedDataset
from ..metrics import Retrieval, chance_retrieval, retrieval
from ..models import (
    CanonicalCorrelation,
    GramAligner,
    GramAlignerConfig,
    TrainingConfig,
    TrainingHistory,
    fit_aligner,
    select_correlation,
)

__all__ = ["ROWS", "Experiment", "SeedResult", "run_experiment", "summary"]

# The rows of the table, in order: what each adds is visible from one to the next.
ROWS = {
    "chance": "a random order",
    "untrained": "random heads, no training",
    "cca": "regularised CCA, closed form",
    "start": "the heads set to the CCA solution, no training",
    "trained": "the heads trained from there",
    "trained_random": "the heads trained from random weights",
}
SCHEMA = 1
JOINT_VOLUME, JOINT_COSINES = "joint (volume)", "joint (sum of cosines)"


@dataclass
class SeedResult:
    """`table` maps row -> direction ("picture → text") -> figures on the test part; `histories` those of the runs that chose the number of steps."""

    seed: int
    transductive: bool
    table: dict[str, dict[str, Retrieval]]
    chosen: dict[str, Any]
    histories: dict[str, TrainingHistory]


@dataclass
class Experiment:
    dataset: PairedDataset
    model: GramAligner  # trained, of the first seed
    training: dict[str, TrainingConfig]
    seeds: list[SeedResult] = field(default_factory=list)


def training_plans(steps: int, batch: int) -> dict[str, TrainingConfig]:
    """One plan per start. Affine maps that start from a solution move slowly, random ones as fast as the branches."""
    from_solution = TrainingConfig(steps=steps, batch=batch)
    return {"trained": from_solution, "trained_random": replace(from_solution, learning_rate=2e-3, affine_rate=1.0)}


def directions(
    embeddings: Mapping[str, Tensor], groups: Tensor, volume: Callable[[Mapping[str, Tensor]], Tensor] | None = None, anchor: str = ""
) -> dict[str, Retrieval]:
    """Retrieval both ways for every pair by cosine; for three and more modalities also with the others taken together, from the anchor and back."""
    found = {f"{a} → {b}": retrieval(embeddings[a] @ embeddings[b].T, query_groups=groups) for a, b in permutations(embeddings, 2)}
    if len(embeddings) > 2 and volume is not None:
        joint = volume(embeddings)
        cosines = torch.stack([embeddings[anchor] @ e.T for name, e in embeddings.items() if name != anchor]).sum(0)
        for label, scores, larger in ((JOINT_VOLUME, joint, False), (JOINT_COSINES, cosines, True)):
            found[f"{anchor} → others, {label}"] = retrieval(scores, query_groups=groups, larger_is_better=larger)
            found[f"others → {anchor}, {label}"] = retrieval(scores.T, query_groups=groups, larger_is_better=larger)
    return found


def run_experiment(
    dataset: PairedDataset,
    *,
    seeds: int = 3,
    first_seed: int = 0,
    steps: int = 120,
    batch: int = 256,
    overrides: Mapping[str, Any] | None = None,
    progress: Callable[[int, str, int], None] | None = None,
) -> Experiment:
    """Run the whole experiment. `progress(seed, row, step)` is called after every training step, and with step 0
    when a row is done. Deterministic for its arguments on one machine."""
    if seeds < 1:
        raise ValueError(f"run_experiment: seeds must be at least 1, got {seeds}")
    plans = training_plans(steps, batch)
    widths = {name: x.shape[1] for name, x in dataset.modalities.items()}
    config = GramAlignerConfig(**({"modalities": widths, "width": min(256, *widths.values())} | dict(overrides or {})))
    experiment: Experiment | None = None
    for seed in range(first_seed, first_seed + seeds):
        split = dataset.splits(seed)
        fit, validation, train, test = (dataset.features(part) for part in (split.fit, split.validation, split.train, split.test))
        groups = dataset.groups
        correlation = select_correlation(fit, validation, groups[split.validation], config.width)
        solutions = {"fit": CanonicalCorrelation.fit(fit, correlation), "train": CanonicalCorrelation.fit(train, correlation)}

        def build(part: str, from_solution: bool, seed: int = seed, split: Any = split, solutions: Any = solutions) -> GramAligner:
            model = GramAligner(config, seed=seed)
            measured = dataset.statistics(split.fit if part == "fit" else split.train)
            model.set_statistics(measured.mean, measured.scale)
            if from_solution:
                model.start_from(solutions[part])
            return model.eval()

        # Everything is chosen and trained before the test part is looked at.
        models = {"untrained": build("train", False), "start": build("train", True)}
        histories, chosen = {}, {"cca": {"ridge": correlation.ridge, "power": correlation.power}}
        for row, plan in plans.items():

            def report(step: int, row: str = row, seed: int = seed) -> None:
                if progress is not None:
                    progress(seed, row, step)

            candidate = build("fit", row == "trained")
            histories[row] = fit_aligner(
                candidate, fit, groups[split.fit], plan, seed=seed, validation=(validation, groups[split.validation]), progress=report
            )
            best = histories[row].best_step
            models[row] = build("train", row == "trained")
            fit_aligner(models[row], train, groups[split.train], plan, seed=seed, stop_after=best, progress=report)
            if progress is not None:
                progress(seed, row, 0)  # done, however many steps were chosen
            chosen[row] = {"steps": best}
        with torch.no_grad():
            embedded = {row: model.embed(test) for row, model in models.items()}
        embedded["cca"] = solutions["train"].embed(test)
        test_groups = groups[split.test]
        table = {row: directions(e, test_groups, models["start"].volume, config.anchor) for row, e in embedded.items()}
        chance = chance_retrieval(test_groups)
        table["chance"] = dict.fromkeys(table["cca"], chance)
        if experiment is None:
            experiment = Experiment(dataset, models["trained"], plans)
        experiment.seeds.append(SeedResult(seed, split.transductive, {row: table[row] for row in ROWS}, chosen, histories))
    assert experiment is not None
    return experiment


def mean_r10(table: Mapping[str, Retrieval]) -> float:
    """Mean R@10 over the cosine directions: the figure that rows are compared by."""
    values = [figures.r10 for direction, figures in table.items() if "joint" not in direction]
    return math.fsum(values) / len(values)


def summary(experiment: Experiment, command: str) -> dict[str, Any]:
    """Everything that tables and pages quote, as JSON: means and standard deviations over seeds, the figures of each seed, choices, environment."""
    first = experiment.seeds[0].table["cca"]
    rows: dict[str, Any] = {}
    for row in ROWS:
        by_direction = {}
        for direction in first:
            figures = [result.table[row][direction].as_dict() for result in experiment.seeds]
            by_direction[direction] = {
                key: {
                    "mean": statistics.fmean(f[key] for f in figures),
                    "std": statistics.stdev(f[key] for f in figures) if len(figures) > 1 else 0.0,
                }
                for key in figures[0]
            }
        scores = [mean_r10(result.table[row]) for result in experiment.seeds]
        rows[row] = {"what": ROWS[row], "mean_r10": statistics.fmean(scores), "mean_r10_by_seed": scores, "directions": by_direction}
    data = experiment.dataset
    split = data.splits(experiment.seeds[0].seed)
    return {
        "schema": SCHEMA,
        "command": command,
        "dataset": {
            "name": data.name,
            "items": len(data),
            "train": len(split.train),
            "validation": len(split.validation),
            "test": len(split.test),
            "licence": data.licence,
        },
        "model": asdict(experiment.model.config) | {"parameters": sum(p.numel() for p in experiment.model.parameters())},
        "training": {row: asdict(plan) for row, plan in experiment.training.items()},
        "rows": rows,
        "seeds": [
            {
                "seed": result.seed,
                "transductive": result.transductive,
                "chosen": result.chosen,
                "table": {row: {direction: figures.as_dict() for direction, figures in table.items()} for row, table in result.table.items()},
                "validation": {row: {str(step): score for step, score in history.evaluated.items()} for row, history in result.histories.items()},
                "loss": {row: history.loss for row, history in result.histories.items()},
            }
            for result in experiment.seeds
        ],
        "environment": environment.describe(torch.device("cpu"), experiment.seeds[0].seed) | {"threads": torch.get_num_threads()},
    }
