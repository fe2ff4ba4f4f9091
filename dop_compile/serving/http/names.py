"""Ids of models: `name@28%` is a tier; `name` is the automatic one, whose tier is chosen by `max_ms`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dop_compile.serving.http.errors import invalid

__all__ = ["ModelIds"]


class ModelIds:
    """The ids of one server.

    Args:
        name: of the model.
        tiers: the default first.
        created: seconds since 1970, as OpenAI's API says for each model.
    """

    def __init__(self, name: str, tiers: Sequence[str], created: int):
        self._name, self._created = name, created
        self._tiers: dict[str, str | None] = {name: None, **{f"{name}@{tier}": tier for tier in tiers}}

    def tier(self, model: str) -> str | None:
        """The tier that an id names; None for the automatic one.

        Raises:
            ApiError: there is no such model.
        """
        if model not in self._tiers:
            known = ", ".join(self._tiers)
            message = f"the model {model[:200]!r} does not exist; expected one of {known}"
            raise invalid(message, "model", "model_not_found", status=404)
        return self._tiers[model]

    def of_tier(self, tier: str) -> str:
        return f"{self._name}@{tier}"

    def entry(self, model: str) -> dict[str, Any]:
        """Of one model, in OpenAI's shape."""
        self.tier(model)
        return {"id": model, "object": "model", "created": self._created, "owned_by": "dop_compile"}

    def all(self) -> dict[str, Any]:
        return {"object": "list", "data": [self.entry(model) for model in self._tiers]}
