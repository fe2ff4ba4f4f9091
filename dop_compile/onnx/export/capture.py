"""What a model's forward does before its decoder runs, seen on example prompts.

The forward runs on private copies of the modules between the model and its decoder, whose own forward only notes what
it is called with. So the exported parts - embeddings, vision, positions - are checked against what the model itself
hands to its decoder.

Refused: decoders that are handed more than embeddings, positions and a padding mask (DeepStack features, masks built
outside, side inputs), and embeddings that are not those of text and visual features put together.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dop_compile.errors import UnsupportedModelError
from dop_compile.hf.copies import copy_path
from dop_compile.hf.model_path import decoder_path, placeholder_ids
from dop_compile.hf.names import UNUSED_ARGUMENTS
from dop_compile.hf.spellings import CACHE, EMBEDS, IDS, MASK, POSITIONS, canonical, spelled
from dop_compile.runtime.outer_masks import builds_masks

__all__ = ["MODALITIES", "Capture", "VisionCall", "capture_prompt", "features_of"]

MODALITIES = {"image": "get_image_features", "video": "get_video_features"}
_IGNORED = ("use_cache", CACHE, "return_dict", *UNUSED_ARGUMENTS)


@dataclass(frozen=True)
class VisionCall:
    """A call of the module's method that turns pixels into features.

    `path` is the module's inside the model; `features` (tokens, hidden) is what enters the decoder.
    """

    modality: str
    path: str
    kwargs: dict[str, Any]
    features: Tensor

    @property
    def pixels(self) -> str:
        """Name of the argument that holds pixels: the only floating point tensor.

        Raises:
            UnsupportedModelError: there is not exactly one.
        """
        names = [n for n, v in self.kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()]
        if len(names) != 1:
            raise UnsupportedModelError(
                f"{MODALITIES[self.modality]} takes {len(names)} floating point tensors ({', '.join(names)}); export "
                "to ONNX supports one"
            )
        return names[0]

    @property
    def constants(self) -> dict[str, Tensor]:
        """Integer tensors that describe the pixels: a vision graph is made for their values."""
        return {n: v for n, v in self.kwargs.items() if isinstance(v, Tensor) and n != self.pixels}


@dataclass
class Capture:
    """What one prompt became; `visual` maps modalities to (batch, tokens) masks."""

    embeds: Tensor = field(default_factory=lambda: torch.empty(0))
    positions: Tensor | None = None
    vision: list[VisionCall] = field(default_factory=list)
    newline: Tensor | None = None


class _Stop(Exception):
    """The decoder has been called."""


def features_of(result: Any) -> Tensor:
    """(tokens, hidden): what `get_image_features` returned, in whichever of its forms."""
    value = getattr(result, "pooler_output", result)
    if getattr(result, "deepstack_features", None) is not None:
        raise UnsupportedModelError(
            "the vision tower's features also enter later layers (DeepStack); export to ONNX does not support that"
        )
    if isinstance(value, tuple | list):
        if not all(isinstance(part, Tensor) for part in value):
            raise UnsupportedModelError(
                "the vision tower returns nested features; export to ONNX does not support that"
            )
        value = torch.cat([part.flatten(0, -2) for part in value])
    if not isinstance(value, Tensor):
        raise UnsupportedModelError(f"the vision tower returns a {type(value).__name__}, expected tensors")
    return value.flatten(0, -2)


def capture_prompt(model: Any, inputs: Mapping[str, Any]) -> Capture:
    """Run a model up to its decoder on a prompt, as a processor returns it (one row).

    Raises:
        UnsupportedModelError: the decoder gets what an exported graph cannot take.
    """
    path = decoder_path(model)
    chain = copy_path(model, path)
    names = ["", *(".".join(path.split(".")[: n + 1]) for n in range(len(path.split("."))))]
    found = Capture()
    taken: dict[str, Any] = {}

    def decoder(*args: Any, **kwargs: Any) -> Any:
        function = type(chain[-1]).forward
        bound = inspect.signature(function).bind(chain[-1], *args, **spelled(function, kwargs)).arguments
        taken.update(canonical(function, {**bound.pop("kwargs", {}), **bound}))
        raise _Stop

    chain[-1].forward = decoder
    innermost = {method: module for module in chain[:-1] for method in MODALITIES.values() if hasattr(module, method)}
    for name, module in zip(names[:-1], chain[:-1], strict=True):
        if builds_masks(module):
            raise UnsupportedModelError(
                f"{type(module).__name__} builds attention masks outside its decoder; export to ONNX does not support "
                "that"
            )
        for modality, method in MODALITIES.items():
            # The outermost model only hands the call on
            if innermost.get(method) is module:
                setattr(module, method, _noting(found, modality, name, getattr(module, method)))
        newline = getattr(module, "image_newline", None)
        if isinstance(newline, Tensor):
            found.newline = newline.detach()
    try:
        with torch.no_grad():
            type(model).forward(chain[0], **{n: v for n, v in inputs.items() if n != "answers"}, use_cache=False)
    except _Stop:
        pass
    taken = {n: v for n, v in taken.items() if v is not None and n not in (*_IGNORED, "self")}
    embeds, positions, mask = (taken.pop(n, None) for n in (EMBEDS, POSITIONS, MASK))
    if embeds is None and isinstance(ids := taken.pop(IDS, None), Tensor):
        embeds = chain[-1].get_input_embeddings()(ids)
    extra = [n for n, v in taken.items() if not isinstance(v, bool)]
    if embeds is None or extra or not (mask is None or isinstance(mask, Tensor)):
        what = ", ".join(extra) or "no embeddings or another mask"
        raise UnsupportedModelError(
            f"{type(model).__name__} hands its decoder {what}; export to ONNX supports embeddings, positions and a "
            "padding mask"
        )
    found.embeds, found.positions = embeds, positions
    _check_embeddings(model, inputs, found)
    return found


def _noting(found: Capture, modality: str, path: str, method: Any) -> Any:
    signature = inspect.signature(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        given = {**bound.pop("kwargs", {}), **bound}
        result = method(*args, **kwargs)
        features = features_of(result).detach()
        found.vision.append(VisionCall(modality, path, {n: v for n, v in given.items() if v is not None}, features))
        return result

    return call


def _check_embeddings(model: Any, inputs: Mapping[str, Any], found: Capture) -> None:
    """The decoder's embeddings are those of the ids, with features in the places of the placeholders."""
    ids = inputs["input_ids"]
    visual = torch.isin(ids, torch.tensor(placeholder_ids(model.config), device=ids.device))
    if not found.vision:
        visual = torch.zeros_like(visual)
    with torch.no_grad():
        expected = model.get_input_embeddings()(ids.masked_fill(visual, 0)).to(found.embeds)
    for modality in MODALITIES:
        features = [call.features for call in found.vision if call.modality == modality]
        if features:
            place = visual if len({c.modality for c in found.vision}) == 1 else ids == modality_id(model, modality)
            rows = torch.cat(features).to(expected)
            if int(place.sum()) != len(rows):
                raise UnsupportedModelError(
                    f"{int(place.sum())} placeholders for {len(rows)} features of {type(model).__name__}; export to "
                    "ONNX supports models whose placeholders are one per feature"
                )
            expected[place] = rows
    if not torch.equal(expected, found.embeds):
        raise UnsupportedModelError(
            f"{type(model).__name__} changes embeddings before its decoder; export to ONNX supports decoders whose "
            "input is embedded text with visual features in the places of placeholders"
        )


def modality_id(model: Any, modality: str) -> int | None:
    """The id of a modality's placeholder."""
    for name in (f"{modality}_token_id", f"{modality}_token_index"):
        if isinstance(value := getattr(model.config, name, None), int):
            return value
    return None
