"""The toy picture of token_matching.py with the 24 patches that are taken first, numbered in their order, and how far each was from those before it."""

import torch
from drawing import BLUE, plt, save
from matplotlib.colors import ListedColormap
from token_matching import SIDE, picture

from modalign.ops import select_diverse

N = 24

if __name__ == "__main__":
    colours = picture()
    found = select_diverse(colours[None] - colours.mean(0), N)
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.4, 2.9), width_ratios=(1, 1.2))
    left.pcolormesh(torch.arange(SIDE * SIDE).view(SIDE, SIDE), cmap=ListedColormap(colours.clamp(0, 1).tolist()), vmin=0, vmax=SIDE * SIDE - 1, rasterized=True)
    for t, token in enumerate(found.indices[0].tolist()):
        left.text(token % SIDE + 0.5, token // SIDE + 0.5, str(t + 1), ha="center", va="center", fontsize=6, color="white", bbox={"boxstyle": "circle,pad=0.15", "facecolor": "black", "linewidth": 0})
    left.set(aspect="equal", xticks=[], yticks=[])
    left.invert_yaxis()
    left.spines[:].set_visible(False)
    right.plot(range(2, N + 1), found.radii[0, 1:], marker="o", markersize=3, linewidth=1, color=BLUE)
    right.set(xlabel="token taken", ylabel="distance from those before it", yscale="log")
    save(figure, __file__)
