"""The anchors' gradient while a batch becomes aligned, float32: its size, and its largest relative error over the anchors against float64 on the same vectors.

64 tuples of three unit vectors, a common direction plus delta times a random one, D = 512. Where a curve of the formula ends, gradients were NaN."""

import torch
from drawing import BLUE, GREY, RED, plt, save

from modalign.ops.gram_contrastive_loss import formula_gram_contrastive_loss, gram_contrastive_loss, reference_gram_contrastive_loss
from modalign.ops.triangle_contrastive_loss import formula_triangle_contrastive_loss, reference_triangle_contrastive_loss, triangle_contrastive_loss
from modalign.testing import Maker

BATCH, D = 64, 512
deltas = [10 ** (-step / 3) for step in range(16)]


def anchors_gradient(function, vectors, as_list):
    anchor, *others = vectors
    anchor = anchor.detach().requires_grad_()
    function(anchor, *([others] if as_list else others)).backward()
    return anchor.grad.double()


def measure(reference, functions, as_list):
    """-> {name: (mean length, largest relative error, anchors with NaN) for each delta}"""
    found = {"float64": [], **{name: [] for name in functions}}
    for delta in deltas:
        vectors = Maker(torch.float32, seed=7).nearly_collinear(3, BATCH, D, delta)
        exact = anchors_gradient(reference, [vector.double() for vector in vectors], as_list)
        found["float64"].append((exact.norm(dim=1).mean().item(), 0.0, 0))
        for name, function in functions.items():
            gradient = anchors_gradient(function, vectors, as_list)
            error = (gradient - exact).norm(dim=1) / exact.norm(dim=1)
            found[name].append((gradient.norm(dim=1).mean().item(), error.max().item(), int(error.isnan().sum())))
    return found


columns = {
    "gram_contrastive_loss": measure(reference_gram_contrastive_loss, {"usual code": formula_gram_contrastive_loss, "this op": gram_contrastive_loss}, True),
    "triangle_contrastive_loss": measure(reference_triangle_contrastive_loss, {"usual code": formula_triangle_contrastive_loss, "this op": triangle_contrastive_loss}, False),
}
styles = {"float64": {"color": GREY, "linewidth": 3, "alpha": 0.5}, "usual code": {"color": RED, "marker": "s"}, "this op": {"color": BLUE, "marker": "o"}}
figure, panels = plt.subplots(2, 2, sharex=True, sharey="row", figsize=(6.4, 4.6))
for column, (title, found) in enumerate(columns.items()):
    for which in (0, 1):
        panel = panels[which, column]
        for name, values in found.items():
            if which == 0 or name != "float64":
                panel.plot(deltas, [value[which] for value in values], label=name, **({"markersize": 3, "linewidth": 0.8} | styles[name]))
        panel.set(xscale="log", yscale="log")
        panel.minorticks_off()
    panels[0, column].set_title(title)
    panels[1, column].axhline(1, color="black", linewidth=0.6)
    panels[1, column].set_xlabel("spread δ of the vectors")
panels[0, 0].invert_xaxis()
panels[0, 0].set_ylabel("mean length")
panels[1, 0].set_ylabel("largest relative error")
panels[0, 0].legend(loc="lower left")
save(figure, __file__)
if __name__ == "__main__":
    for title, found in columns.items():
        for name, values in found.items():
            print(title, name, *(f"{delta:.1e}: {length:.1e} {error:.1e} {nan}  " for delta, (length, error, nan) in list(zip(deltas, values, strict=True))[::3]))
