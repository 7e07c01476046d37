"""Peak memory of a causal attention step, forward and backward, against the number of tokens: masked_attention beside the matrix of scores and torch's fused attention.

Two heads, D = 64, float32, one thread; resident memory of a process of its own, beyond its inputs (`modalign.testing.peak_memory`)."""

import torch

H, D, SIZES = 2, 64, (1024, 2048, 4096, 8192, 16384)
LARGEST = {"matrix of scores": 4096, "torch, fused": 16384, "masked_attention": 16384}


def step(name: str, N: int):
    """What `peak_memory` measures."""
    import torch.nn.functional as F

    from modalign.ops import masked_attention
    from modalign.ops.masked_attention import reference_masked_attention

    def problem(N):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, H, N, D, requires_grad=True) for _ in range(3))
        if name == "matrix of scores":
            return lambda: reference_masked_attention(q, k, v, causal=True).sum().backward()
        if name == "torch, fused":
            return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
        return lambda: masked_attention(q, k, v, causal=True).sum().backward()

    return problem(N), problem(64)


if __name__ == "__main__":
    from drawing import BLUE, GREY, RED, plt, save

    from modalign.testing import peak_memory

    figure, panel = plt.subplots()
    for name, colour, marker in (("matrix of scores", RED, "s"), ("torch, fused", GREY, "^"), ("masked_attention", BLUE, "o")):
        sizes = [N for N in SIZES if N <= LARGEST[name]]
        peaks = [peak_memory("masked_attention_memory:step", threads=1, name=name, N=N).peak / 1e6 for N in sizes]
        print(name, *(f"{N}: {peak:.1f} MB  " for N, peak in zip(sizes, peaks, strict=True)))
        panel.plot(sizes, peaks, marker=marker, markersize=3.5, linewidth=1, color=colour, label=name)
    panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel="peak memory of a step, MB")
    panel.set_xticks(SIZES, [str(size) for size in SIZES])
    panel.minorticks_off()
    panel.legend(loc="upper left")
    save(figure, __file__)
