"""Compute the normalised state of frozen tokens once for as long as it does not change.

Requires: tokens that no longer change stand in frozen streams, merged with the active one where both are read.
Ensures:  a norm over a merge becomes a merge of norms; over a frozen stream the part of the norm that uses no weight
          is computed once for all layers; a slice that needs one source of a merge alone reads that source.
Numerics: exact; the same operations on the same rows (a norm rounds each row alone).

    before   n = norm_l(token_merge(a, f));  q = token_slice(n, A)
    after    n_a = norm_l(a);  n = token_merge(n_a, weight_l * unit(f));  q = n_a         unit(f) shared by all layers

Cases: 1. RMS norms and layer norms, recognised as a module whose only parameters are vectors of the hidden size.
Kept: 2. a norm that cannot be opened (hooks, a kernel of PyTorch, control flow): it runs on them in every layer;
3. post-norm layers, whose projections read the merge itself; 4. frozen tokens that are read without active ones.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx, nn

from dop_compile import ops
from dop_compile.passes.cleanup import eliminate_dead_nodes, eliminate_duplicates
from dop_compile.passes.graph import DecoderGraph
from dop_compile.passes.infra import Pass
from dop_compile.passes.report import PassReport
from dop_compile.tokens import TokenSet
from dop_compile.tracing.module_tracer import ModuleTracer

__all__ = ["SHARE_FROZEN"]


def _is_norm(module: nn.Module, hidden: int) -> bool:
    parameters = list(module.parameters())
    plain = not list(module.children()) and all(p.shape == (hidden,) for p in parameters)
    return plain and bool(parameters) and "norm" in type(module).__name__.lower()


def _trace_norm(module: nn.Module) -> fx.Graph | None:
    """The norm's own operations, of one input; `x.dtype` and the like stay nodes, so that it is right for any dtype."""
    container = nn.Module()
    container.norm = module
    tracer = ModuleTracer(container, {id(module)})
    try:
        x = tracer.create_proxy("placeholder", "x", (), {})
        return tracer.record(lambda copy: copy.norm(x))  # type: ignore[operator]
    except Exception:  # whatever its forward does that a proxy does not
        return None


def _open_norm(graph: DecoderGraph, norm: fx.Node, x: fx.Node, tokens: TokenSet) -> fx.Node | None:
    """Emit the operations of a norm's node on x; None if they cannot be told."""
    path = str(norm.target)
    module = graph.traced.root.get_submodule(path)
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return None
    required = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    if len(required) != 1 or type(module).__module__.startswith("torch.nn"):
        return None
    body = _trace_norm(module)
    if body is None:
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
            copy.meta = {"layer": graph.traced.layer_of(norm), "tokens": tokens}
            if node.op == "get_attr":
                copy.target = path + str(node.target).removeprefix("norm")
            new[node] = graph.rename(copy, f"{x.name}_{node.name}")
    return None


def _call_norm(graph: DecoderGraph, norm: fx.Node, x: fx.Node, tokens: TokenSet) -> fx.Node:
    node = graph.graph.call_module(str(norm.target), (x,))
    node.meta = {**norm.meta, "tokens": tokens}
    return graph.rename(node, f"{norm.name}_{tokens}")


def _share_frozen(graph: DecoderGraph, report: PassReport) -> None:
    config: Any = graph.traced.root.get_submodule("decoder").config
    for merge in [node for node in graph.graph.nodes if node.target is ops.token_merge]:
        for norm in [user for user in merge.users if user.op == "call_module"]:
            module = graph.traced.root.get_submodule(str(norm.target))
            if not _is_norm(module, config.hidden_size):
                continue
            index, active, *frozen = merge.args
            with graph.graph.inserting_before(norm):
                parts = [_call_norm(graph, norm, active, merge.meta["sources"][0])]
                for source, tokens in zip(frozen, merge.meta["sources"][1:], strict=True):
                    opened = _open_norm(graph, norm, source, tokens)
                    if opened is None:
                        report.kept.append(f"{norm.name}: {type(module).__name__} cannot be opened")
                        opened = _call_norm(graph, norm, source, tokens)
                    parts.append(opened)
                sets = {"tokens": merge.meta["tokens"], "sources": merge.meta["sources"]}
                merged = graph.call(ops.token_merge, (index, *parts), name=f"{norm.name}_merge", like=norm, **sets)
            norm.replace_all_uses_with(merged)
            report.rewritten += 1
    _read_sources_directly(graph)
    eliminate_dead_nodes(graph.graph)
    eliminate_duplicates(graph.graph, training=graph.traced.root.training)


def _read_sources_directly(graph: DecoderGraph) -> None:
    for node in list(graph.graph.nodes):
        merge = node.args[0] if node.args else None
        if node.target is not ops.token_slice or not isinstance(merge, fx.Node):
            continue
        if merge.target is not ops.token_merge:
            continue
        for held, source in zip(merge.meta["sources"], merge.args[1:], strict=True):
            if isinstance(source, fx.Node) and node.meta["tokens"] <= held:
                node.replace_all_uses_with(graph.slice(source, node.meta["tokens"], held))
                break


SHARE_FROZEN = Pass("share_frozen", _share_frozen, after=("slice_operations",))
