"""The path from a model to its text decoder: found, copied, and kept in step with the original.

The modules on the path are the only ones that a compiled model has of its own; all others are the original's.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dop_compile.errors import UnsupportedUsageError

__all__ = ["OriginalFollower", "copy_path", "decoder_path", "placeholder_ids", "shallow_copy"]

PLACEHOLDER_IDS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
"""Where configurations name placeholder ids, for models that cannot say themselves which positions are visual."""


def decoder_path(model: PreTrainedModel) -> str:
    """Path of the text decoder inside a model: the innermost part that holds all layers of the text configuration.

    Raises:
        TypeError: not a model with a decoder inside.
    """
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


def shallow_copy(module: nn.Module, *, own_children: bool) -> Any:
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    if own_children:
        copy.__dict__["_modules"] = dict(module._modules)
    return copy


def copy_path(root: nn.Module, path: str) -> list[Any]:
    """Shallow copies of the modules from `root` down to `path`, linked to each other."""
    chain = [shallow_copy(root, own_children=True)]
    for name in path.split("."):
        child = shallow_copy(chain[-1]._modules[name], own_children=True)
        chain[-1]._modules[name] = child
        chain.append(child)
    return chain


class OriginalFollower:
    """Hands on what the user replaces on the original: `model.lm_head = x` is for the compiled model as well.

    Args:
        original: the user's model.
        copies: its path modules' copies, from `copy_path`.
        path: the decoder's path.
    """

    def __init__(self, original: nn.Module, copies: list[Any], path: str):
        self._names = path.split(".")
        originals = [original]
        for name in self._names:
            originals.append(originals[-1].get_submodule(name))
        self._pairs = list(zip(originals, copies, strict=True))
        self._known = [dict(module._modules) for module in originals]
        self._lock = threading.Lock()

    def update(self) -> None:
        """Adopt children replaced since the last call.

        Raises:
            UnsupportedUsageError: the decoder, or a module around it, was replaced.
        """
        if all(known == module._modules for known, (module, _) in zip(self._known, self._pairs, strict=True)):
            return
        with self._lock:
            for number, (module, copy) in enumerate(self._pairs):
                known = self._known[number]
                for name in {**known, **module._modules}:
                    if name in known and name in module._modules and known[name] is module._modules[name]:
                        continue
                    if name in self._names[number : number + 1]:
                        raise UnsupportedUsageError(
                            f"{'.'.join(self._names[: number + 1])} was replaced on the original model after "
                            "dop_compile; compile the model again"
                        )
                    if name in module._modules:
                        copy._modules[name] = module._modules[name]
                    else:
                        del copy._modules[name]
                self._known[number] = dict(module._modules)
