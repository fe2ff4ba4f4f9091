"""What users set on a model after `dop_compile`, handed on to the compiled model, and from there to its tier views.

original path modules --> the compiled model's copies --> a view --> views made from it

Along each arrow a value goes on when it changes at the source, unless the copy was given one of its own meanwhile.
Children, plain attributes (`loss_function`, a patched `get_image_features`, ...), the fields of `generation_config`
and the training mode are followed; a replaced decoder, `forward` or `generate` is refused.
"""

from __future__ import annotations

import copy as copying
import operator
import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from dop_compile.drop_in.wrapped_forward import wrapped_forward
from dop_compile.errors import UnsupportedUsageError
from dop_compile.hf.copies import BOUND_CALLS, is_own, rebound
from dop_compile.hf.model_path import path_modules
from dop_compile.hf.names import CONVERSATION_ATTRIBUTES, PREPARATION

__all__ = ["OriginalFollower", "Views"]


_NOT_FOLLOWED = frozenset({"_modules", "training", "forward", *BOUND_CALLS, *CONVERSATION_ATTRIBUTES, *PREPARATION})
_MISSING = object()


class AttributeFollower:
    """Hands on attributes of one module to a shallow copy of it that was made just now."""

    def __init__(self, source: nn.Module, copy: nn.Module):
        self.source = source
        self._copy_ref = weakref.ref(copy)  # whose life does not hang on its being followed
        self._seen = self._attributes()
        self._values = list(vars(source).values())
        self._given = {name: vars(copy).get(name, _MISSING) for name in self._seen}
        settings = self._seen.get("generation_config")
        self._settings = None if settings is None else copying.deepcopy(vars(settings))

    @property
    def _copy(self) -> nn.Module:
        copy = self._copy_ref()
        assert copy is not None
        return copy

    def _attributes(self) -> dict[str, Any]:
        return {n: v for n, v in vars(self.source).items() if n not in _NOT_FOLLOWED and not is_own(v)}

    def update(self) -> None:
        """Hand on what has changed since the last time."""
        values = list(vars(self.source).values())
        if len(values) == len(self._values) and all(map(operator.is_, values, self._values)):  # most often
            self._follow_settings()
            return
        self._values = values
        now = self._attributes()
        for name in now.keys() | self._seen.keys():
            value = now.get(name, _MISSING)
            if value is self._seen.get(name, _MISSING):
                continue
            if vars(self._copy).get(name, _MISSING) is self._given.get(name, _MISSING):
                self._give(name, value)
        self._seen = now
        self._follow_settings()

    def _give(self, name: str, value: Any) -> None:
        if value is _MISSING:
            vars(self._copy).pop(name, None)
        elif name == "generation_config" and self._settings is not None:
            self._settings = copying.deepcopy(vars(value))
            vars(self._copy)[name] = copying.deepcopy(value)
        else:
            vars(self._copy)[name] = rebound(value, {id(self.source): self._copy})
        self._given[name] = vars(self._copy).get(name, _MISSING)

    def _follow_settings(self) -> None:
        """Fields of the generation configuration that were set in place."""
        source, copy = self._seen.get("generation_config"), vars(self._copy).get("generation_config")
        if source is copy or self._settings is None or copy is not self._given["generation_config"]:
            return
        fields = vars(source)
        if fields == self._settings:
            return
        for name in fields.keys() | self._settings.keys():
            if fields.get(name, _MISSING) != self._settings.get(name, _MISSING):
                setattr(copy, name, copying.deepcopy(fields.get(name)))
        self._settings = copying.deepcopy(fields)


class OriginalFollower:
    """Hands on what the user changes on the original: `model.lm_head = x` is for the compiled model as well.

    Args:
        original: the user's model.
        copies: its path modules' copies, from `copy_path`.
        path: the decoder's path.
    """

    def __init__(self, original: nn.Module, copies: list[Any], path: str):
        self._names = path.split(".")
        self.modules = [module for _, module in path_modules(original, path)]
        self._pairs = list(zip(self.modules, copies, strict=True))
        self._known = [dict(module._modules) for module in self.modules]
        self._attributes = [AttributeFollower(module, copy) for module, copy in self._pairs]
        self._blocks = [vars(copy).get("forward") for copy in copies]
        self._lock = threading.Lock()

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self.modules[0]

    @property
    def forward(self) -> Callable[..., Any]:
        """Its forward, which takes it or a copy of it first, with what accelerate put around it."""
        forward = wrapped_forward(self.model)
        assert forward is not None, "checked by update"
        return forward

    def update(self) -> None:
        """Adopt what was replaced, and a change of training mode, since the last call.

        Raises:
            UnsupportedUsageError: the decoder or a module around it was replaced, or got another forward; the weights
                were moved to the meta device.
        """
        for number, (module, copy) in enumerate(self._pairs):
            if number or wrapped_forward(module) is None:
                self._check_forward("original", number, vars(module).get("forward"), None)
            self._check_forward("compiled", number, vars(copy).get("forward"), self._blocks[number])
            copy.training = module.training
        if next(self.model.parameters()).device.type == "meta":
            raise UnsupportedUsageError(
                "the model's weights are on the meta device and hold no values; load them first"
            )
        with self._lock:
            for follower in self._attributes:
                follower.update()
        if all(known == module._modules for known, (module, _) in zip(self._known, self._pairs, strict=True)):
            return
        with self._lock:
            self._adopt_children()

    def _check_forward(self, whose: str, number: int, forward: Any, expected: Any) -> None:
        if forward is not expected:
            raise UnsupportedUsageError(
                f"the forward of {self._name(number)} was replaced on the {whose} model after dop_compile; a "
                "compiled model cannot follow that: put it back, or use a forward hook"
            )

    def _adopt_children(self) -> None:
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
        self.model.train(mode)
        self.update()

    def _name(self, number: int) -> str:
        return ".".join(self._names[:number]) or type(self.model).__name__

    def stands_for(self, chain: list[Any]) -> dict[int, nn.Module]:
        """Which module of a call's own path takes the place of the original's, and of the compiled model's, by `id`."""
        pairs = zip(self._pairs, chain, strict=True)
        return {id(module): new for both, new in pairs for module in both}


class Views:
    """The compiled model and its tier views, each of which follows the module that it was made from."""

    def __init__(self) -> None:
        self._sources: weakref.WeakKeyDictionary[nn.Module, AttributeFollower] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()

    def add(self, view: nn.Module, source: nn.Module) -> None:
        with self._lock:
            self._sources[view] = AttributeFollower(source, view)

    def update(self, view: nn.Module) -> None:
        """Hand on what has changed since the last time, from the view's source and before that from that one's."""
        with self._lock:
            follower = self._sources.get(view)
            if follower is not None:
                self.update(follower.source)
                follower.update()

    def stands_for(self, root: nn.Module) -> dict[int, nn.Module]:
        """The root of a call's own path takes the place of every view, by `id`."""
        with self._lock:
            return {id(view): root for view in self._sources}
