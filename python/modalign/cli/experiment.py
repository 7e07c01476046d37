"""The alignment experiment behind `modalign align`: per seed, choose on validation items, train, read the test part once."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._files import read_tensors, write_json
from ..data import PairedDataset, Split
from ..metrics import Retrieval, chance_retrieval, joint_retrieval, search_retrieval
from ..models import (
    CanonicalCorrelation,
    CanonicalCorrelationConfig,
    Checkpoint,
    GramAligner,
    GramAlignerConfig,
    PrincipalComponents,
    TrainingConfig,
    TrainingHistory,
    fit_aligner,
    select_correlation,
)
from ..models.data_parallel import made_once, ranks_of
from ..models.gram_aligner import items_with
from .settings import ALL, AlignSettings

__all__ = ["ROWS", "Experiment", "RunStore", "SeedResult", "mean_r10", "run_experiment"]

# The rows of the table, in order: what each adds is visible from one to the next.
ROWS = {
    "chance": "a random order",
    "untrained": "random heads, no training",
    "cca": "regularised CCA, closed form",
    "start": "the heads set to the CCA solution, no training",
    "trained": "the heads trained from there",
    "trained_random": "the heads trained from random weights",
    "structure": "the heads trained from the CCA solution with the STRUCTURE regularizer",
    "structure_random": "the heads trained from random weights with it",
}  # the last two where it is asked for
JOINT_VOLUME, JOINT_COSINES = "joint (volume)", "joint (sum of cosines)"

Progress = Callable[[str, int, int], None]  # (what is going on, steps done, steps in all)


@dataclass
class SeedResult:
    """`train` counts the training items that have two modalities or more; `table` maps row -> direction ("picture → text") -> figures on the test part;
    `histories` are those of the runs that chose the number of steps."""

    seed: int
    train: int
    transductive: bool
    table: dict[str, dict[str, Retrieval]]
    chosen: dict[str, Any]
    histories: dict[str, TrainingHistory]
    items: dict[str, int]  # test items behind a direction

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> SeedResult:
        table = {row: {way: Retrieval(**figures) for way, figures in by_way.items()} for row, by_way in content.pop("table").items()}
        histories = {
            row: TrainingHistory(h["loss"], {int(step): score for step, score in h["evaluated"].items()}, h["best_step"])
            for row, h in content.pop("histories").items()
        }
        return cls(table=table, histories=histories, **content)


@dataclass
class Experiment:
    """`results` holds one list of seeds per number of training pairs, in the order of `settings.pairs`; `model` is that of the last number's first seed
    and takes raw features (of several processes the first has it)."""

    dataset: PairedDataset
    settings: AlignSettings
    model: GramAligner
    training: dict[str, TrainingConfig]
    processes: int = 1
    results: dict[int | str, list[SeedResult]] = field(default_factory=dict)

    @property
    def seeds(self) -> list[SeedResult]:
        return self.results[self.settings.pairs[-1]]

    def split(self) -> Split:
        """The split of the kept model."""
        return split_of(self.dataset, self.settings.first_seed, self.settings.pairs[-1])


class RunStore:
    """Unfinished work of a run, in a folder that is removed when the run is complete: results of finished seeds, states of started ones.

    resume : go on with what is there;  restart : throw it away. Without either an unfinished run is left alone and reported, and so is a folder that
        holds anything else.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, resume: bool = False, restart: bool = False, seconds: float = 5.0) -> None:
        self.folder, self.seconds = folder, seconds
        kept = folder / "run.json"
        identity = json.loads(json.dumps(identity))  # tuples become lists, as they will be read
        if folder.exists() and not kept.is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder}: expected the folder of an unfinished run or nothing, got something else; choose another --out")
        if kept.is_file() and not resume and not restart:
            raise ValueError(f"{folder}: holds an unfinished run; go on with --resume, or throw it away with --restart")
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(folder, os.O_RDONLY)  # let go when the process ends, however it ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self.lock)
            raise ValueError(f"{folder}: is in use by another run; choose another --out") from error
        self.resumed = resume and kept.is_file()
        if self.resumed:
            with self._reading(kept):
                before = dict(json.loads(kept.read_text(encoding="utf-8")))
            for key in sorted(set(before) | set(identity)):
                if before.get(key) != identity.get(key):
                    raise ValueError(
                        f"{kept}: expected to go on with {key} = {before.get(key)!r}, got {identity.get(key)!r}; --restart throws the run away"
                    )
        else:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_json(kept, identity)

    def result(self, unit: str) -> SeedResult | None:
        path = self.folder / f"{unit}.json"
        with self._reading(path):
            return SeedResult.from_dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def keep(self, unit: str, result: SeedResult) -> None:
        write_json(self.folder / f"{unit}.json", asdict(result))
        for path in self.folder.glob(f"{unit}-*.safetensors"):
            path.unlink()

    def checkpoint(self, name: str) -> Checkpoint:
        path = self.folder / f"{name}.safetensors"
        if path.is_file():
            with self._reading(path):
                read_tensors(path)
        return Checkpoint(path, self.seconds)

    def model(self) -> GramAligner:
        with self._reading(self.folder / "model"):
            return GramAligner.from_pretrained(self.folder / "model")

    @staticmethod
    @contextlib.contextmanager
    def _reading(path: Path) -> Iterator[None]:
        """A file that is damaged is named, with the way out."""
        try:
            yield
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            found = str(error).removeprefix(f"{path}: ")
            raise ValueError(f"{path}: expected what an unfinished run keeps, got something else ({found}); --restart throws the run away") from error

    def remove(self) -> None:
        shutil.rmtree(self.folder)
        os.close(self.lock)


def training_plans(settings: AlignSettings) -> dict[str, TrainingConfig]:
    """One plan per start. Affine maps that start from a solution move slowly, random ones as fast as the branches."""
    from_solution = TrainingConfig(steps=settings.steps, batch=settings.batch, patience=settings.patience)
    plans = {"trained": from_solution, "trained_random": replace(from_solution, learning_rate=2e-3, affine_rate=1.0)}
    if settings.structure:
        with_structure = {"structure": settings.structure, "structure_temperature": settings.structure_temperature}
        plans |= {"structure": replace(plans["trained"], **with_structure), "structure_random": replace(plans["trained_random"], **with_structure)}
    return plans


def split_of(dataset: PairedDataset, seed: int, pairs: int | str) -> Split:
    return dataset.splits(seed, None if pairs == ALL else int(pairs))


def check_parts(dataset: PairedDataset, settings: AlignSettings) -> PairedDataset:
    """The data set with the modalities of the run, after everything that could fail for the lack of items has been looked at, for all seeds."""
    dataset = dataset.select(settings.modalities or dataset.default or tuple(dataset.modalities))
    if len(dataset.modalities) < 2:
        raise ValueError(f"align: modalities must be at least 2, got {list(dataset.modalities)}")
    for pairs in settings.pairs:
        for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
            split = split_of(dataset, seed, pairs)
            where = f"seed {seed}, {pairs} pairs"
            for name in dataset.modalities:
                if len(dataset.available(name, split.fit)) < 3:
                    raise ValueError(
                        f"align: modality '{name}' must be had by at least 3 of the {len(split.fit)} items to fit on ({where}), "
                        f"got {len(dataset.available(name, split.fit))}"
                    )
            for what, part, least in (("fit", split.fit, 2), ("test", split.test, 1)):
                groups = dataset.groups[part]
                both = [items_with(dataset.masks(part), list(pair), len(part)) for pair in combinations(dataset.modalities, 2)]
                most = max(len((groups if items is None else groups[items]).unique()) for items in both)
                if most < least:
                    wanted = f"items of {least} different captions" if least > 1 else "some items"
                    raise ValueError(f"align: modalities must be had together by {wanted} of the {what} part ({where}), got {most} for any two of them")
            dataset.statistics(split.fit)
    widths = {name: min(x.shape[1], settings.reduce) for name, x in dataset.modalities.items()}
    if settings.width > min(widths.values()):
        raise ValueError(f"align: width must not exceed the narrowest modality, got {settings.width} and {widths}")
    return dataset


def directions(
    embeddings: Mapping[str, Tensor],
    groups: Tensor,
    anchor: str = "",
    present: Mapping[str, Tensor] | None = None,
) -> dict[str, tuple[Retrieval, Tensor]]:
    """Retrieval both ways for every pair by cosine, among the items that have both; for three and more modalities also with the others taken together,
    from the anchor and back, among the items that have all. With each figure the groups of its items, for the figure of chance."""

    def among(names: list[str]) -> tuple[dict[str, Tensor], Tensor]:
        items = items_with(present, names, len(groups))
        return {n: embeddings[n] if items is None else embeddings[n][items] for n in names}, groups if items is None else groups[items]

    found: dict[str, tuple[Retrieval, Tensor]] = {}
    for a, b in permutations(embeddings, 2):
        e, who = among([a, b])
        if len(who):
            found[f"{a} → {b}"] = search_retrieval(e[a], e[b], query_groups=who, metric="dot"), who
    if len(embeddings) > 2 and anchor:
        e, who = among(list(embeddings))
        if len(who):
            others = [x for name, x in e.items() if name != anchor]
            for label, score in ((JOINT_VOLUME, "volume"), (JOINT_COSINES, "cosine_sum")):
                joint = joint_retrieval(e[anchor], others, score=score, groups=who)
                found[f"{anchor} → others, {label}"] = joint.to_tuples, who
                found[f"others → {anchor}, {label}"] = joint.to_anchors, who
    return found


def run_experiment(
    dataset: PairedDataset,
    settings: AlignSettings = AlignSettings(),
    *,
    progress: Progress | None = None,
    store: RunStore | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Experiment:
    """Run the whole experiment. Deterministic for its arguments on one machine; with a `store` an unfinished run is taken up where it was.

    process_group : every rank calls this alike, but for `store`, which is for rank 0 alone, as choosing and evaluating are; training they share
    """
    if settings.structure and ranks_of(process_group) > 1:
        raise ValueError(f"align: structure must be 0 with several processes, since neighbourhoods are those of a whole batch, got {settings.structure}")
    dataset = check_parts(dataset, settings)
    plans = training_plans(settings)
    units = [(pairs, seed) for pairs in settings.pairs for seed in range(settings.first_seed, settings.first_seed + settings.seeds)]
    per_unit = 2 * settings.steps * len(plans)  # each plan trains once to choose the number of steps and once more with it
    experiment = Experiment(dataset, settings, None, plans, ranks_of(process_group))  # type: ignore[arg-type]  # the model comes with its unit
    for number, (pairs, seed) in enumerate(units):
        unit = f"{pairs}-{seed}"
        keeps_model = (pairs, seed) == (settings.pairs[-1], settings.first_seed)
        result = made_once(lambda unit=unit: store.result(unit) if store else None, process_group)
        if result is None:

            def report(what: str, steps: int, number: int = number, unit: tuple[int | str, int] = (pairs, seed)) -> None:
                if progress is not None:
                    progress(f"{unit[0]} pairs, seed {unit[1]}: {what}", number * per_unit + steps, len(units) * per_unit)

            model, result = _run_seed(dataset, settings, plans, pairs, seed, report, store, process_group)
            if keeps_model:
                experiment.model = model
            if store:
                if keeps_model:
                    model.save_pretrained(store.folder / "model")
                store.keep(unit, result)
        elif keeps_model and store:
            experiment.model = store.model()
        experiment.results.setdefault(pairs, []).append(result)
    if progress is not None:
        progress("done", len(units) * per_unit, len(units) * per_unit)
    return experiment


@dataclass(frozen=True)
class _Part:
    """Reduced features, masks and groups of some items."""

    features: dict[str, Tensor]
    present: dict[str, Tensor] | None
    groups: Tensor

    def to(self, device: torch.device) -> _Part:
        present = self.present and {name: mask.to(device) for name, mask in self.present.items()}
        return _Part({name: x.to(device) for name, x in self.features.items()}, present, self.groups.to(device))


def _run_seed(
    dataset: PairedDataset,
    settings: AlignSettings,
    plans: Mapping[str, TrainingConfig],
    pairs: int | str,
    seed: int,
    report: Callable[[str, int], None],
    store: RunStore | None,
    process_group: dist.ProcessGroup | None,
) -> tuple[GramAligner, SeedResult]:
    """Everything is chosen and trained before the test part is looked at."""
    split, device = split_of(dataset, seed, pairs), torch.device(settings.device)
    reductions = made_once(lambda: _reductions(dataset, split, settings.reduce), process_group)
    reduced_by = {"fit": "fit", "validation": "fit", "train": "train", "test": "train"}
    parts = {name: _part(dataset, getattr(split, name), reductions[by]) for name, by in reduced_by.items()}
    config = _model_config(settings, {name: x.shape[1] for name, x in parts["train"].features.items()})
    correlation, solutions = made_once(lambda: _solutions(parts, config.width), process_group)
    on_device = {name: part.to(device) for name, part in parts.items()}

    def build(name: str, from_solution: bool) -> GramAligner:
        model = GramAligner(config, seed=seed)
        part = parts[name]
        measured = replace(dataset, modalities=part.features, present=part.present or {}).statistics(torch.arange(len(part.groups)))
        model.set_statistics(measured.mean, measured.scale)
        if from_solution:
            model.start_from(solutions[name])
        return model.to(device).eval()

    models = {"untrained": build("train", False), "start": build("train", True)}
    histories = {}
    for number, (row, plan) in enumerate(plans.items()):
        random = row.endswith("_random")
        label, done = ("from random" if random else "from CCA") + ", STRUCTURE" * (plan.structure > 0), 2 * plan.steps * number
        models[row], histories[row] = _choose_and_train(
            functools.partial(build, from_solution=not random),
            on_device,
            plan,
            seed,
            progress=lambda step, label=label, done=done: report(label, done + step),
            checkpoint=lambda phase, row=row: store.checkpoint(f"{pairs}-{seed}-{row}-{phase}") if store else None,
            process_group=process_group,
        )
        report(label, done + 2 * plan.steps)
    table, items = made_once(lambda: _figures(models, solutions["train"], parts["test"], on_device["test"]), process_group)
    chosen = {"cca": {"ridge": correlation.ridge, "power": correlation.power}} | {row: {"steps": h.best_step} for row, h in histories.items()}
    result = SeedResult(seed, len(dataset.paired(split.train)), split.transductive, table, chosen, histories, items)
    return models["structure" if settings.structure else "trained"].cpu().on_raw_features(reductions["train"]), result


def _reductions(dataset: PairedDataset, split: Split, width: int) -> dict[str, dict[str, PrincipalComponents]]:
    """Wide features lose to their leading components, and those are taken from the training items alone. One width for both fits."""
    found: dict[str, dict[str, PrincipalComponents]] = {"fit": {}, "train": {}}
    for name, x in dataset.modalities.items():
        if x.shape[1] > width:
            kept = min(width, len(dataset.available(name, split.fit)) - 1)
            for part, items in (("fit", split.fit), ("train", split.train)):
                found[part][name] = PrincipalComponents.fit(x[dataset.available(name, items)], kept)
    return found


def _part(dataset: PairedDataset, items: Tensor, reductions: Mapping[str, PrincipalComponents]) -> _Part:
    features = {name: reductions[name](x) if name in reductions else x for name, x in dataset.features(items).items()}
    return _Part(features, dataset.masks(items) or None, dataset.groups[items])


def _model_config(settings: AlignSettings, widths: dict[str, int]) -> GramAlignerConfig:
    return GramAlignerConfig(
        modalities=widths,
        width=settings.width or min(256, *widths.values()),
        heads=settings.heads,
        hidden=settings.hidden or (256 if settings.heads == "mlp" else 0),
        loss=settings.loss,
        temperature=settings.temperature,
        pairwise_weight=settings.pairwise_weight,
        learn_temperature=settings.learn_temperature,
    )


def _solutions(parts: Mapping[str, _Part], width: int) -> tuple[CanonicalCorrelationConfig, dict[str, CanonicalCorrelation]]:
    """The closed form on the items to fit on and on all training items, by the ridge and power that validation items like best."""
    fit, held = parts["fit"], parts["validation"]
    chosen = select_correlation(fit.features, held.features, held.groups, width, fit_present=fit.present, validation_present=held.present)
    return chosen, {name: CanonicalCorrelation.fit(parts[name].features, chosen, present=parts[name].present) for name in ("fit", "train")}


def _choose_and_train(
    build: Callable[[str], GramAligner],
    parts: Mapping[str, _Part],
    plan: TrainingConfig,
    seed: int,
    progress: Callable[[int], None],
    checkpoint: Callable[[str], Checkpoint | None],
    process_group: dist.ProcessGroup | None,
) -> tuple[GramAligner, TrainingHistory]:
    """Train on the items to fit on and see on validation items after how many steps it is best; then anew, on all training items, for that many."""
    fit, held, train = parts["fit"], parts["validation"], parts["train"]
    history = fit_aligner(
        build("fit"),
        fit.features,
        fit.groups,
        plan,
        seed=seed,
        present=fit.present,
        validation=(held.features, held.groups, held.present),
        progress=progress,
        checkpoint=checkpoint("choose"),
        process_group=process_group,
    )
    model = build("train")
    fit_aligner(
        model,
        train.features,
        train.groups,
        plan,
        seed=seed,
        present=train.present,
        stop_after=history.best_step,
        progress=lambda step: progress(plan.steps + step),
        checkpoint=checkpoint("final"),
        process_group=process_group,
    )
    return model, history


@torch.no_grad()
def _figures(
    models: Mapping[str, GramAligner], solution: CanonicalCorrelation, test: _Part, on_device: _Part
) -> tuple[dict[str, dict[str, Retrieval]], dict[str, int]]:
    """Every row of the table, and the number of test items behind each direction."""
    anchor = models["start"].config.anchor
    embedded = {row: model.embed(on_device.features) for row, model in models.items()}
    embedded["cca"] = {name: e.to(on_device.groups.device) for name, e in solution.embed(test.features).items()}
    found = {row: directions(e, on_device.groups, anchor, on_device.present) for row, e in embedded.items()}
    table = {row: {way: figures for way, (figures, _) in by_way.items()} for row, by_way in found.items()}
    table["chance"] = {way: chance_retrieval(who) for way, (_, who) in found["cca"].items()}
    return {row: table[row] for row in ROWS if row in table}, {way: len(who) for way, (_, who) in found["cca"].items()}


def mean_r10(table: Mapping[str, Retrieval]) -> float:
    """Mean R@10 over the cosine directions: the figure that rows are compared by."""
    values = [figures.r10 for direction, figures in table.items() if ", joint" not in direction]
    return math.fsum(values) / len(values)
