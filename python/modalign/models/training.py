"""The training loop of light heads, on tensors alone: where data come from and where results go is not its business."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import permutations
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from .._files import read_tensors, write_tensors
from ..metrics import joint_retrieval, search_retrieval
from ..ops import structure_loss
from .cca import CanonicalCorrelation, CanonicalCorrelationConfig
from .data_parallel import average_over_ranks, made_once, rank_of, ranks_of, share_of_rank, take_from_first_rank, true_anywhere
from .gram_aligner import GramAligner, items_with

__all__ = ["Checkpoint", "TrainingConfig", "TrainingHistory", "fit_aligner", "select_correlation", "validation_score"]


DRAWS = 100  # of a batch until one has two items with common modalities


@dataclass(frozen=True)
class TrainingConfig:
    """Steps of AdamW over mini-batches; linear warm-up over the first tenth, then a cosine to zero.

    learning_rate is that of the non-linear branches; the affine maps take `affine_rate` times it (small where they start from a solution).
    patience : leave the loop when so many evaluations in a row have not been the best; 0 never
    structure : weight of `ops.structure_loss` between the features of each modality and their embeddings, mean over modalities; it rises from 0 over the
        first tenth, and 0 leaves it out.  structure_temperature : of its softmaxes
    """

    steps: int = 120
    batch: int = 256
    learning_rate: float = 1e-3
    affine_rate: float = 0.1
    weight_decay: float = 0.01
    evaluate_every: int = 10
    patience: int = 0
    clip_norm: float = 2.0
    structure: float = 0.0
    structure_temperature: float = 0.05

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 2), ("evaluate_every", 1), ("patience", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"TrainingConfig: {name} must be at least {least}, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"TrainingConfig: learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.structure < math.inf or not 0 < self.structure_temperature < math.inf:
            found = f"{self.structure} and {self.structure_temperature}"
            raise ValueError(f"TrainingConfig: structure must be 0 or more and structure_temperature positive, got {found}")

    def structure_weight(self, step: int) -> float:
        """In step 1, 2, ...: none in the first, all of it after the first tenth."""
        return self.structure * min(1.0, (step - 1) / max(1, self.steps // 10))

    def rate(self, step: int) -> float:
        """Share of the learning rate that step 1, 2, ... takes."""
        warm_up = max(1, self.steps // 10)
        return min(1.0, step / warm_up) * 0.5 * (1 + math.cos(math.pi * (step - 1) / self.steps))


@dataclass
class TrainingHistory:
    """`loss` per step; `evaluated` maps a step (0 = before the first) to the validation score; `best_step` has the highest, the earliest on a tie."""

    loss: list[float] = field(default_factory=list)
    evaluated: dict[int, float] = field(default_factory=dict)
    best_step: int = 0

    def evaluations_since_best(self) -> int:
        return sum(step > self.best_step for step in self.evaluated)


@dataclass(frozen=True)
class Checkpoint:
    """Where a training run keeps its state, and how many seconds of work a kill may cost. Ctrl-C costs none: the state is written first."""

    path: Path
    seconds: float = 5.0


def validation_score(
    embeddings: Mapping[str, Tensor], groups: Tensor, anchor: str | None = None, present: Mapping[str, Tensor] | None = None
) -> float:
    """What choices are made by: mean R@10 over all ordered pairs of modalities, with mean R@1 to settle near ties (weight 1/10).

    Given the anchor of three or more modalities, retrieval by volume from it to the others and back, among the items that have all, counts like two pairs:
    a model is meant to be good at the joint score too. A pair counts the items that have both modalities.
    """
    found = []
    for a, b in permutations(embeddings, 2):
        both = items_with(present, [a, b], len(groups))
        x, y, who = (v if both is None else v[both] for v in (embeddings[a], embeddings[b], groups))
        if len(who):
            found.append(search_retrieval(x, y, query_groups=who, metric="dot"))
    if anchor is not None and len(embeddings) > 2:  # of two, the volume is the cosine over again
        whole = items_with(present, list(embeddings), len(groups))
        e, who = (embeddings, groups) if whole is None else ({name: x[whole] for name, x in embeddings.items()}, groups[whole])
        if len(who):
            joint = joint_retrieval(e[anchor], [x for name, x in e.items() if name != anchor], score="volume", groups=who)
            found += [joint.to_tuples, joint.to_anchors]
    return math.fsum(f.r10 + 0.1 * f.r1 for f in found) / max(1, len(found))


def select_correlation(
    fit: Mapping[str, Tensor],
    validation: Mapping[str, Tensor],
    validation_groups: Tensor,
    width: int,
    ridges: Sequence[float] = (0.1, 0.3, 1.0, 3.0),
    powers: Sequence[float] = (0.5, 1.0),
    *,
    fit_present: Mapping[str, Tensor] | None = None,
    validation_present: Mapping[str, Tensor] | None = None,
) -> CanonicalCorrelationConfig:
    """Choose ridge and power of the closed-form baseline on validation items, so that the learned model is measured against its best form."""
    best, chosen = -1.0, None
    for ridge in ridges:
        for power in powers:
            config = CanonicalCorrelationConfig(width, ridge, power)
            solution = CanonicalCorrelation.fit(fit, config, present=fit_present)
            score = validation_score(solution.embed(validation), validation_groups, present=validation_present)
            if score > best:
                best, chosen = score, config
    if chosen is None:
        raise ValueError("select_correlation: ridges and powers must not be empty, got nothing to choose from")
    return chosen


def fit_aligner(
    model: GramAligner,
    features: Mapping[str, Tensor],
    groups: Tensor,
    config: TrainingConfig,
    *,
    seed: int,
    present: Mapping[str, Tensor] | None = None,
    stop_after: int | None = None,
    validation: tuple[Mapping[str, Tensor], Tensor] | tuple[Mapping[str, Tensor], Tensor, Mapping[str, Tensor] | None] | None = None,
    progress: Callable[[int], None] | None = None,
    checkpoint: Checkpoint | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> TrainingHistory:
    """Train in place. The result depends on the arguments and the seed alone (and the machine's arithmetic), not on the caller's random state.

    groups : int64 [N]; of the items of one group the first in a batch takes part in it, so that none is another's negative
    present : bool [N] for the modalities that some items lack
    stop_after : leave the loop after that many steps of the schedule (a number chosen on validation items before)
    validation : (features, groups) or (features, groups, present), looked at every `evaluate_every` steps and at step 0. The model keeps its last
        weights; the best step is in the history.
    checkpoint : the state of the run is kept there and taken up again, to the same result bit for bit; a file of another run raises. It is written at
        the end too, so that a finished run is not repeated.
    process_group : every rank gives the same arguments and takes its share of every batch; what comes out is that of one process but for the order of
        sums. Rank 0's weights are the start, and it alone evaluates and keeps the checkpoint. Ctrl-C on any rank ends all after the same step.
    """
    history = TrainingHistory()
    total = config.steps if stop_after is None else stop_after
    if not 0 <= total <= config.steps:
        raise ValueError(f"fit_aligner: stop_after must be in 0..{config.steps}, got {stop_after}")
    if config.structure and ranks_of(process_group) > 1:
        raise ValueError(f"fit_aligner: structure must be 0 with several processes, since neighbourhoods are those of a whole batch, got {config.structure}")
    affine = [p for name, p in model.named_parameters() if ".linear." in name]
    branch = [p for name, p in model.named_parameters() if ".linear." not in name]
    groups_of_rates = [(affine, config.learning_rate * config.affine_rate)] + ([(branch, config.learning_rate)] if branch else [])
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": rate} for parameters, rate in groups_of_rates], betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    device = next(model.parameters()).device
    count = len(groups)
    batch = min(config.batch, count)

    def evaluate(step: int) -> None:
        if validation is not None:
            model.eval()
            held_features, held_groups, held_present = (*validation, None)[:3]
            with torch.no_grad():
                history.evaluated[step] = made_once(
                    lambda: validation_score(model.embed(held_features), held_groups, model.config.anchor, held_present), process_group
                )
            if history.evaluated[step] > history.evaluated.get(history.best_step, -1.0):
                history.best_step = step

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _held_interrupts() as interrupted:
        torch.manual_seed(seed)
        queue = torch.empty(0, dtype=torch.int64)
        identity = {"model": asdict(model.config), "training": asdict(config), "seed": seed, "total": total, "processes": ranks_of(process_group)}
        run = _Run(checkpoint if rank_of(process_group) == 0 else None, model, optimizer, history, identity)
        take_from_first_rank(model.state_dict().values(), process_group)
        start, queue = run.take_up(made_once(run.read, process_group), queue)
        if start == 0:
            evaluate(0)
        for step in range(start + 1, total + 1):
            if config.patience and history.evaluations_since_best() >= config.patience:
                break
            for group, (_, rate) in zip(optimizer.param_groups, groups_of_rates, strict=True):
                group["lr"] = rate * config.rate(step)
            model.train()
            for _ in range(DRAWS):
                if len(queue) < batch:
                    queue = torch.randperm(count)
                chosen, queue = queue[:batch].to(device), queue[batch:]
                chosen = share_of_rank(chosen[first_of_groups(groups[chosen])], process_group)
                masks = None if present is None else {name: mask[chosen] for name, mask in present.items()}
                output = model({name: x[chosen] for name, x in features.items()}, present=masks, process_group=process_group)
                if output.loss is not None:
                    break
            else:
                raise ValueError(f"fit_aligner: batch must bring together items of different groups with common modalities, got {batch} and {DRAWS} batches without any")
            objective = output.loss
            if weight := config.structure_weight(step):
                kept = []
                for name, embedding in output.embeddings.items():
                    there = slice(None) if masks is None or name not in masks else masks[name]
                    source = features[name][chosen][there]
                    if len(source) > 1:
                        kept.append(structure_loss(source.float(), embedding[there].float(), temperature=config.structure_temperature))
                objective = objective + weight * torch.stack(kept).mean()
            optimizer.zero_grad(set_to_none=True)
            objective.backward()
            loss = objective.detach()
            average_over_ranks([loss, *(p.grad for p in model.parameters() if p.grad is not None)], process_group)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            history.loss.append(float(loss))
            if not math.isfinite(history.loss[-1]):
                raise ValueError(f"fit_aligner: the loss must stay finite, got {history.loss[-1]} at step {step}; features may hold NaN or Inf")
            if step % config.evaluate_every == 0 or step == total:
                evaluate(step)
            stop = true_anywhere(interrupted(), device, process_group)
            run.keep(step, queue, now=step == total or stop)
            if progress is not None:
                progress(step)
            if stop:
                raise KeyboardInterrupt
    model.eval()
    return history


def first_of_groups(groups: Tensor) -> Tensor:
    """Where the first item of every group is: int64, rising.

    >>> first_of_groups(torch.tensor([7, 7, 2, 7, 2]))
    tensor([0, 2])
    """
    place, inverse = torch.arange(len(groups), device=groups.device), groups.unique(return_inverse=True)[1]
    first = torch.full_like(place, len(groups)).scatter_reduce(0, inverse, place, "amin")
    return place[first[inverse] == place]


class _Run:
    """State of a training run as one safetensors file: weights, moments of the optimiser, random state, what is left of the epoch; history as JSON."""

    def __init__(
        self, checkpoint: Checkpoint | None, model: GramAligner, optimizer: torch.optim.Optimizer, history: TrainingHistory, identity: dict
    ) -> None:
        self.checkpoint, self.model, self.optimizer, self.history = checkpoint, model, optimizer, history
        self.identity = json.dumps(identity, sort_keys=True)
        self.written = time.monotonic()
        self.device = next(model.parameters()).device

    def keep(self, step: int, queue: Tensor, now: bool) -> None:
        if self.checkpoint is None or not (now or time.monotonic() - self.written >= self.checkpoint.seconds):
            return
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, parameter in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            tensors |= {f"optimizer.{index}.{name}": value for name, value in self.optimizer.state[parameter].items()}
        tensors |= {"queue": queue.clone(), "random": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random_cuda"] = torch.cuda.get_rng_state(self.device)
        history = {"step": step, "identity": self.identity, **asdict(self.history)}
        write_tensors(self.checkpoint.path, tensors, {"history": json.dumps(history)})
        self.written = time.monotonic()

    def read(self) -> tuple[dict[str, Tensor], dict] | None:
        """What the file holds: tensors, and the rest."""
        if self.checkpoint is None or not self.checkpoint.path.is_file():
            return None
        from safetensors import safe_open

        path = self.checkpoint.path
        tensors = read_tensors(path)
        with safe_open(path, "pt") as file:
            kept = json.loads((file.metadata() or {}).get("history", "{}"))
        if kept.get("identity") != self.identity:
            raise ValueError(f"{path}: expected the state of this very run, got that of another ({kept.get('identity')} instead of {self.identity})")
        return tensors, kept

    def take_up(self, state: tuple[dict[str, Tensor], dict] | None, queue: Tensor) -> tuple[int, Tensor]:
        """Go on where the state is: (steps done, what is left of the epoch)."""
        if state is None:
            return 0, queue
        tensors, kept = state
        self.model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")})
        for index, parameter in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            prefix = f"optimizer.{index}."
            state_of = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            # as torch does: moments beside their parameter, the counter of steps where it was
            self.optimizer.state[parameter] = {name: value if name == "step" else value.to(parameter.device) for name, value in state_of.items()}
        torch.set_rng_state(tensors["random"])
        if "random_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random_cuda"], self.device)
        self.history.loss = kept["loss"]
        self.history.evaluated = {int(step): score for step, score in kept["evaluated"].items()}
        self.history.best_step = kept["best_step"]
        return kept["step"], tensors["queue"]


@contextlib.contextmanager
def _held_interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits for the end of a step, so that the state which is written then is that of a whole step."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    if not ours:  # only the main thread may set handlers; who ignores Ctrl-C goes on doing so
        yield lambda: False
        return
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:  # after the last look at it
        raise KeyboardInterrupt
