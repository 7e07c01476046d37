"""Token merging of a picture of 24 x 24 patches with three flat areas and a ramp: groups after six steps, patches of the same group in the same colour."""

import torch
from drawing import plt, save
from matplotlib.colors import ListedColormap

from modalign.ops import match_tokens

SIDE, STEPS, R = 24, 6, 80


def picture() -> torch.Tensor:
    """[SIDE SIDE, 3] colours."""
    y, x = torch.meshgrid(torch.linspace(0, 1, SIDE), torch.linspace(0, 1, SIDE), indexing="ij")
    image = torch.stack([0.2 + 0 * x, 0.4 + 0 * x, 0.75 - 0.2 * y], -1)  # sky
    image[y > 0.7] = torch.tensor([0.25, 0.55, 0.3])
    image[(x - 0.68).square() + (y - 0.3).square() < 0.035] = torch.tensor([0.95, 0.85, 0.3])
    inside = ((x - 0.3).abs() < 0.2) & ((y - 0.65).abs() < 0.22)
    image[inside] = torch.stack([0.4 + x, 0.25 + y / 2, 0.3 + 0 * x], -1)[inside]
    return image.reshape(-1, 3)


if __name__ == "__main__":
    torch.manual_seed(0)
    colours = picture()
    features, source, size = colours[None] - colours.mean(0), None, None
    for _ in range(STEPS):
        match = match_tokens(features, R)
        features, size, source = match.merge(features, size), match.merge_size(size), match.source(source)
    M = features.shape[1]
    shown = torch.rand(M, 3) * 0.75 + 0.2
    figure, panels = plt.subplots(1, 3, figsize=(6.4, 2.3))
    merged = torch.stack([colours[source[0] == g].mean(0) for g in range(M)])[source[0]]
    for panel, title, values in zip(panels, (f"{SIDE * SIDE} tokens", f"{M} groups", f"{M} tokens, each where its patches were"), (colours, shown[source[0]], merged), strict=True):
        panel.pcolormesh(torch.arange(SIDE * SIDE).view(SIDE, SIDE), cmap=ListedColormap(values.clamp(0, 1).tolist()), vmin=0, vmax=SIDE * SIDE - 1, rasterized=True)
        panel.set_title(title, fontsize=7)
        panel.set(aspect="equal", xticks=[], yticks=[])
        panel.invert_yaxis()
        panel.spines[:].set_visible(False)
    save(figure, __file__)
