"""Max-min diversity, against the matrix of distances with a running minimum, and with the released code's loop, which looks at all rows taken in every step. The floor: torch.mm of the matrix.

select_diverse   a picture of N tokens of width D, n taken: LLaVA-NeXT's 2880, LLaVA-1.5's 576; by the first tokens alone where the case has a start
"""

import torch

from modalign import bench, ops


def running_minimum(features, n):
    unit = features / features.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.mT
    pick = distance.topk(2, 1, largest=False).values[:, 1].argmax()
    apart = distance[pick].clone()
    picks = [pick]
    for _ in range(n - 1):
        apart[pick] = -1
        pick = apart.argmax()
        picks.append(pick)
        apart = torch.minimum(apart, distance[pick])
    return features[torch.stack(picks)]


def released(features, n):
    """All rows taken, again in every step."""
    unit = features / features.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.mT
    picks = torch.empty(n, dtype=torch.int64, device=features.device)
    for t in range(n):
        apart = distance.topk(2, 0, largest=False).values[1] if t == 0 else distance.index_select(0, picks[:t]).amin(0)
        picks[t] = apart.argmax()
    return features[picks]


@bench.case(
    grid=[dict(N=2880, D=1024, n=288), dict(N=2880, D=128, n=288), dict(N=576, D=1024, n=56)],
    quick=[dict(N=90, D=32, n=9)],
    passes=["fwd"],
    reference=running_minimum,
    flops=lambda p, pass_, size: p["N"] ** 2 * p["D"],
)
def select_diverse(maker, N, D, n):
    return maker.randn(N, D), n


bench.provider(select_diverse, name="running minimum")(running_minimum)
bench.provider(select_diverse, name="released loop")(released)
bench.ours(select_diverse, runs="modalign::select_diverse")(lambda features, n: features[ops.select_diverse(features[None], n).indices[0]])


@bench.matmul_floor(select_diverse)
def half_of_the_matrix(p, pass_):
    return [(p["N"], p["D"], p["N"] // 2)]
