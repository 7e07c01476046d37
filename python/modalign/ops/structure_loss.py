"""How far the neighbourhoods of a batch move between two spaces: the STRUCTURE regularizer. [STRUCTURE, NeurIPS 2025]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _contrastive as contrastive
from . import _structure as structure
from ._registration import accumulation_dtype, autocast_is_on, call, refuse_forward_mode, register_pair, to_autocast
from .knn import knn

__all__ = ["reference_structure_loss", "structure_loss"]

WORKSPACE_BYTES = 256 << 20
MATRIX_BYTES = 2 << 30  # of matrices B x B, unless asked for
CHOICES = {
    "divergence": ("js", "released"),
    "weighting": ("inverse", "none"),
    "centering": ("mean", "none", "standard"),
    "distance": ("cosine", "rbf", "spearman"),
}


def structure_loss(
    source: Tensor,
    aligned: Tensor,
    *,
    levels: int = 1,
    temperature: float | Tensor = 0.05,
    divergence: str = "js",
    weighting: str = "inverse",
    margin: float = 0,  # ints: torch.compile(dynamic=True) would trace a float default twice
    centering: str = "mean",
    centering_first: bool = False,
    distance: str = "cosine",
    gamma: float = 1,
    neighbors: int | Tensor | None = None,
    tail: bool = True,
    implementation: str = "auto",
    workspace_bytes: int | None = None,
    return_diagonal_mass: bool = False,
) -> Any:
    r"""The divergence between the softmax neighbourhoods of a batch in its source space and after alignment.

    ::

        x = source / |source| - mean over the batch            y likewise from aligned
        P_ij = exp(x_i . x_j / temperature) / sum_j ...        Q from y          M = (P + Q) / 2        the diagonal included
        js        D = mean_i sum_j [P log(P / M) + Q log(Q / M)] / 2
        released  D = mean_i sum_j (M + e) [log(M + e) - log(P + e) / 2 - log(Q + e) / 2]        e = 1e-12
        result    sum over levels l of max(D(P^l, Q^l) - margin, 0) weight_l / levels        weight_l = 1 / l, or 1 for weighting="none"

    Zero where aligned is source, turned and scaled. The released code takes the divergence the other way round, which has no upper limit.

    >>> import torch
    >>> source = torch.eye(4)
    >>> structure_loss(source, source @ torch.eye(4).roll(1, 0))
    tensor(0.)
    >>> structure_loss(source, torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), temperature=0.5)
    tensor(0.0755)

    Parameters
    ----------
    source : Tensor [B, D]
        Features of the frozen encoder; B of 1 or more.
    aligned : Tensor [B, A]
        The same items behind the head.
    levels : int
        Neighbours of neighbours: powers of the matrices, up to this one. More than 1 stores matrices B x B.
    temperature : float or Tensor of one element
        Divides; positive. Not used with distance="rbf".
    divergence : "js" or "released"
    weighting : "inverse" or "none"
    margin : float
        0 or more.
    centering : "mean", "none" or "standard"
        What is taken off after normalising; "standard" also divides every dimension by its standard deviation.
    centering_first : bool
        Before normalising instead: then a shift of all vectors changes nothing.
    distance : "cosine", "rbf" or "spearman"
        rbf: logits ``exp(-gamma |x_i - x_j|^2)``, with matrices B x B. spearman: ranks of the elements of each vector in place of the elements; no gradient.
    gamma : float
        For rbf.
    neighbors : int or Tensor int64 [B, k], optional
        Only these pairs, the same in both spaces: the k nearest of each source vector by the product of x (itself included), or a list of its own; -1: none.
        A row without any has the divergence 0. Values are looked at on the CPU only.
    tail : bool
        For `neighbors`: the pairs keep their probabilities and all others make one bucket, so that the loss is at most that of all pairs and grows with k to it.
        False: softmax over the list alone, without a walk over all pairs.
    implementation : "auto", "streaming" or "dense"
        "dense" keeps the products for the backward, "streaming" makes them again with memory linear in B, "auto" keeps them within the workspace. Same bits.
    workspace_bytes : int, optional
        For "auto"; default 256 MiB.
    return_diagonal_mass : bool
        Also the means of P_ii and Q_ii, Tensor [2]: near 1 a row sees only itself, and there is no signal; a higher temperature gives it one.

    Returns
    -------
    Tensor scalar, float32 (float64 for float64); with `return_diagonal_mass` a pair.

    Gradient
    --------
    Closed form to both, through centring too, and to a temperature tensor; nothing to a source that does not require it. With `neighbors` at fixed lists.
    "spearman" has none. Double backward and forward mode raise, except with whole matrices (levels above 1, rbf), whose gradient is autograd's.

    Edges
    -----
    B = 1: 0. Rows shorter than 1e-12 are zero vectors, with gradient 0. Nearly equal neighbourhoods keep their digits. NaN gives NaN, and so does a
    temperature tensor that is not positive.

    Raises
    ------
    TypeError, ValueError
        ``structure_loss: <argument> must ..., got ...``.

    Complexity
    ----------
    2 B^2 (D + A) FLOP forward and as much backward, plus 2 B^2 A for the gradient; with kept products half of that forward and 2 B^2 A backward. Memory:
    copies of the vectors (with levels above 1 or rbf 8 matrices B x B or so; more than 2 GiB of them are refused unless `implementation` is "dense";
    on CUDA panels of products, at most 256 MiB where 128 rows fit), and 2 B^2 numbers where products are kept.

    Paper: Groeger, Wen, Le, Brbic, "With Limited Data for Multimodal Alignment, Let the STRUCTURE Guide You", NeurIPS 2025, section 4.
    """
    op = "structure_loss"
    source, aligned, workspace = _checked(
        op, source, aligned, levels, divergence, weighting, margin, centering, centering_first, distance, gamma, neighbors, tail, implementation, workspace_bytes
    )
    scale = contrastive.check_scalar(op, "temperature", temperature, source, positive=True) ** -0.5
    arguments.check_flag(op, "return_diagonal_mass", return_diagonal_mass)
    refuse_forward_mode(op, (source, aligned))
    with torch.autocast(source.device.type, enabled=False):
        x, y = (structure.features(each, centering, centering_first, distance) for each in (source, aligned))
        if distance != "rbf":
            x, y = x * scale, y * scale
        if levels > 1 or distance == "rbf":
            rows, mass = structure.rows_of_levels(x, y, levels, divergence, gamma if distance == "rbf" else None)
        elif neighbors is not None and not (isinstance(neighbors, int) and neighbors >= len(x)):
            if isinstance(neighbors, int):
                neighbors = knn(x.detach(), k=neighbors, metric="dot").indices
            row, mass = structure.rows_of_neighbors(x, y, neighbors, tail, divergence)
            rows = [row]
        else:
            row, statistics, _ = call("structure_loss", x, y, divergence == "released", workspace)
            rows, mass = [row], _diagonal_mass(x.detach(), y.detach(), statistics)
        result = _reduced(rows, weighting, margin)
    return (result, mass) if return_diagonal_mass else result


def _reduced(rows: list[Tensor], weighting: str, margin: float) -> Tensor:
    means = [torch.relu(contrastive.total(row) / row.shape[0] - margin) / (level if weighting == "inverse" else 1) for level, row in enumerate(rows, 1)]
    return sum(means[1:], means[0]) / len(means)


def _diagonal_mass(x: Tensor, y: Tensor, statistics: Tensor) -> Tensor:
    return torch.stack([(z.double().square().sum(1) - lse).exp().mean() for z, lse in zip((x, y), statistics[:2], strict=True)]).to(x.dtype)


def _checked(
    op: str,
    source: Any,
    aligned: Any,
    levels: Any,
    divergence: Any,
    weighting: Any,
    margin: Any,
    centering: Any,
    centering_first: Any,
    distance: Any,
    gamma: Any,
    neighbors: Any,
    tail: Any,
    implementation: Any,
    workspace_bytes: Any,
) -> tuple[Tensor, Tensor, int]:
    x, y = contrastive.check_matrix(op, "source", source, "[B, D]"), contrastive.check_matrix(op, "aligned", aligned, "[B, A]")
    if autocast_is_on(x.device.type):
        x, y = to_autocast(x), to_autocast(y)
    if y.device != x.device:
        raise ValueError(f"{op}: aligned must be on source's device {x.device}, got {y.device}")
    if y.dtype is not x.dtype:
        raise TypeError(f"{op}: aligned must have source's dtype {x.dtype}, got {y.dtype}")
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"{op}: aligned must have as many rows as source, one or more, got {len(y)} and {len(x)}")
    for name, value in (("divergence", divergence), ("weighting", weighting), ("centering", centering), ("distance", distance)):
        if value not in CHOICES[name]:
            raise ValueError(f"{op}: {name} must be one of {', '.join(CHOICES[name])}, got {arguments.describe(value)}")
    for name, flag in (("centering_first", centering_first), ("tail", tail)):
        arguments.check_flag(op, name, flag)
    if isinstance(levels, bool) or not isinstance(levels, int):
        raise TypeError(f"{op}: levels must be a whole number, got {arguments.describe(levels)}")
    if levels < 1:
        raise ValueError(f"{op}: levels must be 1 or more, got {levels}")
    for name, number, least in (("margin", margin, 0), ("gamma", gamma, None)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{op}: {name} must be a number, got {arguments.describe(number)}")
        if not (number >= 0 if least == 0 else number > 0):
            raise ValueError(f"{op}: {name} must be {'0 or more' if least == 0 else 'positive'}, got {number}")
    if neighbors is not None:
        if levels > 1 or distance == "rbf":
            raise ValueError(f'{op}: neighbors must be None with levels above 1 or distance "rbf", which use all pairs, got both')
        if isinstance(neighbors, bool) or not isinstance(neighbors, (int, Tensor)) or (isinstance(neighbors, Tensor) and neighbors.dtype is not torch.int64):
            raise TypeError(f"{op}: neighbors must be None, a whole number or an int64 tensor [{len(x)}, k], got {arguments.describe(neighbors)}")
        if isinstance(neighbors, int) and neighbors < 1:
            raise ValueError(f"{op}: neighbors must be 1 or more, got {neighbors}")
        looked_at = isinstance(neighbors, Tensor) and neighbors.device.type == "cpu" and neighbors.numel() > 0 and not torch.compiler.is_compiling()
        if looked_at and not -1 <= int(neighbors.min()) <= int(neighbors.max()) < len(x):
            raise ValueError(f"{op}: neighbors must hold rows from 0 to B - 1 = {len(x) - 1}, or -1, got {int(neighbors.min())} to {int(neighbors.max())}")
        if isinstance(neighbors, Tensor) and (neighbors.dim() != 2 or len(neighbors) != len(x) or neighbors.shape[1] == 0 or neighbors.device != x.device):
            raise ValueError(f"{op}: neighbors must have shape [{len(x)}, k] on {x.device}, k 1 or more, got {arguments.describe(neighbors)}")
    workspace = contrastive.check_workspace(op, implementation, workspace_bytes, None)
    if implementation == "auto" and workspace_bytes is None:
        workspace = WORKSPACE_BYTES
    if (levels > 1 or distance == "rbf") and implementation == "streaming":
        raise ValueError(f'{op}: implementation must be "auto" or "dense" with levels above 1 or distance "rbf", which store matrices B x B, got "streaming"')
    if (levels > 1 or distance == "rbf") and implementation == "auto" and (size := 8 * len(x) ** 2 * accumulation_dtype(x.dtype).itemsize) > MATRIX_BYTES:
        raise ValueError(f'{op}: implementation must be "dense" for matrices {len(x)} x {len(x)}, of which levels above 1 and rbf make some {size >> 30} GiB, got "auto"')
    return x, y, workspace


# ------------------------------------------------------------------------------------------------------------------------- what torch needs to know


def _fake(x: Tensor, y: Tensor, released: bool, workspace_bytes: int) -> tuple[Tensor, Tensor, Tensor]:
    B = x.shape[0]  # len() would fix the number where torch.compile has a symbol
    blocks = (B + 95) // 96
    size = 2 * (96 * blocks) ** 2  # structure_products_size in csrc/ops/structure_loss.h
    kept = size if size * x.dtype.itemsize <= workspace_bytes else 0
    return x.new_empty((B,)), x.new_empty((4, B), dtype=torch.float64), x.new_empty((kept,))


def _fake_backward(
    grad: Tensor, statistics: Tensor, products: Tensor, x: Tensor, y: Tensor, released: bool, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else (0,)), y.new_empty(y.shape if need_y else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, ctx.released, _ = inputs
    _, statistics, products = output
    ctx.mark_non_differentiable(statistics, products)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(statistics, products, x, y)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None
    need_x, need_y = ctx.needs_input_grad[:2]
    grad_x, grad_y = call("structure_loss_bwd", grad, *ctx.saved_tensors, ctx.released, need_x, need_y)
    return grad_x if need_x else None, grad_y if need_y else None, None, None


register_pair(
    "structure_loss", op="structure_loss", fake=_fake, fake_backward=_fake_backward, setup_context=_setup_context, backward=_backward, vmap="loop"
)


# ----------------------------------------------------------------------------------------------------------------------------- plain-torch formulas


def reference_structure_loss(source: Tensor, aligned: Tensor, *, implementation: str = "auto", workspace_bytes: int | None = None, **options: Any) -> Tensor:
    """`structure_loss` of all pairs from matrices B x B; its gradient comes from autograd."""
    op = "reference_structure_loss"
    given = dict(
        levels=1, temperature=0.05, divergence="js", weighting="inverse", margin=0.0, centering="mean", centering_first=False, distance="cosine", gamma=1.0
    )
    given |= options
    temperature = given.pop("temperature")
    source, aligned, _ = _checked(op, source, aligned, **given, neighbors=None, tail=True, implementation=implementation, workspace_bytes=workspace_bytes)
    rbf = given["distance"] == "rbf"
    x, y = (structure.features(each, given["centering"], given["centering_first"], given["distance"]) for each in (source, aligned))
    scale = 1 if rbf else torch.as_tensor(temperature, dtype=x.dtype, device=x.device) ** -0.5
    rows, _ = structure.rows_of_levels(x * scale, y * scale, given["levels"], given["divergence"], given["gamma"] if rbf else None)
    return _reduced(rows, given["weighting"], given["margin"])
