"""Area of the triangle (a, u, v) as a function of a in the plane, and the direction in which gradient descent moves a."""

import torch
from drawing import BLUE, RED, plt, save

from modalign.ops import triangle_area

u, v = torch.tensor([[-0.6, -0.3]]), torch.tensor([[0.7, 0.4]])


def over_grid(points):
    axis = torch.linspace(-1.2, 1.2, points)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    a = torch.stack([x, y], -1).reshape(-1, 2).requires_grad_()
    area = triangle_area(a, u, v)[:, 0]
    area.sum().backward()
    return x, y, area.detach().reshape(points, points), a.grad.reshape(points, points, 2)


figure, axes = plt.subplots(figsize=(4.6, 4.2))
x, y, area, _ = over_grid(61)
lines = axes.contour(x, y, area, levels=[0.1, 0.3, 0.5, 0.7], colors=BLUE, linewidths=0.8)
axes.clabel(lines, fontsize=7)
x, y, _, gradient = over_grid(11)
axes.quiver(x, y, -gradient[..., 0], -gradient[..., 1], color="#555555", width=0.004, scale=14)
axes.plot([u[0, 0], v[0, 0]], [u[0, 1], v[0, 1]], "o-", color=RED, markersize=6, linewidth=1.5)
axes.annotate("u", u[0].tolist(), textcoords="offset points", xytext=(-10, 4), color=RED)
axes.annotate("v", v[0].tolist(), textcoords="offset points", xytext=(7, -2), color=RED)
axes.set(xlabel="first coordinate of a", ylabel="second coordinate of a", aspect="equal")
axes.grid(False)
save(figure, __file__)
