"""Which patches of a picture a model still reads, layer by layer: `dop-compile run --show-kept`.

A prompt is run once, and two things are noted: which rows of the tower's output are which patches, and which columns of
the prompt entered the decoder. What happens to those in its layers is the policy's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dop_compile.drop_in.frame import CALL_ARGUMENTS, Frame, Session
from dop_compile.drop_in.observer import Observer
from dop_compile.errors import UnsupportedUsageError
from dop_compile.policy.policy import Policy
from dop_compile.reports.operation_picture import new_figure
from dop_compile.runtime.call import Call
from dop_compile.vision.features import TokenFeatures

__all__ = ["Stretch", "kept_figure", "kept_patches", "stretches"]

Patches = np.ndarray[Any, np.dtype[np.bool_]]
Picture = np.ndarray[Any, np.dtype[np.floating[Any]]]

UPDATED, READ, ABSENT = "updated", "read only", "absent"
FADED, GREYED = 0.82, 0.6
"""How far dropped patches go towards white, and patches that are only read towards grey."""
EACH = 2.6
"""Inches of a picture's side."""


@dataclass(frozen=True)
class Stretch:
    """Neighbouring layers, from `first` to `last`, in which the same happens to visual tokens that have entered."""

    first: int
    last: int
    state: str

    def __str__(self) -> str:
        layers = f"layer {self.first}" if self.first == self.last else f"layers {self.first}-{self.last}"
        return f"{layers}: {self.state}"


def stretches(policy: Policy) -> list[Stretch]:
    """What a policy does with visual tokens: they are updated (and read), only read, or absent.

    Raises:
        UnsupportedUsageError: not all visual tokens are treated alike, or some leave inside the decoder.
    """
    if policy.salient_fraction is not None or policy.ranking is not None:
        raise UnsupportedUsageError(
            "the policy tells visual tokens apart inside the decoder (salient_fraction or ranking); which patches a "
            "layer reads is drawn for policies that treat all that enter alike"
        )

    def state(layer: int) -> str:
        if policy.keeps("visual", layer, "mha_query") or policy.keeps("visual", layer, "mlp"):
            return UPDATED
        return READ if policy.keeps("visual", layer, "mha_key_value") else ABSENT

    found, layer = [], 0
    for name, group in itertools.groupby(map(state, range(policy.num_layers))):
        count = len(list(group))
        found.append(Stretch(layer, layer + count - 1, name))
        layer += count
    return found


@torch.no_grad()
def kept_patches(compiled: Any, inputs: Mapping[str, Any], tier: str | None = None) -> list[Patches]:
    """(height, width) of each picture, in tokens: which of them enter the decoder.

    Args:
        compiled: a compiled model.
        inputs: what its `forward` takes for a prompt of one row.
        tier: which tier; None: the default.

    Raises:
        UnsupportedUsageError: the model does not say which tokens are which patches, or a picture is cut into tiles.
        ValueError: more than one row.
    """
    if inputs["input_ids"].shape[0] != 1:
        raise ValueError(f"inputs: expected a prompt of one row, got {inputs['input_ids'].shape[0]}")
    noted = _Noting()
    session = Session(compiled.dop.check_tier(tier or compiled.dop_tier))
    session.streams.main.prompt_columns = inputs["input_ids"].shape[1]
    frame = Frame(compiled.dop, compiled, session, noted)
    given = {name: value for name, value in inputs.items() if name not in CALL_ARGUMENTS}
    frame.forward(**given, use_cache=True)
    call, columns = noted.call, noted.columns
    assert call is not None
    tokens = torch.zeros(inputs["input_ids"].shape[1], dtype=torch.bool)
    for mask in call.visual:
        tokens |= mask[0].reshape(len(tokens), -1).any(-1).cpu()
    entered = torch.ones_like(tokens)
    if columns is not None:
        entered = torch.zeros_like(tokens).index_fill(0, columns[0][columns[0] >= 0].cpu(), True)
    kept = entered[tokens]
    grids = [grid for features in call.vision for grid in _grids(features)]
    if sum(len(at) for at, _ in grids) != len(kept):
        raise UnsupportedUsageError(
            f"the pictures have {sum(len(at) for at, _ in grids)} patches, and the prompt holds {len(kept)} visual "
            "tokens: which of them are which is not known"
        )
    found, first = [], 0
    for at, shape in grids:
        patches = np.zeros(shape, dtype=bool)
        patches[np.unravel_index(at.numpy(), shape)] = kept[first : first + len(at)].numpy()
        found.append(patches)
        first += len(at)
    return found


class _Noting(Observer):
    """Notes the call, and which columns of the prompt entered the decoder; None where all did."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.columns: Tensor | None = None

    def vision_fields(self, policy: Policy) -> frozenset[str]:
        return (super().vision_fields(policy) or frozenset()) | {"tiles", "grid"}

    def decoder(self, decoder: Any, call: Call, arguments: dict[str, Any], run: Any) -> Any:
        self.call = call
        output = run()
        cache: Any = output[1] if isinstance(output, tuple) else output.past_key_values
        self.columns = cache.columns
        return output


def _grids(features: TokenFeatures) -> list[tuple[Tensor, tuple[int, int]]]:
    """Per picture the raster places of its tokens, in order, and its height and width in tokens."""
    if features.tiles is None:
        raise UnsupportedUsageError(
            f"which tokens are which patches is not known: {features.missing.get('tiles', 'the tower does not say')}"
        )
    found = []
    for tiles in features.tiles.split(list(features.sizes or (len(features.tiles),))):
        numbers = tiles.unique().tolist()
        shape = features.shapes[numbers[0]]
        if len(numbers) > 1 or shape is None or shape[0] * shape[1] != len(tiles):
            raise UnsupportedUsageError(
                "a picture is cut into tiles, or packed: kept patches are drawn for pictures that go through the "
                "vision tower as one"
            )
        found.append((torch.arange(len(tiles)), shape))
    return found


def kept_figure(pictures: Sequence[Picture], kept: Sequence[Patches], policy: Policy) -> Any:
    """A matplotlib figure: a row per picture, a panel per stretch of layers.

    Args:
        pictures: (height, width, 3) each, from 0 to 1, as the tower sees them.
        kept: see `kept_patches`.
        policy: whose stretches are drawn.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        UnsupportedUsageError: as `stretches`.
    """
    parts = stretches(policy)
    figure = new_figure(EACH * len(parts), (EACH + 0.5) * len(pictures))
    panels = figure.subplots(len(pictures), len(parts), squeeze=False)
    for row, picture, patches in zip(panels, pictures, kept, strict=True):
        for panel, part in zip(row, parts, strict=True):
            panel.imshow(_drawn(picture, patches, part.state))
            count = 0 if part.state == ABSENT else patches.sum()
            panel.set_title(f"{part}\n{count} of {patches.size} patches", fontsize=8)
            panel.set_axis_off()
    return figure


def _drawn(picture: Picture, patches: Patches, state: str) -> Picture:
    rows, columns = (
        np.arange(size) * count // size for size, count in zip(picture.shape[:2], patches.shape, strict=True)
    )
    there = patches[rows[:, None], columns[None, :]][..., None] & (state != ABSENT)
    shown = picture
    if state == READ:
        shown = (1 - GREYED) * picture + GREYED * picture.mean(axis=-1, keepdims=True)
    faded: Picture = np.where(there, shown, (1 - FADED) * picture.mean(axis=-1, keepdims=True) + FADED)
    return faded
