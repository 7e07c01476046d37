"""How often each candidate is drawn for one anchor, against softmax + floor."""

import torch
import torch.nn.functional as F
from drawing import BLUE, ORANGE, plt, save

from modalign.ops import gram_hard_negatives, gram_volume
from modalign.ops.gram_hard_negatives import reference_gram_hard_negatives

torch.manual_seed(1)
B, rounds, temperature, floor = 16, 20000, 0.15, 0.01
anchor = F.normalize(torch.randn(B, 6), dim=1)
others = [F.normalize(anchor + 0.25 * torch.randn(B, 6), dim=1) for _ in range(2)]
weights, _ = reference_gram_hard_negatives(-gram_volume(anchor, others).double() / temperature, floor=floor)
generator, counts = torch.Generator().manual_seed(0), torch.zeros(B)
for _ in range(rounds):
    counts[gram_hard_negatives(anchor, others, temperature=temperature, floor=floor, generator=generator).candidates[0]] += 1

figure, axes = plt.subplots()
order = gram_volume(anchor, others)[0].argsort()
axes.bar(range(B), counts[order] / rounds, color=BLUE, label=f"drawn, of {rounds}")
axes.plot(range(B), weights[0][order], "o", color=ORANGE, markersize=5, label="softmax + floor")
axes.set(xlabel="candidates of one anchor, by volume; its own, the first, is never drawn", ylabel="share of the draws")
axes.grid(False)
axes.legend()
save(figure, __file__)
