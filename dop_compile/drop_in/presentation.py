"""What a compiled model shows of its tiers: `compiled.tiers`, and a line of `repr(compiled)`.

By `extra_repr`, as modules show their settings. The name that `repr` begins with stays: transformers' Trainer looks a
model's class up by it.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from dop_compile.hf.copies import own

__all__ = ["present_tiers"]


def present_tiers(view: Any, state: Any, tier: str) -> None:
    """Give a compiled model `tiers`, its policies by name and read-only, and name them in its `repr`.

    Args:
        view: the object that is shown.
        state: its `CompiledState`.
        tier: its default tier.
    """
    view.tiers = MappingProxyType(state.tiers)
    settings = type(view).extra_repr

    def extra_repr() -> str:
        names = ", ".join(f"{name!r} (default)" if name == tier else repr(name) for name in state.tiers)
        return "\n".join(filter(None, [f"compiled by dop_compile, tiers: {names}", settings(view)]))

    view.extra_repr = own(extra_repr)
