"""Peak memory of a search among themselves against the number of points: knn beside the matrix of products and torch.topk.

k = 10, D = 64, float32, one thread; resident memory of a process of its own, beyond its inputs (`modalign.testing.peak_memory`)."""

import torch

D, K, SIZES = 64, 10, (1024, 2048, 4096, 8192, 16384, 32768)
LARGEST = {"product and torch.topk": 16384, "knn": 32768}


def search(name: str, N: int):
    """What `peak_memory` measures."""
    from modalign.ops import knn

    def problem(N):
        torch.manual_seed(0)
        points = torch.randn(N, D)
        if name == "knn":
            return lambda: knn(points, k=K, metric="dot", exclude_self=True)
        return lambda: (points @ points.T).fill_diagonal_(-torch.inf).topk(K)

    return problem(N), problem(64)


if __name__ == "__main__":
    from drawing import BLUE, RED, plt, save

    from modalign.testing import peak_memory

    figure, panel = plt.subplots()
    for name, colour, marker in (("product and torch.topk", RED, "s"), ("knn", BLUE, "o")):
        sizes = [N for N in SIZES if N <= LARGEST[name]]
        peaks = [peak_memory("knn_memory:search", threads=1, name=name, N=N).peak / 1e6 for N in sizes]
        print(name, *(f"{N}: {peak:.1f} MB  " for N, peak in zip(sizes, peaks, strict=True)))
        panel.plot(sizes, peaks, marker=marker, markersize=3.5, linewidth=1, color=colour, label=name)
    panel.set(xscale="log", yscale="log", xlabel="points", ylabel="peak memory of a search, MB")
    panel.set_xticks(SIZES[::2], [str(size) for size in SIZES[::2]])
    panel.minorticks_off()
    panel.legend(loc="upper left")
    save(figure, __file__)
