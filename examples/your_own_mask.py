"""A mask of your own: two people talk about a picture, and neither hears what the other whispers.

    python examples/your_own_mask.py

A token has a type, and a table says which rule holds between two types; what the table does not name keeps nothing. The mask is linear in tokens, and attention under it is what the dense
matrix gives.
"""

import torch
from torch.nn import functional as F

from modalign import masks
from modalign.nn import DecoderLayer
from modalign.ops import masked_attention

TYPES = ("picture", "anna", "anna whispers", "ben", "ben whispers")
SPOKEN = ("anna", "ben")

tokens = masks.layout([("picture", (2, 3)), ("anna", 3), ("anna whispers", 2), ("ben", 3), ("ben whispers", 2), ("anna", 2), ("ben", 2)], names=TYPES)

table = {("picture", "picture"): "same_segment"}  # both ways
table |= {(person, "picture"): "always" for person in TYPES[1:]}
table |= {(person, spoken): "causal" for person in TYPES[1:] for spoken in SPOKEN}
table |= {(name, f"{name} whispers"): "causal" for name in SPOKEN}  # everybody knows what they whispered themselves,
table |= {(f"{name} whispers",) * 2: "causal" for name in SPOKEN}  # also while they do
mask = masks.relation(table, tokens)

letters = "".join({"picture": "P", "anna": "A", "anna whispers": "a", "ben": "B", "ben whispers": "b"}[TYPES[kind]] for kind in tokens.type[0])
print("  " + letters)
for letter, row in zip(letters, mask.dense()[0, 0], strict=True):
    print(f"{letter} " + "".join("█" if kept else "·" for kept in row))
print(f"{mask.kept():.0%} of the pairs are kept")

# The op under the mask and torch's attention with the matrix, outputs and gradients
torch.manual_seed(0)
sides = []
for attention in (lambda *x: masked_attention(*x, mask), lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask.dense())):
    inputs = [torch.randn(1, 4, len(tokens), 8, generator=torch.Generator().manual_seed(n), requires_grad=True) for n in range(3)]
    out = attention(*inputs)
    out.square().sum().backward()
    sides.append([out, *(x.grad for x in inputs)])
apart = max(float((ours - dense).abs().max().detach()) for ours, dense in zip(*sides, strict=True))
assert apart < 1e-5, apart
print(f"outputs and gradients are those of the dense matrix, to {apart:.0e}")

# A step of training: what Ben says last does not depend on what Anna whispered
layer, x = DecoderLayer(32, heads=4), torch.randn(1, len(tokens), 32, requires_grad=True)
optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
last, losses = len(tokens) - 1, []
for _ in range(2):
    loss = (layer(x, mask)[:, last] - 1).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))
whispered = torch.tensor([letter == "a" for letter in letters])
assert losses[1] < losses[0] and not x.grad[0, whispered].any() and x.grad[0, ~whispered].any(1).all()
print(f"a step of training: loss {losses[0]:.3f} -> {losses[1]:.3f}, no gradient reaches what Anna whispered")
