"""The keep table: a policy normalised, once, to what each layer's modules do with each token group."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from dop_compile.policy.policy import Policy
from dop_compile.policy.ranking import Ranking

__all__ = ["ANY_GROUP", "KeepTable", "LayerKeep"]

ANY_GROUP = "tokens"
"""The one group of a table that prunes nothing: every such program is the same, whatever its tokens are called."""


@dataclass(frozen=True)
class LayerKeep:
    """Groups that one layer keeps, per module."""

    query: frozenset[str]
    key_value: frozenset[str]
    mlp: frozenset[str]


@dataclass(frozen=True)
class KeepTable:
    """Groups of a program in sequence order, per layer who takes part in which module, and what is ranked where."""

    groups: tuple[str, ...]
    layers: tuple[LayerKeep, ...]
    ranking: Ranking | None = None

    @classmethod
    def dense(cls, num_layers: int) -> KeepTable:
        everything = frozenset({ANY_GROUP})
        return cls((ANY_GROUP,), (LayerKeep(everything, everything, everything),) * num_layers)

    @classmethod
    def from_policy(cls, policy: Policy, groups: tuple[str, ...]) -> KeepTable:
        """The rows of a policy for the groups that a call contains; dense where nothing of them is pruned."""
        return _from_policy(policy, groups)

    @property
    def is_dense(self) -> bool:
        return self.groups == (ANY_GROUP,)


@functools.lru_cache(maxsize=256)
def _from_policy(policy: Policy, groups: tuple[str, ...]) -> KeepTable:
    """Kept, since every call and every generated token asks for it."""

    def kept(layer: int, module: str) -> frozenset[str]:
        return frozenset(group for group in groups if policy.keeps(group, layer, module))

    layers = tuple(
        LayerKeep(kept(layer, "mha_query"), kept(layer, "mha_key_value"), kept(layer, "mlp"))
        for layer in range(policy.num_layers)
    )
    full = frozenset(groups)
    if all(row == LayerKeep(full, full, full) for row in layers):
        return KeepTable.dense(policy.num_layers)
    ranked = policy.ranking is not None and {"visual", *policy.ranking.groups} & full
    return KeepTable(groups, layers, policy.ranking if ranked else None)
