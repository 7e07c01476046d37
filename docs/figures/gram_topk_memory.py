"""Peak memory of a search against the number of candidates: gram_topk and gram_target_rank beside the matrix of volumes and torch.topk.

1024 anchors, k = 10, two other modalities, D = 64, float32, one thread; resident memory of a process of its own, beyond its inputs
(`modalign.testing.peak_memory`)."""

import torch

B, D, K, SIZES = 1024, 64, 10, (1024, 4096, 16384, 65536)
DEFAULT, SMALL = "gram_topk", "gram_topk, workspace_bytes=0"


def search(name: str, C: int):
    """What `peak_memory` measures."""
    from modalign.ops import gram_target_rank, gram_topk, gram_volume

    def problem(B, C):
        torch.manual_seed(0)
        anchor, others, target = torch.randn(B, D), [torch.randn(C, D) for _ in range(2)], torch.zeros(B, dtype=torch.int64)
        if name == "gram_target_rank":
            return lambda: gram_target_rank(anchor, others, target)
        if name in (DEFAULT, SMALL):
            return lambda: gram_topk(anchor, others, K, workspace_bytes=0 if name == SMALL else None)
        return lambda: gram_volume(anchor, others).topk(K, largest=False)

    return problem(B, C), problem(32, 40)


if __name__ == "__main__":
    from drawing import BLUE, GREEN, ORANGE, RED, plt, save

    from modalign.testing import peak_memory

    figure, panel = plt.subplots()
    for name, colour, marker in (("gram_volume and torch.topk", RED, "s"), (DEFAULT, BLUE, "o"), ("gram_target_rank", ORANGE, "x"), (SMALL, GREEN, "^")):
        peaks = [peak_memory("gram_topk_memory:search", threads=1, name=name, C=C).peak / 1e6 for C in SIZES]
        print(name, *(f"{C}: {peak:.1f} MB  " for C, peak in zip(SIZES, peaks, strict=True)))
        panel.plot(SIZES, peaks, marker=marker, markersize=3.5, linewidth=1, color=colour, label=name)
    panel.set(xscale="log", yscale="log", xlabel="candidates C", ylabel="peak memory of a search, MB")
    panel.set_xticks(SIZES, [str(size) for size in SIZES])
    panel.minorticks_off()
    panel.legend(loc="upper left")
    save(figure, __file__)
