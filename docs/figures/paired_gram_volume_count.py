"""Volume of n of 8 unit vectors that have one cosine c between any two, the others absent; and with normalize="root"."""

import torch
from drawing import BLUE, GREEN, ORANGE, plt, save

from modalign.ops import paired_gram_volume

figure, panels = plt.subplots(1, 2, sharey=True)
for c, colour in ((0.0, GREEN), (0.5, ORANGE), (0.8, BLUE)):
    vectors = torch.linalg.cholesky(torch.full((8, 8), c).fill_diagonal_(1))
    counts = torch.arange(1, 9)
    present = torch.arange(8) < counts.unsqueeze(1)          # row n - 1: the first n are there
    tuples = vectors.expand(8, 8, 8)
    for panel, normalize in ((panels[0], False), (panels[1], "root")):
        panel.plot(counts, paired_gram_volume(tuples, present=present, normalize=normalize), "o-", markersize=4, linewidth=1, color=colour, label=f"cosine {c:g}")
panels[0].set(xlabel="vectors present", ylabel="value", title="volume", ylim=(0, 1.05))
panels[1].set(xlabel="vectors present", title='normalize="root"')
panels[1].legend(loc="lower right")
save(figure, __file__)
