"""Peak memory of one step, forward and backward, against the batch size: gram_contrastive_loss and clip_loss beside the usual code. Gradients of the inputs included.

Three (two) modalities, D = 256, float32, one thread; resident memory of a process of its own, beyond its inputs (`modalign.testing.peak_memory`)."""

import torch

D, SIZES = 256, (256, 512, 1024, 2048, 4096, 8192)
LARGEST = {"usual code": 4096, "this op": 8192, "this op, streaming": 8192}


def step(loss: str, name: str, B: int):
    """What `peak_memory` measures."""
    from modalign.ops.clip_loss import clip_loss, formula_clip_loss
    from modalign.ops.gram_contrastive_loss import formula_gram_contrastive_loss, gram_contrastive_loss

    options = {"implementation": "streaming"} if "streaming" in name else {}

    def value(x, *rest):
        if loss == "clip_loss":
            return formula_clip_loss(x, *rest, logit_scale=14.0) if name == "usual code" else clip_loss(x, *rest, logit_scale=14.0, **options)
        return formula_gram_contrastive_loss(x, rest) if name == "usual code" else gram_contrastive_loss(x, rest, **options)

    def problem(rows):
        torch.manual_seed(0)
        vectors = [torch.randn(rows, D).div_(D**0.5).requires_grad_() for _ in range(3 if loss == "gram_contrastive_loss" else 2)]

        def call():
            value(*vectors).backward()
            return [vector.grad for vector in vectors]

        return call

    return problem(B), problem(32)


if __name__ == "__main__":
    from drawing import BLUE, GREEN, RED, plt, save

    from modalign.testing import peak_memory

    figure, panels = plt.subplots(1, 2, sharey=True)
    for panel, loss in zip(panels, ("gram_contrastive_loss", "clip_loss"), strict=True):
        numbers = D * (3 if loss == "gram_contrastive_loss" else 2) * 4 / 1e6   # MB of the inputs per row
        for name, colour, marker in (("usual code", RED, "s"), ("this op", BLUE, "o"), ("this op, streaming", GREEN, "^")):
            sizes = [B for B in SIZES if B <= LARGEST[name]]
            peaks = [peak_memory("contrastive_memory:step", threads=1, loss=loss, name=name, B=B).peak / 1e6 for B in sizes]
            print(loss, name, *(f"{B}: {peak:.1f} MB = {peak / (numbers * B):.1f} inputs  " for B, peak in zip(sizes, peaks, strict=True)))
            panel.plot(sizes, peaks, marker=marker, markersize=3.5, linewidth=1, color=colour, label=name)
        panel.set(xscale="log", yscale="log", xlabel="batch size", title=loss)
        panel.set_xticks(SIZES[::2], [str(size) for size in SIZES[::2]])
        panel.minorticks_off()
    panels[0].set_ylabel("peak memory of a step, MB")
    panels[1].legend(loc="upper left")
    save(figure, __file__)
