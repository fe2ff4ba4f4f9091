"""What compiled programs take for granted of a decoder's modules, and whether it still holds."""

from __future__ import annotations

import functools
import operator
import types
from typing import Any

from dop_compile.errors import UnsupportedUsageError
from dop_compile.hf.copies import is_own
from dop_compile.runtime.direct import HOOKS, TORCH_ATTRIBUTES

__all__ = ["Structure"]

_ROUTINES = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)


class Structure:
    """The modules of a decoder as they are now: children, attributes, hooks, forwards, attention, kind of weights.

    Attributes are numbers, functions and the like that are set on modules; what changes inside of one is not seen.

    It is compared in every call, of some hundreds of modules: so column by column, which takes a third of the time
    that module by module does.

    Raises:
        UnsupportedUsageError: the decoder is trained with gradient checkpointing.
    """

    def __init__(self, decoder: Any):
        self._decoder = decoder
        self._check_training()
        self._modules = [vars(module) for module in decoder.modules()]
        self._parents = [attributes for attributes in self._modules if attributes["_modules"]]
        self._watched = [
            (attributes, name) for attributes in self._modules for name in attributes.keys() - TORCH_ATTRIBUTES
        ]
        self._values = [attributes[name] for attributes, name in self._watched]
        self._known = self._now()

    def holds(self) -> bool:
        """Whether nothing has changed since.

        Raises:
            UnsupportedUsageError: the decoder is trained with gradient checkpointing.
        """
        self._check_training()
        return self._known == self._now() and self._same_attributes()

    def _same_attributes(self) -> bool:
        try:
            now = [attributes[name] for attributes, name in self._watched]
        except KeyError:
            return False
        return all(map(operator.is_, now, self._values))

    def _check_training(self) -> None:
        decoder = self._decoder
        if decoder.training and any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules()):
            raise UnsupportedUsageError(
                "gradient checkpointing is not supported by a compiled model; call gradient_checkpointing_disable(), "
                "or eval() for inference"
            )

    def _now(self) -> tuple[Any, ...]:
        """Equal if modules, functions and hooks are the same ones."""
        decoder, modules = self._decoder, self._modules
        weight = next(decoder.parameters())
        patches = tuple(value for value in vars(decoder).values() if isinstance(value, _ROUTINES) and not is_own(value))
        return (
            (patches, decoder.config._attn_implementation, weight.dtype, weight.device),
            sum([len(attributes["_modules"]) for attributes in modules]),
            [[*attributes["_modules"].values()] for attributes in self._parents],
            [attributes["training"] for attributes in modules],
            ["forward" in attributes for attributes in modules],
            [_hooks(name, modules) for name in HOOKS],
        )


def _hooks(name: str, modules: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """The hooks of each module, by their numbers; nothing where no module has any."""
    found = [attributes[name] for attributes in modules]
    return [tuple(hooks) for hooks in found] if any(found) else []
