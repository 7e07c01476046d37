"""Peak memory of one step, forward and backward, against the number of rows: segment_max_similarity beside the usual code. Gradients of the inputs included.

1024 candidates, segments of 64 rows, D = 256, float32, one thread; resident memory of a process of its own, beyond its inputs
(`modalign.testing.peak_memory`)."""

import torch

A, D, LENGTH, SIZES = 1024, 256, 64, (4096, 8192, 16384, 32768, 65536)
LARGEST = {"usual code": 32768, "this op": 65536}


def step(name: str, R: int):
    """What `peak_memory` measures."""
    from modalign.ops.segment_max_similarity import formula_segment_max_similarity, segment_max_similarity

    function = formula_segment_max_similarity if name == "usual code" else segment_max_similarity

    def problem(R):
        torch.manual_seed(0)
        x, y = (torch.randn(rows, D).requires_grad_() for rows in (R, A))
        offsets = torch.arange(0, R + 1, LENGTH)

        def call():
            function(x, offsets, y).values.sum().backward()
            return [x.grad, y.grad]

        return call

    return problem(R), problem(128)


if __name__ == "__main__":
    from drawing import BLUE, RED, plt, save

    from modalign.testing import peak_memory

    figure, axes = plt.subplots()
    for name, colour, marker in (("usual code", RED, "s"), ("this op", BLUE, "o")):
        sizes = [R for R in SIZES if R <= LARGEST[name]]
        peaks = [peak_memory("segment_max_memory:step", threads=1, name=name, R=R).peak / 1e6 for R in sizes]
        print(name, *(f"{R}: {peak:.1f} MB = {peak * 1e6 / (4 * (R + A) * D):.1f} inputs  " for R, peak in zip(sizes, peaks, strict=True)))
        axes.plot(sizes, peaks, marker=marker, markersize=3.5, linewidth=1, color=colour, label=name)
    axes.set(xscale="log", yscale="log", xlabel="rows R of all segments", ylabel="peak memory of a step, MB")
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.minorticks_off()
    axes.legend(loc="upper left")
    save(figure, __file__)
