"""What a policy speaks of: token groups, modules, and operations, which are one module of one layer for one group."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MODULES", "MODULE_SHORTHAND", "PROMPT_GROUPS", "SPLIT_VISUAL_GROUPS", "Operation"]

PROMPT_GROUPS = ("system", "visual", "text")
SPLIT_VISUAL_GROUPS = ("visual_salient", "visual_rest")
MODULES = ("mha_query", "mha_key_value", "mlp")
MODULE_SHORTHAND = {"mha": ("mha_query", "mha_key_value")}


class Operation(NamedTuple):
    """One (group, layer, module); layers count from 0."""

    group: str
    layer: int
    module: str
