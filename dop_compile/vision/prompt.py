"""What a call's reducer wants to know about the vision tower, per position of the prompt.

A frame's feature methods are watched while Hugging Face's forward calls them; afterwards each visual position of the
prompt is matched with a row of what they returned: so it is known of which image or video it is. What passes inside the
tower is noted only for reducers that want to know it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dop_compile.errors import UnsupportedUsageError
from dop_compile.hf.copies import own
from dop_compile.hf.names import FEATURE_METHODS
from dop_compile.hf.spellings import signature
from dop_compile.policy.policy import Policy
from dop_compile.reducers import Reducer, create, fitting, needs
from dop_compile.spans import SELECTION, span
from dop_compile.vision.features import TokenFeatures, token_features
from dop_compile.vision.items import has_items, item_sizes
from dop_compile.vision.tap import Observed, Tower, VisionModules, observing

__all__ = ["VISION_FIELDS", "PromptVision", "vision_fields", "watch_vision"]

VISION_FIELDS = frozenset({"features", "cls_attention", "keys", "project", "tiles", "grid"})
"""Fields of a reducer's context that come from the vision tower."""


def vision_fields(policy: Policy) -> frozenset[str]:
    """The fields that a policy's reducer wants to know, whether or not the policy drops tokens."""
    if policy.reducer == "given":
        return frozenset()
    return needs(create(policy.reducer, policy.options)) & VISION_FIELDS


def watch_vision(
    chain: Sequence[nn.Module], path: str, wanted: frozenset[str], note: Callable[[TokenFeatures], None]
) -> None:
    """Let the feature methods of a frame's modules tell what they see.

    Args:
        chain: private copies of the modules from the model to its decoder.
        path: the decoder's path in the model.
        wanted: names of `VISION_FIELDS`.
        note: called with the tokens of each call of a feature method.
    """
    for module, child in reversed(list(zip(chain[:-1], path.split("."), strict=True))):
        methods = [name for name in FEATURE_METHODS if hasattr(module, name)]
        if methods:
            modules, busy = VisionModules(module, child), set[nn.Module]()
            for name in methods:
                method = getattr(module, name)  # the class's, or one set on the instance
                vars(module)[name] = _watched(modules, getattr(method, "unwatched", method), wanted, note, busy)
            return


def _watched(
    modules: VisionModules,
    method: Callable[..., Any],
    wanted: frozenset[str],
    note: Callable[[TokenFeatures], None],
    busy: set[nn.Module],
) -> Callable[..., Any]:
    apart = has_items(*(kind.__name__ for kind in type(modules.owner).__mro__))

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if modules.owner in busy:  # one feature method calls another
            return method(*args, **kwargs)
        named = _arguments(method, args, kwargs)
        attentions = _layers(modules, named) if wanted & {"cls_attention", "keys"} else {}
        busy.add(modules.owner)
        try:
            with observing(modules, attentions) if wanted else nullcontext(Observed()) as observed:
                output = method(*args, **kwargs)
        finally:
            busy.discard(modules.owner)
        grid = next((value for name, value in named.items() if name.endswith("_grid_thw")), None)
        with span(SELECTION):
            sizes = item_sizes(output, named) if apart else ()
            found = token_features(wanted, observed, output, sizes, grid, modules)
        if found is not None:
            note(found)
        return output

    call.unwatched = method  # type: ignore[attr-defined]
    return own(call)


def _arguments(method: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """What a method is called with, by name."""
    own = (method.__self__,) if inspect.ismethod(method) else ()
    named = dict(list(signature(method).bind_partial(*own, *args, **kwargs).arguments.items())[len(own) :])
    return {**named, **named.get("kwargs", {})}


def _layers(modules: VisionModules, named: dict[str, Any]) -> dict[Tower, int]:
    """The layer of each tower whose output feeds the projector: the deepest that is named, or the last."""
    chosen = named.get("vision_feature_layer")
    if chosen is None:
        chosen = getattr(getattr(modules.owner, "config", None), "vision_feature_layer", None)
    layers = {}
    for tower in modules.towers:
        numbers = [chosen] if isinstance(chosen, int) else list(chosen or [-1])
        # Hidden states are numbered from the embeddings', which are the first layer's input
        layers[tower] = max(tower.count + number if number < 0 else number - 1 for number in numbers)
    return {tower: layer for tower, layer in layers.items() if 0 <= layer < tower.count}


class PromptVision:
    """The tokens of one prompt's images and videos, by position.

    Attributes:
        items: (batch, tokens) int64 on the CPU, the image or video that each position belongs to; -1 where that is not
            known, and where there is none.

    Args:
        parts: one per call of a feature method.
        places: per part the row of it that stands at each position (batch, tokens), on the CPU, -1 at others; None
            where that is not known.
        shape: (batch, tokens).
        model: the model's name, for messages.
    """

    def __init__(
        self, parts: Sequence[TokenFeatures], places: Sequence[Tensor | None], shape: tuple[int, int], model: str
    ):
        self._model = model
        self._row = torch.full(shape, -1, device="cpu")
        self.items = torch.full_like(self._row, -1)
        self._missing: dict[str, str] = {}
        placed: list[TokenFeatures] = []
        for part, rows in zip(parts, places, strict=True):
            if rows is not None:
                first = sum(len(other.rows) for other in placed)
                there, own = rows.numpy() >= 0, rows.numpy()
                self._row.numpy()[there] = own[there] + first
                if part.sizes:
                    before = sum(len(other.sizes) for other in placed)
                    numbers = before + np.repeat(np.arange(len(part.sizes)), part.sizes)
                    self.items.numpy()[there] = numbers[own[there]]
                placed.append(part)
                self._missing |= part.missing
        self._shapes = tuple(shape for part in placed for shape in part.shapes)
        self._table = self._joined(placed)
        self._project = placed[0].project if placed else None

    def _joined(self, parts: list[TokenFeatures]) -> dict[str, Tensor]:
        """Fields of all parts, one part after the other."""
        table = {}
        for name in ("features", "cls_attention", "keys", "tiles"):
            values = [getattr(part, name) for part in parts if getattr(part, name) is not None]
            if name == "tiles":
                firsts = itertools.accumulate((len(part.shapes) for part in parts), initial=0)
                values = [value + first for value, first in zip(values, firsts, strict=False)]
            if len({value.shape[1:] for value in values}) > 1:
                self._missing[name] = f"the {name} of images and videos have different sizes"
            elif values:
                table[name] = torch.cat(values) if len(values) > 1 else values[0]
        return table

    def check(self, reducer: Reducer, visual: Tensor) -> None:
        """Refuse a reducer that wants to know what is not known of the visual tokens (batch, tokens).

        Raises:
            UnsupportedUsageError: naming the fields, the reason, and reducers that fit.
        """
        known = not bool((visual & (self._row < 0)).any())
        reasons = {name: self._why_not(name, known) for name in sorted(needs(reducer) & VISION_FIELDS)}
        lacking = {name: reason for name, reason in reasons.items() if reason}
        if lacking:
            supplied = {name for name in VISION_FIELDS if self._why_not(name, known) is None}
            raise UnsupportedUsageError(
                f"reducer {reducer.name!r} requires {', '.join(lacking)}, which {self._model} does not supply here: "
                f"{'; '.join(dict.fromkeys(lacking.values()))}. Reducers that fit: "
                f"{', '.join(fitting(frozenset(supplied) | {'text_ids'}))}"
            )

    def _why_not(self, name: str, known: bool) -> str | None:
        if not known:
            return "the vision tower was not seen (features passed in ready-made)"
        if name in self._missing:
            return self._missing[name]
        there = {*self._table, *(("project",) if self._project is not None else ()), "grid"}
        return None if name in there else f"{name} was not recorded for the reducer of this call"

    def fields(self, row: int, columns: Tensor, segments: Tensor, wanted: frozenset[str]) -> dict[str, Any]:
        """Fields of a context for the tokens at `columns` (tokens,) of one row of the batch, and their segments."""
        if not wanted:
            return {}
        index = self._row[row, columns]
        first, last = int(index[0]), int(index[-1])
        run = last + 1 - first == len(index) and bool((index.diff() == 1).all())
        found: dict[str, Any] = {}
        for name in wanted & set(self._table):
            value = self._table[name]
            found[name] = value[first : last + 1] if run else value[index.to(value.device)]
        if "project" in wanted:
            found["project"] = self._project
        if "grid" in wanted:
            found["grid"] = self._grid(self._table["tiles"][index], segments)
        return found

    def _grid(self, tiles: Tensor, segments: Tensor) -> list[tuple[int, int, int]] | None:
        grid = []
        for segment in torch.unique(segments).tolist():
            numbers, counts = torch.unique_consecutive(tiles[segments == segment], return_counts=True)
            shapes = {self._shapes[number] for number in numbers.tolist()}
            shape = next(iter(shapes))
            if len(shapes) > 1 or shape is None or set(counts.tolist()) != {shape[0] * shape[1]}:
                return None
            grid.append((len(numbers), *shape))
        return grid
