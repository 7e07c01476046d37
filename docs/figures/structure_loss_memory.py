"""Peak memory of a training step against the batch: structure_loss with products kept and made again, beside the usual code.

D = 64 to 32, float32, one thread; resident memory of a process of its own, beyond its inputs (`modalign.testing.peak_memory`)."""

import torch

SIZES = (512, 1024, 2048, 4096, 8192, 16384)
LARGEST = {"matrices and softmax": 4096, "products kept": 8192, "made again": 16384}


def step(name: str, B: int):
    """What `peak_memory` measures."""
    from modalign.ops import structure_loss
    from modalign.ops.structure_loss import reference_structure_loss

    def problem(B):
        torch.manual_seed(0)
        source, aligned = torch.randn(B, 64), torch.randn(B, 32, requires_grad=True)
        if name == "matrices and softmax":
            return lambda: reference_structure_loss(source, aligned).backward()
        return lambda: structure_loss(source, aligned, implementation="dense" if name == "products kept" else "streaming").backward()

    return problem(B), problem(64)


if __name__ == "__main__":
    from drawing import BLUE, GREEN, RED, plt, save

    from modalign.testing import peak_memory

    figure, panel = plt.subplots()
    for (name, largest), colour, marker in zip(LARGEST.items(), (RED, GREEN, BLUE), "s^o", strict=True):
        sizes = [B for B in SIZES if B <= largest]
        peaks = [peak_memory("structure_loss_memory:step", threads=1, name=name, B=B).peak / 1e6 for B in sizes]
        print(name, *(f"{B}: {peak:.1f} MB  " for B, peak in zip(sizes, peaks, strict=True)))
        panel.plot(sizes, peaks, marker=marker, markersize=3.5, linewidth=1, color=colour, label=name)
    panel.set(xscale="log", yscale="log", xlabel="batch", ylabel="peak memory of a step, MB")
    panel.set_xticks(SIZES[::2], [str(size) for size in SIZES[::2]])
    panel.minorticks_off()
    panel.legend(loc="upper left")
    save(figure, __file__)
