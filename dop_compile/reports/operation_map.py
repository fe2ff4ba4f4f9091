"""Which tokens each operation of a decoder processes: as a policy is written, and as it is run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dop_compile.policy.costs import group_counts
from dop_compile.policy.operations import MODULES
from dop_compile.policy.policy import Policy
from dop_compile.reports.executed import SampleTokens, group_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dop_compile.compiler import CompiledState

__all__ = ["ABSENT", "FROZEN", "OperationMap"]

FROZEN, ABSENT = "frozen", "absent"
"""Of a group in a layer: only its keys and values are left; nothing is."""

QUERY, KEY_VALUE, MLP = range(len(MODULES))


@dataclass(frozen=True, eq=False)
class OperationMap:
    """Tokens of one sample in each operation.

    Args:
        groups: the groups that the sample has, in sequence order; tokens that a ranking drops are visual.
        before: tokens of each group before reduction.
        kept: (layers, 3, groups) tokens that the policy keeps in `mha_query`, `mha_key_value` and `mlp`.
        computed: the same of what is run, without work that reaches no requested output; None where not known.
    """

    groups: tuple[str, ...]
    before: tuple[int, ...]
    kept: NDArray[np.int64]
    computed: NDArray[np.int64] | None = None

    @classmethod
    def of_policy(cls, policy: Policy, *, system: int = 0, visual: int = 0, text: int = 0) -> OperationMap:
        """Of a policy as it is written; counts are before reduction.

        Raises:
            TypeError, ValueError: counts that are not whole numbers >= 0, or all zero.
        """
        entering = group_counts(policy, system, visual, text)
        before = group_counts(policy.replace(visual_tokens=None, ranking=None), system, visual, text)
        groups = tuple(group for group, count in before.items() if count)
        if not groups:
            raise ValueError("system, visual, text: expected at least one token, got none")

        def kept(layer: int, module: str) -> list[int]:
            found = {group: count * policy.keeps(group, layer, module) for group, count in entering.items()}
            return _shown(policy, groups, found)

        counts = [[kept(layer, module) for module in MODULES] for layer in range(policy.num_layers)]
        return cls(groups, tuple(before[group] for group in groups), np.array(counts, dtype=np.int64))

    @classmethod
    def of_tier(cls, state: CompiledState, tier: str, prompt: SampleTokens) -> OperationMap:
        """Of one tier of a compiled model, with what it runs.

        Raises:
            ValueError: as `explain`.
        """
        policy = state.tiers[tier]
        written = cls.of_policy(policy, system=prompt.system, visual=prompt.visual, text=prompt.text)
        computed = [
            [_shown(policy, written.groups, tokens) for tokens in modules]
            for modules in group_tokens(state, tier, prompt)
        ]
        return cls(written.groups, written.before, written.kept, np.array(computed, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def processed(self) -> NDArray[np.int64]:
        """(layers, 3, groups): what is run, or what is kept where that is not known."""
        return self.kept if self.computed is None else self.computed

    def state(self, layer: int, group: str) -> str:
        """`FROZEN`, `ABSENT`, or "" where the layer updates tokens of the group, or would as the policy is written.

        The last layer's work on tokens that nobody asks for is dead whatever the policy is, and is no state.
        """
        number = self.groups.index(group)
        query, key_value, mlp = self.processed[layer, :, number] > 0
        if query or mlp:
            return ""
        if key_value:
            kept = self.kept[layer, :, number] > 0
            return "" if layer == len(self) - 1 and (kept[QUERY] or kept[MLP]) else FROZEN
        return ABSENT

    def runs(self, *others: Any) -> list[range]:
        """Neighbouring layers that do the same; `others` are (layers,) values that have to be equal, too."""

        def content(layer: int) -> tuple[Any, ...]:
            same = (self.kept[layer].tobytes(), self.processed[layer].tobytes())
            return (*same, *(values[layer] for values in others))

        groups = (list(run) for _, run in itertools.groupby(range(len(self)), content))
        return [range(run[0], run[-1] + 1) for run in groups]


def _shown(policy: Policy, groups: tuple[str, ...], counts: dict[str, int]) -> list[int]:
    """Of each group that is shown: tokens that a ranking drops, each stage a group of its own, are visual."""
    leaving = () if policy.ranking is None else policy.ranking.groups
    visual = sum(counts.get(group, 0) for group in leaving)
    return [counts.get(group, 0) + visual * (group == "visual") for group in groups]
