"""What each decoder layer does with visual tokens, work that nothing reads removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dop_compile.policy.policy import Policy

__all__ = ["Attention", "Role", "Roles"]

Attention = Literal["full", "frozen", "absent", "keyless"]
"""Visual tokens in a layer's attention: queries and keys, keys only, neither, or queries only."""


@dataclass(frozen=True)
class Role:
    """Which modules of one layer visual tokens take part in."""

    query: bool
    key_value: bool
    mlp: bool

    @property
    def attention(self) -> Attention:
        if self.key_value:
            return "full" if self.query else "frozen"
        return "keyless" if self.query else "absent"

    @property
    def full(self) -> bool:
        return self.query and self.key_value and self.mlp


@dataclass(frozen=True)
class Roles:
    """All layers' roles; from layer `removed_from` on visual tokens are in no module."""

    layers: tuple[Role, ...]
    removed_from: int

    @classmethod
    def of(cls, policy: Policy) -> Roles:
        """Queries and MLPs count only where a later layer reads their tokens: nobody asks for visual tokens' logits."""
        found: list[Role] = []
        removed_from = 0
        for layer in reversed(range(policy.num_layers)):
            query, key_value, mlp = (policy.keeps("visual", layer, m) for m in ("mha_query", "mha_key_value", "mlp"))
            is_read = removed_from > 0
            found.append(Role(query and is_read, key_value, mlp and is_read))
            if key_value and not is_read:
                removed_from = layer + 1
        return cls(tuple(reversed(found)), removed_from)

    @property
    def stores_every_key(self) -> bool:
        """Whether the cache of every layer holds all tokens at their own places, as vLLM takes for granted."""
        return all(role.key_value for role in self.layers)
