"""What holds tensors is a pytree: an input of compiled and exported graphs like the tensors themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = ["register_tree"]


def register_tree(kind: type, branches: tuple[str, ...], constants: tuple[str, ...] = ()) -> None:
    """`branches`: fields that hold tensors, or trees of them; `constants`: fields that are part of the structure."""

    def flatten(given: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(given, name) for name in branches], tuple(getattr(given, name) for name in constants)

    def flatten_with_keys(given: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        values, context = flatten(given)
        return [(pytree.GetAttrKey(name), value) for name, value in zip(branches, values, strict=True)], context

    def unflatten(values: Any, context: tuple[Any, ...]) -> Any:
        return kind(**dict(zip(branches, values, strict=True)), **dict(zip(constants, context, strict=True)))

    pytree.register_pytree_node(
        kind,
        flatten,
        unflatten,
        serialized_type_name=f"modalign.{kind.__module__.split('.')[1]}.{kind.__name__}",
        to_dumpable_context=list,
        from_dumpable_context=_tuples,
        flatten_with_keys_fn=flatten_with_keys,
    )
    torch.serialization.add_safe_globals([kind])  # tensors and numbers alone: torch.load takes them, and the examples in an exported graph, with weights_only=True


def _tuples(value: Any) -> Any:
    """JSON has lists alone."""
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
