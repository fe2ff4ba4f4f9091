"""The path from a model to its text decoder.

The modules on the path are the only ones that a compiled model has of its own; all others are the original's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dop_compile.errors import UnsupportedModelError, UnsupportedUsageError
from dop_compile.hf.copies import own, shallow_copy
from dop_compile.hf.names import PLACEHOLDER_IDS

__all__ = [
    "block_path",
    "decoder_path",
    "find_layers",
    "path_modules",
    "placeholder_ids",
    "unblocked",
]


def decoder_path(model: PreTrainedModel) -> str:
    """Path of the text decoder inside a model: the innermost part that holds all layers of the text configuration.

    Raises:
        TypeError: not a model with a decoder inside.
    """
    if hasattr(model, "get_base_model"):
        raise TypeError(
            f"{type(model).__name__} is peft's wrapper around a model; pass model.get_base_model(), whose layers hold "
            "the adapters (soft prompts, which the wrapper itself holds, are not supported)"
        )
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise TypeError(
            f"dop_compile needs a Hugging Face model that can generate (such as LlavaForConditionalGeneration or "
            f"LlamaForCausalLM), got {type(model).__name__}"
        )
    if model.config.is_encoder_decoder:
        raise TypeError(f"{type(model).__name__} is an encoder-decoder model; only decoder-only models can be pruned")
    text = model.config.get_text_config(decoder=True)
    found = [
        path
        for path, module in model.named_modules()
        if path
        and isinstance(module, PreTrainedModel)
        and getattr(module.config, "num_hidden_layers", None) == text.num_hidden_layers
        and type(module.config) is type(text)
        and any(isinstance(m, nn.ModuleList) and len(m) == text.num_hidden_layers for m in module.modules())
    ]
    if not found:
        raise TypeError(
            f"no text decoder with {text.num_hidden_layers} layers was found inside {type(model).__name__}; pass the "
            "model with its language modelling head, as AutoModelForImageTextToText or AutoModelForCausalLM loads it"
        )
    return str(found[-1])


def placeholder_ids(config: Any) -> list[int]:
    """Ids of image and video placeholders that a configuration names."""
    return [value for name in PLACEHOLDER_IDS if isinstance(value := getattr(config, name, None), int)]


def path_modules(root: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The modules from `root` (named "") down to `path`, by name."""
    names = path.split(".")
    paths = [".".join(names[:number]) for number in range(len(names) + 1)]
    return [(name, root.get_submodule(name)) for name in paths]


def _use_compiled_model(name: str, kind: type) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedUsageError(
            f"{name} ({kind.__name__}) of a compiled model cannot be called by itself; call the compiled model, or "
            "this part of the original model"
        )

    return forward


def block_path(chain: list[Any], path: str) -> None:
    """Let the copies inside a compiled model refuse to be called: they would run the original's decoder, unpruned."""
    names = path.split(".")
    for number, module in enumerate(chain[1:], start=1):
        module.forward = own(_use_compiled_model(".".join(names[:number]), type(module)))


def unblocked(module: nn.Module) -> Any:
    """A shallow copy of a module of a compiled model, with the forward of its class."""
    copy = shallow_copy(module, own_children=False)
    vars(copy).pop("forward", None)
    return copy


def find_layers(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's list of layers and its path, by structure: the first list as long as the configuration says."""
    count = getattr(decoder.config, "num_hidden_layers", None)
    for path, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise UnsupportedModelError(
        f"{type(decoder).__name__} has no list of {count} layers; dop_compile needs a decoder whose layers stand in "
        "one nn.ModuleList"
    )
