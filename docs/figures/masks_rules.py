"""Which pairs the masks of modalign.masks keep: two prefix tokens, two pictures of 3 x 3, a question of three tokens and an answer of three."""

import torch
from drawing import BLUE, plt, save
from matplotlib.colors import ListedColormap

from modalign import masks

SPANS = [("prefix", 2), ("visual", (3, 3)), ("visual", (3, 3)), ("question", 3), ("answer", 3)]

if __name__ == "__main__":
    tokens = masks.layout(SPANS)
    packed = tokens.replace(document=torch.arange(len(tokens)) // 9)
    shown = {
        "causal": masks.causal(len(tokens)),
        "image_prefix": masks.image_prefix(tokens),
        "composite": masks.composite(tokens),
        "no_visual_attention": masks.no_visual_attention(tokens),
        "modality_mutual": masks.modality_mutual(tokens),
        "neighbor_window": masks.neighbor_window(tokens),
        "packed sequences": masks.relation({(q, k): "causal" for q in masks.TYPE_NAMES for k in masks.TYPE_NAMES}, packed),
        "key_dropout & causal": masks.causal(len(tokens)) & masks.key_dropout(len(tokens), len(tokens), 0.3, generator=torch.Generator().manual_seed(1)),
    }
    figure, panels = plt.subplots(2, 4, figsize=(6.4, 3.7))
    for panel, (name, mask) in zip(panels.flat, shown.items(), strict=True):
        panel.pcolormesh(mask.dense()[0, 0].float(), cmap=ListedColormap(["#f1f3f6", BLUE]), vmin=0, vmax=1, edgecolors="white", linewidth=0.15, rasterized=True)
        panel.set_title(name, fontsize=7)
        panel.set(aspect="equal", xticks=[], yticks=[])
        panel.invert_yaxis()
        for spine in panel.spines.values():
            spine.set_visible(False)
    save(figure, __file__)
