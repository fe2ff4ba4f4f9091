"""A tier's exported reducer in the place of the one in Python, for the prompts that its graph stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor

from dop_compile.reducers import Reducer, Selection, VisualContext, select_tokens

__all__ = ["GraphReducer"]


class GraphReducer:
    """Keeps what the graph keeps of a prompt with one image of `tokens` features; asks `otherwise` for others.

    Args:
        run: the graph, inputs and outputs by name (`ReducerInfo`).
        tokens: that the graph was exported for.
        otherwise: the same reducer in Python.
    """

    whole_sample: ClassVar[bool] = True

    def __init__(self, run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], tokens: int, otherwise: Reducer):
        self._run, self._tokens, self._otherwise = run, tokens, otherwise
        self.name, self.requires = otherwise.name, otherwise.requires
        self.at_most = getattr(otherwise, "at_most", False)

    def __call__(self, context: VisualContext, count: int) -> Selection:
        if context.tokens != self._tokens or bool(context.segments.any()):
            return select_tokens(self._otherwise, context, count)
        found = self._run({"features": context.projected})
        return Selection(found["indices"], found["kept"].to(context.projected))
