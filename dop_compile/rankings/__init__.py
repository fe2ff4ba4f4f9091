"""Rankings of visual tokens inside the decoder, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dop_compile.policy_json import choice
from dop_compile.rankings.attention import LastToken, Product, TextRaters
from dop_compile.rankings.base import Criterion, best
from dop_compile.rankings.pivots import Pivots
from dop_compile.rankings.view import LayerView

__all__ = ["Criterion", "LayerView", "best", "criterion", "known", "register"]

_factories: dict[str, Callable[..., Criterion]] = {
    "last_token": LastToken,
    "text_raters": TextRaters,
    "product": Product,
    "pivots": Pivots,
}


def register(name: str, factory: Callable[..., Criterion]) -> None:
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
    try:
        return factory(**dict(options or {}))
    except TypeError as error:
        raise ValueError(f"ranking: criterion {name!r}: {error}") from error
