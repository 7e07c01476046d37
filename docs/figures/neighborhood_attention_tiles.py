"""The order in which neighborhood_attention takes the tokens of a grid, and the share of tiles of 96 x 96 pairs that windows then meet, beside that of tokens as they lie and that of pairs."""

import torch

SIDE, KERNELS, TILE = 128, (3, 7, 13, 21, 31, 41), 96


def met(mask) -> float:
    """The share of tiles of which something is kept."""
    N = mask.queries
    tiles = -(-N // TILE)
    found = 0
    for first in range(0, N, TILE):
        line = mask.rows(first, min(first + TILE, N)).dense()[0, 0].any(0)
        found += int(torch.nn.functional.pad(line, (0, tiles * TILE - N)).view(tiles, TILE).any(1).sum())
    return found / tiles**2


if __name__ == "__main__":
    from drawing import BLUE, GREY, RED, plt, save
    from matplotlib.colors import ListedColormap

    from modalign import masks

    figure, (picture, panel) = plt.subplots(1, 2, width_ratios=(1, 1.5))
    hood = masks.neighborhood((60, 70), 13)
    picture.pcolormesh((hood.places // TILE % 5).view(60, 70), cmap=ListedColormap(["#1f5fa8", "#dbe6f3", "#6f9bcd", "#f6f0e4", "#a9c5e4"]), rasterized=True)
    picture.set(title="60 x 70 tokens, 44 tiles", aspect="equal", xticks=[], yticks=[])
    picture.invert_yaxis()
    curves = {"tokens as they lie": (RED, "s", []), "neighborhood_attention": (BLUE, "o", []), "pairs that are kept": (GREY, "^", [])}
    for kernel in KERNELS:
        hood = masks.neighborhood((SIDE, SIDE), kernel)
        query, key, *rule = hood.mask.tensors
        lying = masks.Mask(hood.mask.queries, hood.mask.keys, (hood.restore(query, 2).contiguous(), hood.restore(key, 2).contiguous(), *rule), hood.mask.steps)
        for values, share in zip((each[2] for each in curves.values()), (met(lying), met(hood.mask), kernel**2 / SIDE**2), strict=True):
            values.append(share)
        print(kernel, *(f"{name}: {values[-1]:.4f}  " for name, (*_, values) in curves.items()))
    for name, (colour, marker, values) in curves.items():
        panel.plot(KERNELS, values, marker=marker, markersize=3.5, linewidth=1, color=colour, label=name)
    panel.set(yscale="log", xlabel="window, on a grid of 128 x 128", ylabel="share of tiles, of pairs")
    panel.legend(loc="lower right")
    save(figure, __file__)
