"""Note what passes through a vision tower and its projector while Hugging Face's own code runs it.

The modules on the way to what is noted are private copies that share the original's parameters, hooks and children;
they stand in for the original during one call of `get_image_features` or `get_video_features`. The tower runs as it
always does, with its own attention implementation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dop_compile.hf.copies import own, own_forward, rebind, shallow_copy
from dop_compile.hf.names import ATTENTIONS, CLASS_TOKENS, PROJECTORS
from dop_compile.hf.private import maybe_install_capturing_hooks

__all__ = ["Observed", "Tower", "VisionModules", "observing"]

# What has to be known by name, because nothing else tells it


@dataclass(frozen=True)
class Tower:
    """A vision tower: paths of its layers and of the attention inside them, from the module that holds it."""

    path: str
    layers: str
    count: int
    attention: str
    has_class_token: bool

    def attention_path(self, layer: int) -> str:
        return f"{self.layers}.{layer}.{self.attention}"


@dataclass
class Observed:
    """What one call of a feature method has shown; empty lists where nothing passed.

    Attributes:
        projections: input, output and whether there were further arguments, of each call of the projector.
        attentions: per tower that ran, the tower, its attention module and its arguments.
        shuffled: per pixel shuffle, the numbers of the patches that it put together, (..., patches per token).
        packed: per packing of tiles, the number of the projector's row at each place, -1 for newlines and None where
            rows were mixed.
        unrecorded: "projector" and "tower", where what was noted passed while no gradients were recorded.
    """

    projections: list[tuple[Tensor, Tensor, bool]] = field(default_factory=list)
    attentions: list[tuple[Tower, nn.Module, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    shuffled: list[Tensor] = field(default_factory=list)
    packed: list[Tensor | None] = field(default_factory=list)
    unrecorded: set[str] = field(default_factory=set)

    def note_mode(self, part: str) -> None:
        if not torch.is_grad_enabled():
            self.unrecorded.add(part)


class VisionModules:
    """The module that holds vision tower, projector and decoder, and where the first two are in it.

    They are looked for when they are asked for: most reducers ask for neither.

    Args:
        owner: the module.
        decoder: the name of the child that is, or holds, the text decoder.
    """

    def __init__(self, owner: nn.Module, decoder: str):
        self.owner = owner
        self._decoder = decoder

    @cached_property
    def projector(self) -> str | None:
        """Its path."""
        return _find_projector(self.owner, self._decoder)

    @cached_property
    def towers(self) -> tuple[Tower, ...]:
        return tuple(_find_towers(self.owner, self._decoder))


def _find_projector(owner: nn.Module, decoder: str) -> str | None:
    """Path of the projector inside the module that holds vision tower and decoder."""
    paths = [path for path, _ in owner.named_modules() if path and path.split(".")[0] != decoder]
    found = [path for name in PROJECTORS for path in paths if path.split(".")[-1] == name]
    return found[0] if found else None


def _find_towers(owner: nn.Module, decoder: str) -> list[Tower]:
    """Every child but the decoder that holds a list of layers with attention; of several lists, the longest."""
    towers = []
    for child, module in owner.named_children():
        if child == decoder:
            continue
        stacks = [
            (len(layers), f"{child}.{path}" if path else child, name)
            for path, layers in module.named_modules()
            if isinstance(layers, nn.ModuleList) and len(layers)
            for name in ATTENTIONS
            if isinstance(getattr(layers[0], name, None), nn.Module)
        ]
        if stacks:
            count, layers, attention = max(stacks, key=lambda stack: stack[0])
            with_class = any(name.split(".")[-1] in CLASS_TOKENS for name, _ in module.named_parameters())
            towers.append(Tower(child, layers, count, attention, with_class))
    return towers


@contextmanager
def observing(modules: VisionModules, attentions: dict[Tower, int]) -> Iterator[Observed]:
    """Note what passes while the block runs.

    Args:
        modules: their owner is a private copy with children of its own.
        attentions: layer of each tower whose attention is noted.
    """
    observed, owner = Observed(), modules.owner
    before, attributes = dict(owner._modules), dict(vars(owner))
    made: dict[str, tuple[nn.Module, nn.Module]] = {}
    try:
        if modules.projector is not None:
            leaf = _private(owner, modules.projector, made)
            leaf.forward = _noting_projector(leaf, observed)
        for tower, layer in attentions.items():
            leaf = _private(owner, tower.attention_path(layer), made)
            leaf.forward = _noting_attention(tower, leaf, observed)
        for module in (owner, *(copy for _, copy in made.values())):
            if (shuffle := getattr(module, "pixel_shuffle", None)) is not None:
                vars(module)["pixel_shuffle"] = _noting_shuffle(shuffle, observed)
        if (pack := getattr(owner, "pack_image_features", None)) is not None:
            vars(owner)["pack_image_features"] = _noting_packing(pack, observed)
        yield observed
    finally:
        owner._modules.clear()
        owner._modules.update(before)
        vars(owner).clear()
        vars(owner).update(attributes)


def _private(owner: nn.Module, path: str, made: dict[str, tuple[nn.Module, nn.Module]]) -> Any:
    """A copy of the module at `path`, with copies of all modules on the way to it put in their places."""
    parent, names = owner, path.split(".")
    for number, name in enumerate(names):
        here = ".".join(names[: number + 1])
        if here not in made:
            original = parent._modules[name]
            assert original is not None
            _install_recorders(original)
            made[here] = (original, shallow_copy(original, own_children=True))
            parent._modules[name] = made[here][1]
        parent = made[here][1]
    stands_for = {id(original): copy for original, copy in made.values()}
    for _, copy in made.values():
        rebind(copy, stands_for)
    return parent


def _install_recorders(module: nn.Module) -> None:
    """Let Hugging Face put the hooks by which it records hidden states on the original.

    It does so on first use and marks the module; on a copy, whose hooks are the original's, it would do so each time.
    """
    if isinstance(module, PreTrainedModel):
        maybe_install_capturing_hooks(module)


def _noting_projector(module: nn.Module, observed: Observed) -> Callable[..., Any]:
    plain = own_forward(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        observed.note_mode("projector")
        output = plain(*args, **kwargs)
        given = (*args, *kwargs.values())
        observed.projections.append((given[0], output, len(given) > 1))
        return output

    return own(forward)


def _noting_attention(tower: Tower, module: nn.Module, observed: Observed) -> Callable[..., Any]:
    plain = own_forward(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        observed.note_mode("tower")
        observed.attentions.append((tower, module, args, kwargs))
        return plain(*args, **kwargs)

    forward.plain = plain  # type: ignore[attr-defined]
    return own(forward)


def _noting_shuffle(shuffle: Callable[..., Any], observed: Observed) -> Callable[..., Any]:
    def pixel_shuffle(features: Tensor, *args: Any, **kwargs: Any) -> Any:
        spatial = features.shape[:-1]
        numbers = torch.arange(spatial.numel(), device="cpu").view(*spatial, 1)
        observed.shuffled.append(shuffle(numbers, *args, **kwargs))
        return shuffle(features, *args, **kwargs)

    return pixel_shuffle


def _noting_packing(original: Callable[..., Any], observed: Observed) -> Callable[..., Any]:
    def pack_image_features(image_features: Any, *args: Any, **kwargs: Any) -> Any:
        # The same packing of row numbers, in a dtype that models may interpolate in
        numbers: list[Tensor] = []
        first = 0
        for tiles in image_features:
            count = tiles.shape[:-1].numel()
            rows = torch.arange(first, first + count, dtype=torch.float64, device="cpu")
            numbers.append(rows.view(*tiles.shape[:-1], 1))
            first += count
        own = inspect.signature(original).bind(numbers, *args, **kwargs).arguments
        if own.get("image_newline") is not None:
            own["image_newline"] = torch.full((1,), -1.0, dtype=torch.float64, device="cpu")
        packed = torch.cat([rows.flatten() for rows in original(**own)[0]])
        observed.packed.append(packed.long() if bool((packed == packed.round()).all()) else None)
        return original(image_features, *args, **kwargs)

    return pack_image_features
