"""Token merging as a module, and inside vision transformers of other libraries. [ToMe, ICLR 2023]"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ops import MergedTokens, merge_tokens, scaled_dot_product_attention
from ..ops._arguments import describe

__all__ = ["MergedPass", "TokenMerger", "TokenMerging", "merge_schedule", "patch"]


class TokenMerger(nn.Module):
    """`merge_tokens` with its options, for layers of your own: between attention and MLP, with the attention's keys (mean over heads) as features.

    >>> import torch
    >>> x, keys = torch.randn(2, 50, 32), torch.randn(2, 50, 8)
    >>> TokenMerger(r=9, protected=1)(x, keys).tokens.shape
    torch.Size([2, 41, 32])

    Paper: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.
    """

    def __init__(self, r: int | None = None, *, protected: int = 0, threshold: float | None = None, keep_order: bool = False) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"r": r, "protected": protected, "threshold": threshold, "keep_order": keep_order}

    def forward(self, x: Tensor, features: Tensor, size: Tensor | None = None, **packed: Any) -> MergedTokens:
        """x [B, N, ...], features [B, N, D], size [B, N]; of packed items also `cu_seqlens` and `longest`."""
        return merge_tokens(x, features, size=size, **self.options, **packed)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def merge_schedule(layers: int, r: Any) -> list[int]:
    """Tokens to merge in every layer: a number; (mean, inflect) with inflect from -1 (2 r in the first layer, falling to 0) to 1 (rising); or a list, to which zeros are added.

    >>> merge_schedule(4, 8), merge_schedule(4, (8, -1.0)), merge_schedule(4, [5, 3])
    ([8, 8, 8, 8], [16, 10, 5, 0], [5, 3, 0, 0])
    """
    if isinstance(r, Sequence) and not isinstance(r, tuple):
        if len(r) > layers:
            raise ValueError(f"merge_schedule: r must have at most {layers} numbers, one a layer, got {len(r)}")
        return [*r, *[0] * (layers - len(r))]
    mean, inflect = r if isinstance(r, tuple) else (r, 0.0)
    if isinstance(mean, bool) or not isinstance(mean, int) or mean < 0 or not -1 <= inflect <= 1:
        raise ValueError(f"merge_schedule: r must be a whole number of 0 or more, or one with an inflection from -1 to 1, got {r!r}")
    first = int(mean * (1 - inflect))
    step = 2 * (mean - first) / max(1, layers - 1)
    return [int(first + step * layer) for layer in range(layers)] if layers > 1 else [mean] * layers


# ------------------------------------------------------------------------------------------------------------------------------ layers of other libraries


class _Halves(NamedTuple):
    """How a layer of some kind, told by its attributes, is x + attention(x) and then x + feed_forward(x)."""

    attributes: tuple[str, ...]
    attention: Callable[..., Tensor]
    feed_forward: Callable[[Any, Tensor], Tensor]


_KINDS = (
    _Halves(  # timm: ViT, DeiT, DINOv2, SigLIP, ...
        ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"),
        lambda layer, x, **options: x + layer.drop_path1(layer.ls1(layer.attn(layer.norm1(x), **options))),
        lambda layer, x: x + layer.drop_path2(layer.ls2(layer.mlp(layer.norm2(x)))),
    ),
    _Halves(  # transformers: CLIP, SigLIP
        ("layer_norm1", "self_attn", "layer_norm2", "mlp"),
        lambda layer, x, **options: x + layer.self_attn(hidden_states=layer.layer_norm1(x), attention_mask=None, **options)[0],
        lambda layer, x: x + layer.mlp(layer.layer_norm2(x)),
    ),
    _Halves(  # transformers: ViT, DeiT
        ("layernorm_before", "attention", "layernorm_after", "mlp", "dropout"),
        lambda layer, x, **options: layer.dropout(layer.attention(layer.layernorm_before(x), None, **options)[0]) + x,
        lambda layer, x: layer.dropout(layer.mlp(layer.layernorm_after(x))) + x,
    ),
    _Halves(  # transformers: DINOv2, with and without registers
        ("norm1", "attention", "layer_scale1", "drop_path", "norm2", "mlp", "layer_scale2"),
        lambda layer, x, **options: layer.drop_path(layer.layer_scale1(layer.attention(layer.norm1(x), attention_mask=None, **options)[0])) + x,
        lambda layer, x: layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(x)))) + x,
    ),
)
_FIRST_TOKENS = ("cls_token", "class_embedding", "distillation_token", "dist_token", "register_tokens", "reg_token")  # names of parameters


class _Attention(TorchFunctionMode):
    """While it is entered: keeps the keys of torch's attention, and adds log(size) to the logits of keys."""

    def __init__(self, size: Tensor | None) -> None:
        super().__init__()
        self.size, self.key = size, None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        self.key = args[1] if len(args) > 1 else kwargs["key"]
        if self.size is None:
            return function(*args, **kwargs)
        return scaled_dot_product_attention(*args, **kwargs | {"attn_mask": self.size.log()[:, None, None, :].to(self.key.dtype)})


class MergedPass:
    """What one pass through the layers did to their tokens. `sizes[l]` [B, N_l]: how many tokens each stands for before layer l (None: one), the last after all; `sources[l]` int64 [B, N_0]:
    which of them an original token is in."""

    def __init__(self, layers: int) -> None:
        self.sizes: list[Tensor | None] = [None] * (layers + 1)
        self.sources: list[Tensor | None] = [None] * (layers + 1)

    @property
    def size(self) -> Tensor | None:
        return self.sizes[-1]

    @property
    def source(self) -> Tensor | None:
        return self.sources[-1]


@functools.cache
def _merging_class(kind: type) -> type:
    """A layer's class, whose forward merges tokens where `_Layer` calls it, so that hooks and checkpoints around the layer stay what they are."""

    class Merging(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, *args: Any, _merging: _Layer | None = None, **options: Any) -> Any:
            if _merging is None:
                return super().forward(x, *args, **options)
            return _merging.forward(super().forward, x, args, options)

    Merging.__name__, Merging.__qualname__, Merging.__doc__ = kind.__name__, kind.__qualname__, kind.__doc__
    return Merging


class _Layer:
    """A layer within one pass. Its state is the pass's own, by the layer's number: a layer that is run again for its gradient finds what it found before."""

    def __init__(self, layer: nn.Module, index: int, run: MergedPass, merging: TokenMerging) -> None:
        self.layer, self.index, self.run, self.merging = layer, index, run, merging

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Any:
        return self.layer(x, *args, _merging=self, **options)

    def forward(self, plain: Callable[..., Any], x: Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        merging, run, index = self.merging, self.run, self.index
        r = min(merging.schedule[index], max(0, x.shape[1] - merging.protected) // 2)
        size, source = run.sizes[index], run.sources[index]
        if r == 0 and size is None:
            x = plain(x, *args, **options)
        else:
            given = [*args, *(value for name, value in options.items() if name in ("attn_mask", "attention_mask", "rope", "position_embeddings", "is_causal"))]
            if any(value is not None and value is not False for value in given):
                raise ValueError("patch: layers must be called without masks and rotary positions, which are those of all tokens, got some")
            attention = _Attention(size if merging.proportional else None)
            with attention:
                x = merging.halves.attention(self.layer, x, **{name: value for name, value in options.items() if value is not None and value is not False})
            if attention.key is None:
                raise RuntimeError("patch: attention must run through torch's scaled_dot_product_attention (timm: fused_attn; transformers: attn_implementation='sdpa'), got another")
            if r:
                x, size, match = merge_tokens(x, attention.key.mean(1), r, size=size, protected=merging.protected)
                source = match.source(source)
            x = merging.halves.feed_forward(self.layer, x)
        run.sizes[index + 1], run.sources[index + 1] = size, source
        if index + 1 == len(run.sizes) - 1:
            merging.last = run
            if merging.restore and source is not None:
                x = x.gather(1, source[..., None].expand(-1, -1, x.shape[2]))
        return x


class _Layers(nn.ModuleList):
    """In the place of the model's list of layers, with the same names of parameters. A loop over it, or over its first layers, is one pass."""

    def __init__(self, layers: Any, merging: TokenMerging) -> None:
        super().__init__(layers)
        self.merging = (merging,)  # in a tuple: no submodule

    def __iter__(self) -> Iterator[Any]:
        (merging,) = self.merging
        run = MergedPass(len(self))
        for index, layer in enumerate(super().__iter__()):
            yield _Layer(layer, index, run, merging)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        if index.start not in (None, 0) or index.step not in (None, 1):
            raise ValueError(f"patch: layers must be run from the first on while tokens merge, got {index}")
        return _Layers(list(self._modules.values())[index], *self.merging)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class TokenMerging:
    """What `patch` returns: the way to change it (`r`), to undo it (`remove`, or the end of a `with` block), and what happened (`last`)."""

    def __init__(self, place: nn.Module, name: str, halves: _Halves, r: Any, protected: int, proportional: bool, restore: bool) -> None:
        self.place, self.name, self.halves = place, name, halves
        self.protected, self.proportional, self.restore = protected, proportional, restore
        self.layers: Any = getattr(place, name)
        self.last: MergedPass | None = None
        self.r = r
        setattr(place, name, _Layers(self.layers, self))
        for layer in self.layers:
            layer.__class__ = _merging_class(type(layer))

    @property
    def r(self) -> Any:
        return self._r

    @r.setter
    def r(self, value: Any) -> None:
        self.schedule = merge_schedule(len(self.layers), value)
        self._r = value

    def remove(self) -> None:
        """The model as it was."""
        setattr(self.place, self.name, self.layers)
        for layer in self.layers:
            layer.__class__ = type(layer).__base__

    def __enter__(self) -> TokenMerging:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()


def patch(model: nn.Module, r: Any, *, protected: int | None = None, proportional: bool = True, restore: bool = False) -> TokenMerging:
    """Lets a vision transformer of timm or transformers merge r tokens in every layer, between attention and MLP.

    ::

        with nn.patch(model, r=13):                  # inside the block
            logits = model(pictures)
        merging = nn.patch(model, r=(8, -1.0))       # until merging.remove(): 16 in the first layer, falling to 0

    Parameters
    ----------
    model : nn.Module
        With one list of layers of a known kind: timm's Block (ViT, DeiT, DINOv2 with registers, SigLIP, qk-norm, LayerScale), transformers' CLIP, SigLIP, ViT, DeiT, DINOv2 encoders. Of a
        model with several, pass the one (`model.vision_model`). A layer is run once to see that it does what is known of its kind, no more.
    r : int, (int, float) or list of int
        As in `merge_schedule`. With 0 everywhere the model's bits are those it had.
    protected : int, optional
        The first tokens, which are not merged. None: class, distillation and register tokens, counted by the names of the model's parameters (timm: num_prefix_tokens).
    proportional : bool
        Attention treats a token as all those that it stands for. The paper's choice for models that were trained without merging.
    restore : bool
        After the last layer every token's place gets what its group became, so that the number of tokens is as before: for heads that pool by the mean, or read patches.

    Returns
    -------
    TokenMerging: `r` may be set, `remove()`, `last` (sizes and sources of the last pass, for pictures of merged regions). Nothing else is kept between passes: models stay re-entrant, may be
    compiled, checkpointed and run in parallel.

    Raises
    ------
    ValueError
        ``patch: ... must ..., got ...``: no or several lists of known layers, layers that do something else, masks or rotary positions given to layers.

    Paper: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.
    """
    found = [
        (place, name, kind)
        for place in model.modules()
        for name, layers in place.named_children()
        if isinstance(layers, (nn.ModuleList, nn.Sequential)) and len(layers) and not isinstance(layers, _Layers)
        for kind in [next((kind for kind in _KINDS if all(hasattr(layer, each) for layer in layers for each in kind.attributes)), None)]
        if kind is not None
    ]
    if len(found) != 1:
        names = ", ".join(f"{type(place).__name__}.{name}" for place, name, _ in found)
        raise ValueError(f"patch: model must have one list of layers of a known kind, got {names or 'none'}")
    place, name, kind = found[0]
    if protected is None:
        protected = getattr(model, "num_prefix_tokens", None)
    if protected is None:
        counted = {at: each for at, each in model.named_parameters() if at.rpartition(".")[2] in _FIRST_TOKENS}
        protected = sum(each.shape[-2] if each.dim() > 1 else 1 for each in counted.values())
    if isinstance(protected, bool) or not isinstance(protected, int) or protected < 0:
        raise ValueError(f"patch: protected must be a whole number of 0 or more, got {describe(protected)}")
    _check_layer(next(iter(getattr(place, name))), kind)
    return TokenMerging(place, name, kind, r, protected, proportional, restore)


def _check_layer(layer: nn.Module, kind: _Halves) -> None:
    """The layer is its two halves, bit for bit."""
    weight = next(layer.parameters())
    width = next(module.weight.shape[0] for module in layer.modules() if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("Norm"))
    x = torch.linspace(-1, 1, 4 * width, device=weight.device).reshape(1, 4, width).to(weight.dtype)
    training = {module: module.training for module in layer.modules()}
    try:
        layer.eval()
        with torch.no_grad():
            whole = layer(x, None) if kind is not _KINDS[0] else layer(x)
            same = isinstance(whole, Tensor) and torch.equal(whole, kind.feed_forward(layer, kind.attention(layer, x)))
    finally:
        for module, was in training.items():
            module.training = was
    if not same:
        raise ValueError(f"patch: {type(layer).__name__} must be x + attention(x), then x + mlp(x), got a layer that does something else")
