"""The contrastive losses over 1, 2 and 3 gloo processes on this machine against one process: values and gradients, unequal batches, local gradients."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

from contrastive_cases import CONTRASTIVE, options_of, others_of
from modalign import ops
from modalign.testing import Maker
from ranks import run_ranks

LOSSES = {case.name: case for case in CONTRASTIVE}
FORMS = {"gram_contrastive_loss": "gram", "triangle_contrastive_loss": "triangle", "clip_loss": "product", "siglip_loss": "product"}
SIZES = {1: [6], 2: [7, 7], 3: [5, 8, 3]}


def problem(name, world, dtype=torch.float32):
    """The whole batch: leaves (scalars last), other options, where each rank begins."""
    make, total = Maker(dtype, seed=world), sum(SIZES[world])
    leaves = [make.unit(total, 20), *(others_of("triangle" if FORMS[name] != "product" else "product", make, total, 20))]
    scalars = options_of(name, make)
    options = {} if name == "siglip_loss" else {"label_smoothing": 0.1}
    if FORMS[name] == "gram":
        present = make.mask(total, 2)
        present[2] = False
        options["present"] = present
    target = torch.arange(total)
    target[1], target[-1], target[4] = -100, 0, -1
    starts = [sum(SIZES[world][:rank]) for rank in range(world + 1)]
    return leaves, scalars, options, target, starts


def call(name, leaves, scalars, options, target, **more):
    rest = [leaves[1:]] if FORMS[name] == "gram" else leaves[1:]
    return LOSSES[name].call(leaves[0], *rest, target=target, **scalars, **options, **more)


def run(name, leaves, scalars, options, target, **more):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    scalars = {key: value.clone().requires_grad_() for key, value in scalars.items()}
    loss = call(name, leaves, scalars, options, target, **more)
    return [loss.detach(), *torch.autograd.grad(loss, [*leaves, *scalars.values()])]


def refused(name, leaves, scalars, options, target, exchange):
    """A second derivative, and targets out of range, on every rank alike."""
    import torch.distributed as dist

    more = {"exchange": exchange, "process_group": dist.group.WORLD}
    for position in range(len(leaves)):
        fresh = [leaf.clone().requires_grad_(index == position) for index, leaf in enumerate(leaves)]
        (first,) = torch.autograd.grad(call(name, fresh, scalars, options, target, **more), fresh[position], create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name}: double backward is not supported"):
            first.sum().backward()
    for wrong in (99, -5):
        with pytest.raises(RuntimeError, match=f"{name}: target must hold indices from 0 to .* got {wrong} at row 0"):
            call(name, leaves, scalars, options, torch.full_like(target, wrong), **more)
    for kept in ({"implementation": "dense"}, {"workspace_bytes": 1 << 20}):
        with pytest.raises(ValueError, match='implementation must not be "dense", nor workspace_bytes given, together with process_group'):
            call(name, leaves, scalars, options, target, **more, **kept)


def worker(rank, world):
    """One rank: every loss, gathered and round the ring."""
    import torch.distributed as dist

    found = {}
    for name in LOSSES:
        leaves, scalars, options, target, starts = problem(name, world)
        here = slice(starts[rank], starts[rank + 1])
        if "present" in options:
            options["present"] = options["present"][here]
        mine = [leaf[here] for leaf in leaves]
        for exchange in ("gather", "ring"):
            for how in ("full", "local", "again"):
                if how == "local" and name == "siglip_loss":
                    continue
                more = {"exchange": exchange, "gather_grad": "full" if how == "again" else how, "process_group": dist.group.WORLD}
                found[name, exchange, how] = run(name, mine, scalars, options, target[here], **more)
            found[name, exchange, "sum"] = run(name, mine, scalars, options, target[here], reduction="sum", exchange=exchange, process_group=dist.group.WORLD)
            refused(name, mine, scalars, options, target[here], exchange)
        plain = {key: value for key, value in options.items() if key == "present"}
        found[name, "default target"] = call(name, mine, scalars, plain, None, process_group=dist.group.WORLD, return_accuracy=True)
        found[name, "none"] = call(name, mine, scalars, options, target[here], process_group=dist.group.WORLD, reduction="none")
    return found


class Heads(torch.nn.Module):
    """Two heads and a learnable temperature in one model, as DistributedDataParallel wants it: everything inside its forward."""

    def __init__(self, exchange="gather", group=None):
        super().__init__()
        torch.manual_seed(0)
        self.heads = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(width, 24), torch.nn.GELU(), torch.nn.Linear(24, 16)) for width in (20, 12))
        self.log_scale = torch.nn.Parameter(torch.tensor(2.0))
        self.group = {} if group is None else {"process_group": group, "exchange": exchange}

    def forward(self, *inputs):
        x, y = (torch.utils.checkpoint.checkpoint(head, view, use_reentrant=False) for head, view in zip(self.heads, inputs, strict=True))
        return ops.clip_loss(x, y, logit_scale=self.log_scale.exp(), normalize=True, **self.group)


def trained(model, inputs, wrap):
    """Two steps with the scaler of mixed precision."""
    wrapped, scaler = wrap(model), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(wrapped(*inputs)).backward()
        scaler.step(optimizer)
        scaler.update()
    return [parameter.detach().clone() for parameter in model.parameters()]


def whole_batch():
    return [Maker(torch.float32, seed=5).randn(9, 20), Maker(torch.float32, seed=6).randn(9, 12)]


def data_parallel(rank, world):
    import torch.distributed as dist

    here = [slice(0, 5), slice(5, 9)][rank]
    inputs = [view[here] for view in whole_batch()]
    return {
        exchange: trained(Heads(exchange, dist.group.WORLD), inputs, torch.nn.parallel.DistributedDataParallel) for exchange in ("gather", "ring")
    }


def test_training_under_distributed_data_parallel(tmp_path):
    """Unequal batches on two ranks, checkpointed encoders, a learnable temperature, a gradient scaler: the weights of one process with the whole batch."""
    expected = trained(Heads(), whole_batch(), lambda model: model)
    for found in run_ranks(2, "test_distributed:data_parallel", str(tmp_path)):
        for exchange, weights in found.items():
            for ours, theirs in zip(weights, expected, strict=True):
                assert relative(ours, theirs.double()) < 1e-5, exchange


@pytest.fixture(scope="module", params=list(SIZES))
def ranks(request, tmp_path_factory):
    return request.param, run_ranks(request.param, "test_distributed:worker", str(tmp_path_factory.mktemp("ranks")))


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("name", list(LOSSES))
def test_averaged_gradients_are_those_of_one_process(ranks, name, exchange):
    world, found = ranks
    expected = run(name, *problem(name, world, torch.float64)[:4])
    leaves = len(expected) - 1 - len(options_of(name, Maker()))
    mean = torch.stack([rank[name, exchange, "full"][0] for rank in found]).double().mean()
    assert relative(mean, expected[0]) < 1e-5
    for index in range(leaves):  # a leaf's rows lie on one rank; averaging divides by the number of ranks
        gathered = torch.cat([rank[name, exchange, "full"][1 + index] for rank in found]) / world
        assert relative(gathered, expected[1 + index]) < 1e-5, index
    for index in range(leaves, len(expected) - 1):
        assert relative(torch.stack([rank[name, exchange, "full"][1 + index] for rank in found]).double().mean(), expected[1 + index]) < 3e-5
    summed = run(name, *problem(name, world, torch.float64)[:4], reduction="sum")
    assert relative(torch.stack([rank[name, exchange, "sum"][0] for rank in found]).double().mean(), summed[0]) < 1e-5
    assert relative(torch.cat([rank[name, exchange, "sum"][1] for rank in found]) / world, summed[1]) < 1e-5
    for rank in found:
        for ours, theirs in zip(rank[name, exchange, "full"], rank[name, exchange, "again"], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", list(LOSSES))
def test_rows_and_accuracy(ranks, name):
    world, found = ranks
    leaves, scalars, options, target, _ = problem(name, world, torch.float64)
    assert relative(torch.cat([rank[name, "none"] for rank in found]).detach(), call(name, leaves, scalars, options, target, reduction="none")) < 1e-5
    plain = {key: value for key, value in options.items() if key == "present"}
    expected, accuracy = call(name, leaves, scalars, plain, None, return_accuracy=True)
    assert relative(torch.stack([rank[name, "default target"][0] for rank in found]).detach().double().mean(), expected) < 1e-5
    for rank in found:
        assert rank[name, "default target"][1][0].item() == pytest.approx(accuracy[0].item())


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "siglip_loss"])
def test_local_gradients_leave_out_what_was_gathered(ranks, name, exchange):
    """Rows get the gradient of their own direction, candidates of theirs."""
    world, found = ranks
    leaves, scalars, options, target, _ = problem(name, world, torch.float64)
    half = [run(name, leaves, scalars, options | {"direction": direction}, target) for direction in ("rows", "columns")]
    assert relative(torch.stack([rank[name, exchange, "local"][0] for rank in found]).double().mean(), (half[0][0] + half[1][0]) / 2) < 1e-5
    anchors = torch.cat([rank[name, exchange, "local"][1] for rank in found]) / world
    assert relative(anchors, half[0][1] / 2) < 1e-5
    for index in range(1, len(leaves)):
        candidates = torch.cat([rank[name, exchange, "local"][1 + index] for rank in found]) / world
        assert relative(candidates, half[1][1 + index] / 2) < 1e-5


def test_process_groups_are_checked():
    a = torch.eye(3)
    for call in (lambda **more: ops.gram_contrastive_loss(a, [a], **more), lambda **more: ops.clip_loss(a, a, logit_scale=1.0, **more)):
        with pytest.raises(ValueError, match="process_group must be None where torch.distributed is not initialised, got str"):
            call(process_group="world")
        with pytest.raises(ValueError, match='gather_grad must be "full" or "local", got str'):
            call(gather_grad="none")
        with pytest.raises(ValueError, match="siglip_loss: "):
            ops.siglip_loss(a, a, logit_scale=1.0, logit_bias=0.0, gather_grad="local")
        with pytest.raises(ValueError, match='exchange must be "gather" or "ring", got str'):
            call(exchange="tree")
