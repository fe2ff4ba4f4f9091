"""Rankings of visual tokens inside the decoder, by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from dop_compile.checks import choice
from dop_compile.rankings.attention import LastToken, Product, TextRaters
from dop_compile.rankings.base import Criterion, LayerView, best
from dop_compile.rankings.pivots import Pivots

__all__ = ["Criterion", "LayerView", "best", "criterion", "known", "register"]

_factories: dict[str, type[Criterion]] = {
    "last_token": LastToken,
    "text_raters": TextRaters,
    "product": Product,
    "pivots": Pivots,
}


def register(name: str, factory: type[Criterion]) -> None:
    """Make a criterion known by a name; it is called with a ranking's options as keywords.

    Raises:
        ValueError: the name is taken.
    """
    if _factories.setdefault(name, factory) is not factory:
        raise ValueError(f"criterion {name!r} is registered already, by {_factories[name]!r}")


def known() -> tuple[str, ...]:
    """All names that `criterion` takes, sorted."""
    return tuple(sorted(_factories))


def criterion(name: str, options: Mapping[str, Any] | None = None) -> Criterion:
    """The criterion of a name.

    Raises:
        ValueError: an unknown name or option (the message lists the known).
    """
    factory = _factories[choice("ranking: criterion", name, known())]
    accepted = [] if factory.__init__ is object.__init__ else list(inspect.signature(factory).parameters)
    for option in options or {}:
        if option not in accepted:
            raise ValueError(
                f"ranking: unknown option {option!r} of criterion {name!r}; accepted: {', '.join(accepted) or 'none'}"
            )
    return factory(**dict(options or {}))
