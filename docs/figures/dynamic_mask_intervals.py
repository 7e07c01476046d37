"""For which queries each key is kept by a dynamic mask: one run for each, from its arrival until it has been beaten often enough. Random scores, and equal ones."""

import torch

N, KEEP = 96, 12

if __name__ == "__main__":
    from drawing import BLUE, GREY, plt, save

    from modalign.ops.dynamic_mask_attention import _intervals

    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(6.2, 3.1))
    scores = torch.randn(1, 1, N, generator=torch.Generator().manual_seed(0))
    for panel, title, given in zip(panels, ("random scores", "equal scores"), (scores, scores * 0), strict=True):
        runs = _intervals(given, N, KEEP, True, "causal")[0, 0].tolist()
        for key, (first, last) in enumerate(runs):
            panel.plot([key, key], [first, last], linewidth=0.9, color=BLUE if last - first > KEEP else GREY)
        panel.set(title=title, xlabel="key", xlim=(0, N), ylim=(N, 0))
    panels[0].set_ylabel("queries that keep it")
    save(figure, __file__)
