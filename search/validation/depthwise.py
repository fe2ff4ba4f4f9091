"""Whether operations of deeper layers are the ones that are missed least (DOP F.7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dop_compile.checks import choice, integer
from dop_compile.policy.operations import Operation
from dop_compile.policy.policy import Policy
from dop_compile.search.validation.study import Cell, Measure, Study, losses_of

__all__ = ["consecutive_operations", "swapped_operations"]

MODULES = ("mha", "mha_query", "mha_key_value", "mlp")


def consecutive_operations(
    base: Policy,
    measure: Measure,
    *,
    lengths: Sequence[int] = (1, 3),
    modules: Sequence[str] = ("mha", "mlp"),
    layers: Sequence[int] | None = None,
) -> Study:
    """What is lost when visual tokens skip one module in a few consecutive layers (DOP F.7.1, Tables 26-28).

    Args:
        base: the policy that is changed; one that prunes nothing is the paper's.
        lengths: how many consecutive layers.
        modules: "mha", "mha_query", "mha_key_value" or "mlp".
        layers: the first pruned layer, from 0; all that leave room unless given.

    Returns:
        A row per module, length and first layer: the loss.

    Raises:
        ValueError: a run of layers that the model does not have, unknown modules, nothing to prune.
    """
    count = base.num_layers
    for module in modules:
        choice("modules", module, MODULES)
    runs = []
    for module in modules:
        for length in lengths:
            length = integer("lengths", length, low=1, high=count)
            firsts = range(count - length + 1) if layers is None else layers
            runs += [(module, length, integer("layers", first, low=0, high=count - length)) for first in firsts]
    if not runs:
        raise ValueError("lengths, modules, layers: expected at least one of each")
    policies = [
        base.replace(pruned=[*base.pruned, *(("visual", first + i, module) for i in range(length))])
        for module, length, first in runs
    ]
    rows = [(*run, loss) for run, loss in zip(runs, losses_of(measure, policies).tolist(), strict=True)]

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(lengths), squeeze=False)[0]
        for panel, length in zip(panels, lengths, strict=True):
            for module in modules:
                own = [(first, loss) for name, n, first, loss in rows if (name, n) == (module, length)]
                panel.plot(*zip(*own, strict=True), marker="o", label=module)
            panel.set_title(f"{length} consecutive")
            panel.set_xlabel("first pruned layer")
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("loss")
        panels[0].legend(fontsize=8)

    title = f"visual tokens skip consecutive operations: {len(rows)} policies"
    return Study(title, ("module", "layers", "first layer", "loss"), tuple(rows), draw, (5.0 * len(lengths), 3.6))


def swapped_operations(
    policy: Policy, measure: Measure, *, swaps: Sequence[int] = (1, 3), draws: int = 10, seed: int = 0
) -> Study:
    """Policies near the found one that are not depth-wise (DOP F.7.2, Tables 29-30).

    Each draw chooses one module of the visual tokens, and exchanges n layers that keep it for n that prune it. The
    attention is one module where queries and key-values are pruned in the same layers, and two where they are not.

    Args:
        swaps: numbers n of exchanged operations.
        draws: policies per number; equal draws are measured once.

    Returns:
        The policy's own row (0 swaps), and a row per n: least, mean and largest loss, its standard deviation, and the
        share of the draws that lose more than the policy does.

    Raises:
        ValueError: no module has n layers that keep it and n that prune it.
    """
    draws = integer("draws", draws, low=1)
    rng = np.random.default_rng(seed)
    drawn: list[list[Policy]] = []
    for count in swaps:
        count = integer("swaps", count, low=1)
        able = [module for module in _modules(policy) if min(map(len, _sides(policy, module))) >= count]
        if not able:
            raise ValueError(
                f"swaps: no module of {policy!r} keeps {count} layers and prunes {count}; ask for fewer swaps, or "
                "give a policy that prunes more"
            )
        drawn.append([_swap(policy, able[rng.integers(len(able))], count, rng) for _ in range(draws)])
    different = list(dict.fromkeys([policy, *(one for policies in drawn for one in policies)]))
    losses = dict(zip(different, losses_of(measure, different).tolist(), strict=True))
    own = losses[policy]
    rows: list[tuple[Cell, ...]] = [(0, 1, own, own, own, 0.0, None)]
    found = [[losses[one] for one in policies] for policies in drawn]
    for count, values in zip(swaps, found, strict=True):
        worse = float(np.mean([value > own for value in values]))
        spread = (min(values), float(np.mean(values)), max(values), float(np.std(values)))
        rows.append((count, len(values), *spread, worse))

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        panel.axhline(own, color="0.4", label="the policy")
        for index, values in enumerate(found):
            panel.scatter([index] * len(values), values, alpha=0.6)
        panel.set_xticks(range(len(swaps)), [f"{count} swapped" for count in swaps])
        panel.set_xlim(-0.5, len(swaps) - 0.5)
        panel.set_ylabel("loss")
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)

    title = f"operations exchanged at random in {policy!r}"
    heads = ("swaps", "policies", "least", "mean", "largest", "sd", "worse than the policy")
    return Study(title, heads, tuple(rows), draw, (4.5, 3.6))


def _modules(policy: Policy) -> tuple[str, ...]:
    both = policy.pruned_layers("visual", "mha_query") == policy.pruned_layers("visual", "mha_key_value")
    return ("mha", "mlp") if both else ("mha_query", "mha_key_value", "mlp")


def _sides(policy: Policy, module: str) -> tuple[list[int], list[int]]:
    """Layers in which visual tokens keep a module, and those in which they do not."""
    pruned = policy.pruned_layers("visual", "mha_query" if module == "mha" else module)
    return [layer for layer in range(policy.num_layers) if layer not in pruned], list(pruned)


def _swap(policy: Policy, module: str, count: int, rng: np.random.Generator) -> Policy:
    kept, pruned = (rng.choice(side, size=count, replace=False).tolist() for side in _sides(policy, module))
    parts = ("mha_query", "mha_key_value") if module == "mha" else (module,)
    back = {Operation("visual", layer, part) for layer in pruned for part in parts}
    gone = {Operation("visual", layer, part) for layer in kept for part in parts}
    return policy.replace(pruned=(policy.pruned - back) | gone, provenance=None)
