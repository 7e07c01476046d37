"""One contrastive loss over two processes: every item meets the items of both, and averaged gradients are those of one process with the whole batch.

    python examples/loss_over_two_processes.py
"""

import tempfile

import torch
import torch.distributed as dist

from modalign.ops import gram_contrastive_loss

WORLD, BATCHES = 2, [40, 24]  # ranks may differ in size


def model_and_batch():
    """The same on every rank: three linear heads, and the whole batch."""
    torch.manual_seed(0)
    heads = torch.nn.ModuleList(torch.nn.Linear(width, 16) for width in (20, 30, 25))
    return heads, [torch.randn(sum(BATCHES), head.in_features) for head in heads]


def gradients(heads, batch, **options):
    heads.zero_grad()
    text, video, audio = (head(view) for head, view in zip(heads, batch, strict=True))
    loss = gram_contrastive_loss(text, [video, audio], temperature=0.1, normalize=True, **options)
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in heads.parameters()]


def one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    heads, batch = model_and_batch()
    expected_loss, expected = gradients(heads, batch)  # one process with everything
    start = sum(BATCHES[:rank])
    mine = [view[start : start + BATCHES[rank]] for view in batch]
    for name, options in {
        "each rank for itself": {},
        "process_group, gather": {"process_group": dist.group.WORLD},
        "process_group, ring": {"process_group": dist.group.WORLD, "exchange": "ring"},
    }.items():
        loss, found = gradients(heads, mine, **options)
        for tensor in (loss, *found):  # what DistributedDataParallel does with gradients
            dist.all_reduce(tensor)
            tensor /= WORLD
        apart = max(((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in zip(found, expected, strict=True))
        if rank == 0:
            print(f"{name:22s} loss {loss:.6f}, one process {expected_loss:.6f}; gradients differ by {apart:.0e} of their length")
        assert (apart < 1e-4) == bool(options), "only with a process group are the other rank's items among the candidates"
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_rank, args=(folder,), nprocs=WORLD)
