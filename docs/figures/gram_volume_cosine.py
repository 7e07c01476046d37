"""Volume of k unit vectors with the same cosine between any two: `gram_volume` (points) on the closed form sqrt((1 - c)^(k - 1) (1 + (k - 1) c)) (lines)."""

import torch
from drawing import BLUE, GREEN, ORANGE, PURPLE, plt, save

from modalign.ops import gram_volume

figure, axes = plt.subplots()
for k, colour in ((2, BLUE), (3, ORANGE), (4, GREEN), (5, PURPLE)):
    least = -1 / (k - 1)
    cosine = torch.linspace(least, 1, 400, dtype=torch.float64)
    axes.plot(cosine, ((1 - cosine) ** (k - 1) * (1 + (k - 1) * cosine)).clamp(min=0).sqrt(), color=colour, linewidth=1)
    found = []
    points = torch.linspace(least + 0.02, 0.98, 18, dtype=torch.float64)
    for c in points:
        # the rows of a Cholesky factor of the Gram matrix are vectors with that Gram matrix
        vectors = torch.linalg.cholesky(torch.full((k, k), float(c), dtype=torch.float64).fill_diagonal_(1)).float()
        found.append(gram_volume(vectors[:1], [vectors[p : p + 1] for p in range(1, k)]).item())
    axes.plot(points, found, "o", color=colour, markersize=4, label=f"k = {k}")
axes.set(xlabel="cosine c between any two of the k unit vectors", ylabel="volume", xlim=(-1.02, 1.02), ylim=(0, 1.05))
axes.legend()
save(figure, __file__)
