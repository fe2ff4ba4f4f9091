"""Clean-up that passes share: nodes that nobody needs, nodes that compute the same thing twice.

Cases of `eliminate_duplicates`: 1. functions, methods and modules of equal arguments; 2. reading a parameter or module.
Kept: 3. storing keys and values; 4. attention kernels and mask selection, which the runtime runs; 5. anything that may
draw random numbers; 6. methods that change their tensor in place; 7. modules while training, which may drop out.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dop_compile import ops

__all__ = ["eliminate_dead_nodes", "eliminate_duplicates"]


def eliminate_dead_nodes(graph: fx.Graph) -> int:
    """Remove what reaches neither the output nor an effect (storing keys and values)."""
    removed = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and not node.meta.get("effect"):
            graph.erase_node(node)
            removed += 1
    return removed


_RUNTIME = (ops.update_cache, ops.preview_cache, ops.select_attention_mask)
_RANDOM = ("dropout", "rand", "bernoulli", "multinomial", "normal")


def _is_repeatable(node: fx.Node, training: bool) -> bool:
    """Whether two such nodes with equal arguments have equal results and no other effect."""
    if node.op in ("placeholder", "output") or node.meta.get("effect") or node.meta.get("attention"):
        return False
    if node.op == "call_module":
        return not training
    if node.op == "get_attr":
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return node.target not in _RUNTIME and not in_place and not any(word in name for word in _RANDOM)


def eliminate_duplicates(
    graph: fx.Graph, only: Callable[[fx.Node], bool] = lambda node: True, *, training: bool = False
) -> int:
    """Merge nodes that compute the same thing from the same inputs; returns how many went.

    Args:
        only: the nodes to look at.
        training: whether modules may give another result each time.
    """
    seen: dict[Any, fx.Node] = {}
    merged = 0
    for node in list(graph.nodes):
        if not _is_repeatable(node, training) or not only(node):
            continue
        key = (node.op, node.target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            merged += 1
    return merged


def _key(value: Any) -> Any:
    """A hashable stand-in that is equal for equal arguments; ``1``, ``1.0`` and ``True`` differ."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, tuple | list):
        return (type(value), *map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    if isinstance(value, slice):
        return (slice, _key(value.start), _key(value.stop), _key(value.step))
    plain = bool | int | float | str | None | torch.dtype | torch.device | types.EllipsisType
    if isinstance(value, plain):
        return (type(value), value)
    return (object, id(value))
