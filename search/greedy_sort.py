"""Sort the operations of visual tokens by what pruning them costs, greedily (GSOP, arXiv 2507.02909).

1. Free-to-prune: per visual group and set of modules, bisection finds the first layer from which pruning to the last
   costs nothing, on top of what was found before.
2. Ranking: every remaining operation is measured alone, on top of what is pruned.
3. The best of the ranking is pruned too, and the model measured. Where its loss is above the allowed one, the operation
   is taken back, the allowance grows by one stride, and all that remain are ranked anew; else the old ranking goes on.
4. The order ends with the last operation, or where the loss would be above `max_loss`.

Pruning an operation implies pruning others (`implied`):
- what `visual_salient` does without, `visual_rest` does without
- where a visual group supplies no keys and values from a layer to the last, its queries and MLP there are useless

Danger-to-prune operations are left out everywhere, and so is what would imply one. Equally good operations: the deeper
layer first, then the rest of the visual tokens, then keys and values, the MLP, queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dop_compile.checks import finite, integer, store
from dop_compile.policy.operations import MODULES, SPLIT_VISUAL_GROUPS, Operation
from dop_compile.policy.policy import Policy

__all__ = ["GreedyRules", "GreedySort", "Measure", "Step", "default_danger", "greedy_sort", "implied", "visual_groups"]

QUERY, KEY_VALUE, MLP = "mha_query", "mha_key_value", "mlp"
FREE_SETS = ((QUERY, MLP, KEY_VALUE), (QUERY, MLP), (QUERY,))
TIES = (QUERY, MLP, KEY_VALUE)
"""The later, the sooner pruned among equally good operations."""

DANGER_LAYERS = 6 / 32
"""Published for 32 layers: those of the most salient tokens in the first 6."""

Measure = Callable[[Policy], float]


@dataclass(frozen=True)
class Step:
    """One operation of the order, and the divergence of the model after it and everything before it."""

    operation: Operation
    divergence: float


def visual_groups(policy: Policy) -> tuple[str, ...]:
    """The groups that GSOP prunes: the parts of the visual group, or all of it where it is not split."""
    return ("visual",) if policy.salient_fraction is None else SPLIT_VISUAL_GROUPS


def implied(pruned: Iterable[Operation], num_layers: int) -> frozenset[Operation]:
    """The operations with all that they imply; applied again it adds nothing."""
    found = set(pruned)
    salient, rest = SPLIT_VISUAL_GROUPS
    found |= {Operation(rest, op.layer, op.module) for op in found if op.group == salient}
    for group in {op.group for op in found}:
        first = num_layers
        while first and Operation(group, first - 1, KEY_VALUE) in found:
            first -= 1
        found |= {Operation(group, layer, module) for layer in range(first, num_layers) for module in (QUERY, MLP)}
    return frozenset(found)


def default_danger(base: Policy) -> frozenset[Operation]:
    """The published exclusions: `visual_salient` in the first 6 of 32 layers, and its keys and values in all.

    Of another number of layers as large a part. Nothing where the visual group is not split.
    """
    if base.salient_fraction is None:
        return frozenset()
    first = math.floor(DANGER_LAYERS * base.num_layers + 0.5)
    salient = SPLIT_VISUAL_GROUPS[0]
    early = {Operation(salient, layer, module) for layer in range(first) for module in MODULES}
    return frozenset(early | {Operation(salient, layer, KEY_VALUE) for layer in range(base.num_layers)})


@dataclass(frozen=True)
class GreedyRules:
    """What `greedy_sort` may do; values as in `greedy_order`, none of them left open.

    Raises:
        TypeError, ValueError: wrong values; the message names the field.
    """

    base: Policy
    danger: frozenset[Operation]
    free_layer: int
    tolerance: float
    max_loss: float
    steps: int = 15

    def __post_init__(self) -> None:
        if not self.base.is_full:
            raise ValueError("base: expected a policy that prunes nothing")
        try:
            danger = self.base.replace(pruned=self.danger).pruned
        except (TypeError, ValueError) as error:
            raise type(error)(f"danger: {error}") from error
        if other := {op.group for op in danger} - set(visual_groups(self.base)):
            raise ValueError(f"danger: only operations of visual tokens are pruned at all, got group {min(other)!r}")
        store(self, "danger", danger)
        store(self, "free_layer", integer("free_layer", self.free_layer, low=0, high=self.base.num_layers))
        store(self, "steps", integer("steps", self.steps, low=1))
        for field in ("max_loss", "tolerance"):
            store(self, field, finite(field, getattr(self, field)))
        if self.max_loss <= 0:
            raise ValueError(f"max_loss: expected a loss > 0, got {self.max_loss}")
        if not 0 <= self.tolerance <= self.max_loss:
            raise ValueError(f"tolerance: expected a loss from 0 to max_loss ({self.max_loss}), got {self.tolerance}")


@dataclass(frozen=True)
class GreedySort:
    """What `greedy_sort` finds; as in `OperationOrder`."""

    free: frozenset[Operation]
    free_divergence: float
    steps: tuple[Step, ...]
    evaluations: int


class _Losses:
    """The loss of each set of pruned operations, measured once."""

    def __init__(self, base: Policy, measure: Measure):
        self._base, self._measure = base, measure
        self._known: dict[frozenset[Operation], float] = {frozenset(): 0.0}

    def __call__(self, pruned: frozenset[Operation]) -> float:
        if pruned not in self._known:
            loss = float(self._measure(self._base.replace(pruned=pruned)))
            if not math.isfinite(loss):
                raise ValueError(f"the divergence with {len(pruned)} operations pruned is {loss}: expected a number")
            self._known[pruned] = loss
        return self._known[pruned]

    @property
    def evaluations(self) -> int:
        return len(self._known) - 1


def greedy_sort(rules: GreedyRules, measure: Measure) -> GreedySort:
    """The order of operations that `measure` leads to; `measure` is asked once for each policy.

    Args:
        measure: loss of a policy against the original, whose own is 0. Deterministic.
    """
    losses = _Losses(rules.base, measure)
    free = _free_to_prune(rules, losses)
    steps = _sort(rules, losses, free)
    return GreedySort(free, losses(free), steps, losses.evaluations)


def _free_to_prune(rules: GreedyRules, losses: _Losses) -> frozenset[Operation]:
    layers = rules.base.num_layers

    def pruned_from(layer: int, group: str, modules: Sequence[str], free: frozenset[Operation]) -> frozenset[Operation]:
        own = {Operation(group, number, module) for number in range(layer, layers) for module in modules}
        return implied(free | (own - rules.danger), layers)

    free: frozenset[Operation] = frozenset()
    for group in visual_groups(rules.base):
        for modules in FREE_SETS:
            low, high = rules.free_layer, layers
            while low < high:
                middle = (low + high) // 2
                candidate = pruned_from(middle, group, modules, free)
                if not candidate & rules.danger and losses(candidate) <= rules.tolerance:
                    high = middle
                else:
                    low = middle + 1
            free = pruned_from(high, group, modules, free)
    return free


def _sort(rules: GreedyRules, losses: _Losses, pruned: frozenset[Operation]) -> tuple[Step, ...]:
    layers = rules.base.num_layers
    groups = visual_groups(rules.base)
    everything = [Operation(g, layer, m) for layer in range(layers) for g in groups for m in TIES]

    def grown(operation: Operation) -> frozenset[Operation]:
        return implied(pruned | {operation}, layers)

    def remaining(operations: Iterable[Operation]) -> list[Operation]:
        return [op for op in operations if op not in pruned and not grown(op) & rules.danger]

    steps: list[Step] = []
    ranking: list[Operation] | None = None
    for stride in range(1, rules.steps + 1):
        allowed = rules.max_loss * stride / rules.steps
        while True:
            if ranking is None:
                ranking = sorted(reversed(remaining(everything)), key=lambda op: losses(grown(op)))
            else:
                ranking = remaining(ranking)
            if not ranking:
                return tuple(steps)
            candidate = grown(ranking[0])
            loss = losses(candidate)
            if loss > allowed:
                ranking = None
                break
            steps.append(Step(ranking[0], loss))
            pruned = candidate
    return tuple(steps)
