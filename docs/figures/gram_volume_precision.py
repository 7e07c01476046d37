"""Relative error of volumes and of anchor gradients in float32 when three unit vectors lie within delta of a common direction: ours and the determinant formula.

64 tuples, D = 512; the largest error over the tuples, against the plain-torch reference in float64 on the same float32 vectors."""

import torch
from drawing import BLUE, RED, plt, save

from modalign.ops import gram_volume
from modalign.ops.gram_volume import formula_gram_volume, reference_gram_volume
from modalign.testing import Maker

TUPLES, D = 64, 512
deltas = [10 ** (-4 * step / 16) for step in range(17)]


def volumes_and_gradients(function, vectors):
    anchor, *others = vectors
    anchor = anchor.detach().requires_grad_()
    volume = function(anchor, others).diagonal()
    volume.sum().backward()
    return volume.detach(), anchor.grad


errors = {"determinant formula": ([], []), "gram_volume": ([], [])}
for delta in deltas:
    vectors = Maker(torch.float32, seed=7).nearly_collinear(3, TUPLES, D, delta)
    exact, exact_gradient = volumes_and_gradients(reference_gram_volume, [vector.double() for vector in vectors])
    for name, function in (("determinant formula", formula_gram_volume), ("gram_volume", gram_volume)):
        volume, gradient = volumes_and_gradients(function, vectors)
        errors[name][0].append(((volume - exact).abs() / exact).max().item())
        errors[name][1].append(((gradient - exact_gradient).norm(dim=1) / exact_gradient.norm(dim=1)).max().item())
figure, panels = plt.subplots(1, 2, sharey=True)
for panel, which, title in ((panels[0], 0, "volume"), (panels[1], 1, "gradient of the anchor")):
    for name, colour, marker in (("determinant formula", RED, "s"), ("gram_volume", BLUE, "o")):
        panel.plot(deltas, errors[name][which], marker=marker, markersize=3.5, linewidth=1, color=colour, label=name)
    panel.set(xscale="log", yscale="log", xlabel="spread δ of the vectors", title=title)
    panel.invert_xaxis()
    panel.minorticks_off()
    panel.axhline(1, color="black", linewidth=0.6)
panels[0].set_ylabel("largest relative error, float32")
panels[0].legend(loc="upper left")
save(figure, __file__)
if __name__ == "__main__":
    for name, (volume, gradient) in errors.items():
        print(name, *(f"{delta:.1e}: {v:.1e} {g:.1e}  " for delta, v, g in list(zip(deltas, volume, gradient, strict=True))[::2]))
