"""The path from a model to its text decoder: found, copied, and kept in step with the original.

The modules on the path are the only ones that a compiled model has of its own; all others are the original's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dop_compile.drop_in.wrapped_forward import wrapped_forward
from dop_compile.errors import UnsupportedUsageError

__all__ = [
    "OriginalFollower",
    "block_path",
    "copy_path",
    "decoder_path",
    "path_modules",
    "placeholder_ids",
    "shallow_copy",
    "unblocked",
]

PLACEHOLDER_IDS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
"""Where configurations name placeholder ids, for models that cannot say themselves which positions are visual."""


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


def path_modules(root: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The modules from `root` (named "") down to `path`, by name."""
    names = path.split(".")
    paths = [".".join(names[:number]) for number in range(len(names) + 1)]
    return [(name, root.get_submodule(name)) for name in paths]


class OriginalFollower:
    """Hands on what the user replaces on the original: `model.lm_head = x` is for the compiled model as well.

    Args:
        original: the user's model.
        copies: its path modules' copies, from `copy_path`.
        path: the decoder's path.
    """

    def __init__(self, original: nn.Module, copies: list[Any], path: str):
        self._names = path.split(".")
        originals = [module for _, module in path_modules(original, path)]
        self._pairs = list(zip(originals, copies, strict=True))
        self._known = [dict(module._modules) for module in originals]
        self._lock = threading.Lock()

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self._pairs[0][0]

    @property
    def forward(self) -> Callable[..., Any]:
        """Its forward, which takes it or a copy of it first, with what accelerate put around it."""
        forward = wrapped_forward(self.model)
        assert forward is not None, "checked by update"
        return forward

    def update(self) -> None:
        """Adopt children replaced, and a change of training mode, since the last call.

        Raises:
            UnsupportedUsageError: the decoder or a module around it was replaced, or got another forward; the weights
                were moved to the meta device.
        """
        for number, (module, copy) in enumerate(self._pairs):
            if "forward" in vars(module) and (number or wrapped_forward(module) is None):
                raise UnsupportedUsageError(
                    f"the forward of {self._name(number)} was replaced on the original model after dop_compile; a "
                    "compiled model cannot follow that: put it back, or use a forward hook"
                )
            copy.training = module.training
        if next(self._pairs[0][0].parameters()).device.type == "meta":
            raise UnsupportedUsageError(
                "the model's weights are on the meta device and hold no values; load them first"
            )
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
                            f"{self._name(number + 1)} was replaced on the original model after "
                            "dop_compile; compile the model again"
                        )
                    if name in module._modules:
                        copy._modules[name] = module._modules[name]
                    else:
                        del copy._modules[name]
                self._known[number] = dict(module._modules)

    def train(self, mode: bool = True) -> None:
        """Switch the original, and with it the compiled model, to training or back."""
        self._pairs[0][0].train(mode)
        self.update()

    def _name(self, number: int) -> str:
        return ".".join(self._names[:number]) or type(self._pairs[0][0]).__name__


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
        module.forward = _use_compiled_model(".".join(names[:number]), type(module))


def unblocked(module: nn.Module) -> Any:
    """A shallow copy of a module of a compiled model, with the forward of its class."""
    copy = shallow_copy(module, own_children=False)
    vars(copy).pop("forward", None)
    return copy
