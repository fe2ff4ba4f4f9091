"""Compute the normalised state of frozen tokens once for as long as it does not change.

Requires: tokens that no longer change stand in frozen streams, merged with the active one where both are read.
Ensures:  a norm over a merge becomes a merge of norms; over a frozen stream the part of the norm that uses no weight
          is computed once for all layers; a slice that needs one source of a merge alone reads that source.
Numerics: exact; the same operations on the same rows.

    before   n = norm_l(token_merge(a, f));  q = token_slice(n, A)
    after    n_a = norm_l(a);  n = token_merge(n_a, weight_l * unit(f));  q = n_a         unit(f) shared by all layers

Cases: 1. RMS norms and layer norms, recognised as a module whose only parameters are vectors of the hidden size.
Kept: 2. a norm that cannot be opened (hooks, a fused kernel): merged norms, nothing shared between layers.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx, nn

from dop_compile import ops
from dop_compile.passes.infra import DecoderGraph, Pass, PassReport, eliminate_dead_nodes, eliminate_duplicates

__all__ = ["SHARE_FROZEN"]


def _is_norm(module: nn.Module, hidden: int) -> bool:
    parameters = list(module.parameters())
    plain = not list(module.children()) and all(p.shape == (hidden,) for p in parameters)
    return plain and bool(parameters) and "norm" in type(module).__name__.lower()


class _NormTracer(fx.Tracer):
    """Traces one norm; `x.dtype` and the like stay nodes, so the result is right for any dtype."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


def _open_norm(graph: DecoderGraph, path: str, x: fx.Node) -> fx.Node | None:
    """Emit the norm's own operations on x; None if its forward cannot be traced."""
    module = graph.traced.root.get_submodule(path)
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return None
    parameters = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    if len(parameters) != 1 or type(module).__module__.startswith("torch.nn"):
        return None
    try:
        body = _NormTracer().trace(module)
    except (fx.proxy.TraceError, TypeError, RuntimeError):
        return None
    new: dict[fx.Node, Any] = {}
    for node in body.nodes:
        if node.op == "placeholder":
            new[node] = x
        elif node.op == "output":
            result: fx.Node = new[node.args[0]]
            result.meta.setdefault("val", x.meta.get("val"))
            return result
        else:
            copy = graph.graph.node_copy(node, new.__getitem__)
            copy.meta = {}
            if node.op == "get_attr":
                copy.target = f"{path}.{node.target}"
            new[node] = copy
    return None


def _share_frozen(graph: DecoderGraph, report: PassReport) -> None:
    hidden = graph.traced.root.get_submodule("decoder").config.hidden_size
    for merge in [node for node in graph.graph.nodes if node.target is ops.token_merge]:
        for norm in [user for user in merge.users if user.op == "call_module"]:
            module = graph.traced.root.get_submodule(str(norm.target))
            if not _is_norm(module, hidden):
                continue
            index, active, *frozen = merge.args
            with graph.graph.inserting_before(norm):
                parts = [graph.graph.call_module(norm.target, (active,))]
                parts[0].meta = dict(norm.meta)
                for source in frozen:
                    opened = _open_norm(graph, str(norm.target), source)
                    if opened is None:
                        report.kept.append(f"{norm.name}: {type(module).__name__} cannot be opened")
                        opened = graph.graph.call_module(norm.target, (source,))
                        opened.meta = dict(norm.meta)
                    parts.append(opened)
                merged = graph.graph.call_function(ops.token_merge, (index, *parts))
            merged.meta = {**norm.meta, "tokens": merge.meta["tokens"], "sources": merge.meta["sources"]}
            norm.replace_all_uses_with(merged)
            report.rewritten += 1
    _read_sources_directly(graph)
    eliminate_dead_nodes(graph.graph)
    eliminate_duplicates(graph.graph)


def _read_sources_directly(graph: DecoderGraph) -> None:
    for node in list(graph.graph.nodes):
        merge = node.args[0] if node.args else None
        if node.target is not ops.token_slice or not isinstance(merge, fx.Node):
            continue
        if merge.target is not ops.token_merge:
            continue
        for held, source in zip(merge.meta["sources"], merge.args[1:], strict=True):
            if node.meta["tokens"] <= held:
                node.replace_all_uses_with(graph.slice(source, node.meta["tokens"], held))
                break


SHARE_FROZEN = Pass("share_frozen", _share_frozen)
