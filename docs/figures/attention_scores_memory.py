"""Peak memory of reading off causal attention how much every key gets, how much falls on eight segments, and where a walk along it ends up: with the matrix of probabilities and without.

Two heads, D = 64, float32, forward, one thread; resident memory of a process of its own, beyond its inputs (`modalign.testing.peak_memory`)."""

import torch

H, D, SIZES = 2, 64, (2048, 4096, 8192, 16384)
LARGEST = {"matrix of probabilities": 4096, "attention_segment_mass": 16384, "attention_power_iteration": 16384, "attention_column_sum": 16384}


def reading(name: str, N: int):
    """What `peak_memory` measures."""
    from modalign import ops

    def problem(N):
        torch.manual_seed(0)
        q, k, segments = torch.randn(1, H, N, D), torch.randn(1, H, N, D), torch.arange(N) % 8
        return {
            "matrix of probabilities": lambda: (q @ k.mT * D**-0.5 + torch.full((N, N), -torch.inf).triu(1)).softmax(-1).sum(2),
            "attention_column_sum": lambda: ops.attention_column_sum(q, k, causal=True),
            "attention_segment_mass": lambda: ops.attention_segment_mass(q, k, segments, 8, causal=True),
            "attention_power_iteration": lambda: ops.attention_power_iteration(q, k, causal=True, iterations=2),
        }[name]

    return problem(N), problem(64)


if __name__ == "__main__":
    from drawing import BLUE, GREY, RED, plt, save

    from modalign.testing import peak_memory

    figure, panel = plt.subplots()
    for (name, largest), colour, marker, line in zip(LARGEST.items(), (RED, GREY, BLUE, BLUE), "s^xo", ("-", "-", ":", "-"), strict=True):
        sizes = [N for N in SIZES if N <= largest]
        peaks = [peak_memory("attention_scores_memory:reading", threads=1, name=name, N=N).peak / 1e6 for N in sizes]
        print(name, *(f"{N}: {peak:.2f} MB  " for N, peak in zip(sizes, peaks, strict=True)))
        panel.plot(sizes, peaks, marker=marker, markersize=3.5, linewidth=1, linestyle=line, color=colour, label=name)
    panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel="peak memory, MB")
    panel.set_xticks(SIZES, [str(size) for size in SIZES])
    panel.minorticks_off()
    panel.legend(loc="upper left")
    save(figure, __file__)
