"""Volume of two unit vectors at angle theta, its square, and the length of their gradients: where the volume is 0 both gradients are 0."""

import torch
from drawing import BLUE, ORANGE, plt, save

from modalign.ops import gram_volume

angles = torch.linspace(-0.6, 0.6, 121)
angles[60] = 0   # exactly: the vectors are equal
figure, panels = plt.subplots(1, 2)
for squared, colour, label in ((False, BLUE, "volume"), (True, ORANGE, "squared=True")):
    anchor = torch.stack([angles.cos(), angles.sin()], 1).requires_grad_()
    value = gram_volume(anchor, [torch.tensor([[1.0, 0.0]])], squared=squared)[:, 0]
    value.sum().backward()
    panels[0].plot(angles, value.detach(), color=colour, linewidth=1.2, label=label)
    length = anchor.grad.norm(dim=1)
    for side in (angles < 0, angles > 0):
        panels[1].plot(angles[side], length[side], color=colour, linewidth=1.2)
    panels[1].plot(0, length[60], "o", color=colour, markersize=5, markerfacecolor="none" if squared else colour)
panels[0].set(xlabel="angle θ between the two", title="value")
panels[1].set(xlabel="angle θ between the two", title="length of the anchor's gradient")
panels[0].legend()
save(figure, __file__)
