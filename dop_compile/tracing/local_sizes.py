"""Make every node take sizes from its own inputs.

A traced module computes ``batch, tokens = x.shape[:2]`` once and uses the numbers for several tensors. Here a node
that needs such a number asks the tensor that it works on instead: no number crosses from one compiled piece to the
next, where it would be guarded on, and a node moved to other tokens follows their number by itself.

The reverse holds for what a layer makes of nothing but the number of tokens (``arange``): it is for the whole sequence,
whichever of its tokens a layer works on, and takes the sizes of `inputs_embeds`.
"""

from __future__ import annotations

from torch import Tensor, fx

from dop_compile.tracing.trace import BATCH, TOKENS

__all__ = ["localise_sizes"]


def localise_sizes(graph: fx.Graph) -> int:
    """Replace foreign batch and token sizes by the sizes of a node's own tensors; returns how many."""
    replaced = 0
    for node in list(graph.nodes):
        if node.target == "size":
            continue
        for size in [n for n in node.all_input_nodes if n.op == "call_method" and n.target == "size"]:
            wanted = size.meta.get("val")
            own = _own_dimension(node, wanted) if wanted in (BATCH, TOKENS) else None
            if own is None or own == (size.args[0], size.args[1]):
                continue
            with graph.inserting_before(node):
                local = graph.call_method("size", own)
            local.meta = dict(size.meta)
            node.replace_input_with(size, local)
            replaced += 1
    return replaced + _take_whole_sizes(graph)


def _take_whole_sizes(graph: fx.Graph) -> int:
    embeds = next(node for node in graph.nodes if node.name == "inputs_embeds")
    computed = {embeds}  # from the tokens' values, and not from their number alone
    replaced = 0
    for node in list(graph.nodes):
        sizes = [n for n in node.all_input_nodes if n.op == "call_method" and n.target == "size"]
        if any(source in computed for source in node.all_input_nodes if source not in sizes):
            if not (node.op == "call_method" and node.target == "size"):
                computed.add(node)
            continue
        for size in sizes if isinstance(node.meta.get("val"), Tensor) else ():
            wanted = size.meta.get("val")
            if size.args[0] not in computed - {embeds} or wanted not in (BATCH, TOKENS):
                continue
            with graph.inserting_before(node):
                whole = graph.call_method("size", (embeds, 0 if wanted == BATCH else 1))
            whole.meta = dict(size.meta)
            node.replace_input_with(size, whole)
            replaced += 1
    return replaced


def _own_dimension(node: fx.Node, wanted: int) -> tuple[fx.Node, int] | None:
    for source in node.all_input_nodes:
        value = source.meta.get("val")
        if isinstance(value, Tensor) and list(value.shape).count(wanted) == 1:
            return source, list(value.shape).index(wanted)
    return None
