"""A picture of what a compiled model computes: `dop-compile explain --plot`."""

from __future__ import annotations

from typing import Any

from dop_compile.hf.dimensions import DecoderDims
from dop_compile.policy.costs import LayerTokens, layer_flops
from dop_compile.reports.executed import SampleTokens, layer_costs
from dop_compile.reports.explain import explain
from dop_compile.reports.operation_map import OperationMap
from dop_compile.reports.operation_picture import TierPicture, tiers_figure
from dop_compile.reports.table import EXECUTED_FLOPS, POLICY_FLOPS, show_percent

__all__ = ["explain_figure"]


def explain_figure(
    compiled: Any,
    *,
    system: int | None = None,
    visual: int | None = None,
    text: int | None = None,
    rows: int = 1,
    use_cache: bool = True,
) -> Any:
    """A matplotlib figure with a panel per tier: which tokens each operation of each layer processes, and its FLOPs.

    Arguments as in `explain`. The figure has no bars where the model's sizes are not known.

    Raises:
        TypeError, ValueError: as `explain`.
        ModuleNotFoundError: matplotlib is not installed.
    """
    found = explain(compiled, system=system, visual=visual, text=text, rows=rows, use_cache=use_cache)
    state, prompt = compiled.dop, SampleTokens(found.system, found.visual, found.text, rows, use_cache)
    dims = None if found.missing else DecoderDims.from_config(state.base.config)
    total = LayerTokens(prompt.total, prompt.total, prompt.total)
    original = () if dims is None else tuple(layer_flops(dims, total, layer) for layer in range(dims.num_layers))
    tiers = []
    for cost in found.tiers:
        layers = layer_costs(state, cost.tier, prompt, dims)
        costs = [
            f"{POLICY_FLOPS} {show_percent(cost.eq11_ratio)}, {EXECUTED_FLOPS} {show_percent(cost.executed_ratio)}",
            f"KV cache {show_percent(cost.kv_ratio)}",
        ]
        tiers.append(
            TierPicture(
                title="\n".join([cost.tier, *([] if dims is None else [", ".join(costs)])]),
                operations=OperationMap.of_tier(state, cost.tier, prompt),
                flops=tuple(layer.flops or 0 for layer in layers) if dims is not None else (),
                original_flops=original,
            )
        )
    asked = "all logits" if found.rows == 0 else f"logits of the last {found.rows}"
    tokens = f"{found.system} system + {found.visual} visual + {found.text} text tokens"
    return tiers_figure(tiers, f"{found.model}: {tokens}, {asked}")
