"""Undo the flattening of tokens: (batch * tokens, hidden) becomes (batch, tokens, hidden) where rows stay apart.

Some layers (OPT's) flatten their tokens before an MLP and shape them back after it. A token's row is then only known
by its number, and the residual stream cannot be followed. Where everything in between works on each row alone, both
reshapes go: the same rows are multiplied by the same weights.

Cases: 1. linear layers, layer norms, activations, additions, multiplications, dropout.  Kept: 2. anything else, whose
result might depend on the shape (routers of mixtures).
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dop_compile.tracing.proxies import BATCH, TOKENS

__all__ = ["unflatten_tokens"]

_ROW_WISE = {operator.add, operator.mul, operator.iadd, operator.imul, torch.add, torch.mul, F.dropout}
_RESHAPES = ("reshape", "view", "flatten")


def _is_flat(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == BATCH * TOKENS


def _is_reshape(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target in _RESHAPES


def _is_row_wise(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return isinstance(module, nn.Linear | nn.LayerNorm) or not list(module.parameters())
    return node.target in _ROW_WISE


def _from_tokens(node: fx.Node) -> bool:
    """Whether the node flattens (batch, tokens, size) to (batch * tokens, size)."""
    if not _is_reshape(node) or not _is_flat(node):
        return False
    source = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    return isinstance(source, Tensor) and tuple(source.shape) == (BATCH, TOKENS, *node.meta["val"].shape[1:])


def _region(start: fx.Node, root: nn.Module) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """Flat nodes that are computed from `start`, and the reshapes that end them; None if some are not row-wise."""
    flat, ends = {start: None}, []
    stack = list(start.users)
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in seen or (node.op == "call_method" and node.target == "size"):
            continue
        seen.add(node)
        value = node.meta.get("val")
        if _is_reshape(node) and isinstance(value, Tensor) and tuple(value.shape[:2]) == (BATCH, TOKENS):
            ends.append(node)
        elif _is_flat(node) and (_from_tokens(node) or _is_row_wise(node, root)):
            flat[node] = None
            stack += node.users
            stack += [source for source in node.all_input_nodes if _is_flat(source)]
        else:
            return None
    return list(flat), ends


def unflatten_tokens(graph: fx.Graph, root: nn.Module) -> int:
    """Remove the reshapes around row-wise computations on flattened tokens; returns how many regions there were."""
    regions = 0
    done: set[fx.Node] = set()
    for start in [node for node in graph.nodes if _from_tokens(node)]:
        if start in done or (region := _region(start, root)) is None:
            continue
        nodes, ends = region
        for node in nodes:
            node.meta["val"] = node.meta["val"].unflatten(0, (BATCH, TOKENS))
            if _is_reshape(node):
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        for end in ends:
            end.replace_all_uses_with(end.args[0])  # type: ignore[arg-type]
        done.update(nodes)
        regions += 1
    return regions
