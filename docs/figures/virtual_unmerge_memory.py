"""Peak memory of a causal step of virtual unmerging, forward and backward, against the number of virtual tokens: virtual_unmerge_attention beside the matrix of scores.

Four virtual tokens to a merged one, two heads, D = 64, float32, one thread; resident memory of a process of its own, beyond its inputs (`modalign.testing.peak_memory`)."""

import torch

H, D, SIZES = 2, 64, (1024, 2048, 4096, 8192, 16384)
LARGEST = {"matrix of scores": 4096, "virtual_unmerge_attention": 16384}


def step(name: str, N: int):
    """What `peak_memory` measures."""
    from modalign.ops import virtual_unmerge_attention
    from modalign.ops.virtual_unmerge_attention import reference_virtual_unmerge_attention

    op = virtual_unmerge_attention if name == "virtual_unmerge_attention" else reference_virtual_unmerge_attention

    def problem(N):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, H, N // 4, D, requires_grad=True) for _ in range(3))
        return lambda: op(q, k, v, torch.arange(N) // 4).sum().backward()

    return problem(N), problem(64)


if __name__ == "__main__":
    from drawing import BLUE, RED, plt, save

    from modalign.testing import peak_memory

    figure, panel = plt.subplots()
    for name, colour, marker in (("matrix of scores", RED, "s"), ("virtual_unmerge_attention", BLUE, "o")):
        sizes = [N for N in SIZES if N <= LARGEST[name]]
        peaks = [peak_memory("virtual_unmerge_memory:step", threads=1, name=name, N=N).peak / 1e6 for N in sizes]
        print(name, *(f"{N}: {peak:.1f} MB  " for N, peak in zip(sizes, peaks, strict=True)))
        panel.plot(sizes, peaks, marker=marker, markersize=3.5, linewidth=1, color=colour, label=name)
    panel.set(xscale="log", yscale="log", xlabel="virtual tokens", ylabel="peak memory of a step, MB")
    panel.set_xticks(SIZES, [str(size) for size in SIZES])
    panel.minorticks_off()
    panel.legend(loc="upper left")
    save(figure, __file__)
