"""A policy in words: the layers that each group keeps, for `repr` and for notebooks."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from typing import Any

from dop_compile.policy.operations import MODULES

__all__ = ["as_html", "as_text"]


def as_text(policy: Any) -> str:
    """One line: what each group keeps, and the fields that are set."""
    shown: dict[str, object] = {"reducer": policy.reducer, "reducer_options": policy.options or None}
    shown |= {"positions": policy.positions, "salient_fraction": policy.salient_fraction}
    shown["budget"] = policy.provenance and policy.provenance.budget
    shown["ranking"] = policy.ranking and str(policy.ranking)
    tail = [f"visual_tokens={'all' if policy.visual_tokens is None else policy.visual_tokens}"]
    tail += [f"{name}={value!r}" for name, value in shown.items() if value is not None]
    kept = [text for group in policy.prunable_groups if (text := _describe(policy, group))] or ["nothing pruned"]
    return f"Policy({policy.num_layers} layers, {'; '.join(kept)}; {', '.join(tail)})"


def as_html(policy: Any) -> str:
    """A table for notebooks: the layers that each group keeps, per module."""
    rows = []
    for group in policy.prunable_groups:
        cells = (_runs(policy.pruned_layers(group, module), policy.num_layers) for module in MODULES)
        rows.append(f"<tr><th>{group}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("", *MODULES))
    return f"<p>{html.escape(repr(policy))}</p><table><tr>{head}</tr>{''.join(rows)}</table>"


def _describe(policy: Any, group: str) -> str:
    """The kept layers of the modules that the group prunes, as ranges; "" when it prunes none."""
    pruned = {module: layers for module in MODULES if (layers := policy.pruned_layers(group, module))}
    if "mha_query" in pruned and pruned["mha_query"] == pruned.get("mha_key_value"):
        pruned = {"mha": pruned["mha_query"]} | {m: pruned[m] for m in pruned if m == "mlp"}
    kept = [f"{module} {_runs(layers, policy.num_layers)}" for module, layers in pruned.items()]
    return f"{group} keeps {', '.join(kept)}" if kept else ""


def _runs(pruned: Sequence[int], num_layers: int) -> str:
    """The layers that are not pruned, as ranges."""
    bounds = itertools.pairwise((-1, *pruned, num_layers))
    runs = [f"{a + 1}-{b - 1}" if b - a > 2 else f"{a + 1}" for a, b in bounds if b - a > 1]
    return ",".join(runs) or "none"
