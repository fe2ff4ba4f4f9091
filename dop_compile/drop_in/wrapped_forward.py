"""Forwards that others have wrapped, as `accelerator.prepare` does for mixed precision, on the instance.

1. The original's: accelerate's wrapper is a method bound to the model, and calls what it wraps with the same arguments.
   A call runs it with its private copy of the model as `self`.
2. The compiled model's: whatever is put around it. `generate` runs that, and where it reaches the compiled model's own
   forward, the forward of the running `generate`. Views of other tiers do the same with the wrappers of the model that
   they were made from.

Refused: any other forward on the original, which would run its decoder unpruned or change arguments unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from types import MethodType
from typing import Any

from torch import nn

from dop_compile.drop_in.no_export import refuse_recording
from dop_compile.drop_in.session import presented_as
from dop_compile.errors import UnsupportedUsageError
from dop_compile.hf.names import PASSING_ON, PREPARATION

__all__ = ["OwnForward", "check_unwrapped", "forget_preparation", "wrapped_forward"]


def wrapped_forward(model: nn.Module) -> Callable[..., Any] | None:
    """The forward of the model's class, with the wrappers that its instance has around it; None if it was replaced."""
    forward = vars(model).get("forward")
    if forward is None:
        own: Callable[..., Any] = type(model).forward
        return own
    if not isinstance(forward, MethodType) or forward.__self__ is not model:
        return None
    inner: Any = forward.__func__
    while _passes_on(inner):
        inner = getattr(inner, "__wrapped__", None)
    return forward.__func__ if _is_own(model, inner) else None


def _is_own(model: nn.Module, function: Any) -> bool:
    """Whether a function is the forward of the model's class, or what that decorates: accelerate unwraps to there."""
    own = type(model).forward
    while own is not function and hasattr(own, "__wrapped__"):
        own = own.__wrapped__
    return own is function


def _passes_on(wrapper: Any) -> bool:
    # By where it is written: functools.wraps copies the name of the module
    where = getattr(wrapper, "__globals__", {}).get("__name__", type(wrapper).__module__)
    return where in PASSING_ON


def check_unwrapped(model: Any, what: str) -> None:
    """UnsupportedUsageError for a model whose forward is wrapped, where its decoder alone is run."""
    if not _is_own(model, wrapped_forward(model)):
        raise UnsupportedUsageError(
            f"{what} runs parts of the model, without what accelerator.prepare put around its forward; unwrap it "
            "first: accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
        )


def forget_preparation(view: nn.Module) -> None:
    """A copy of a model that accelerate prepared was not prepared itself."""
    for name in PREPARATION:
        vars(view).pop(name, None)


class OwnForward:
    """The forward of a compiled model, which stays in use where others put something around it.

    Args:
        view: the compiled model; `presented` is to be its forward.
        function: a plain call.
        outer: the same of the compiled model that `view` is a view of.
    """

    def __init__(self, view: Any, function: Callable[..., Any], outer: OwnForward | None):
        self._view = view
        self._function = function
        self._outer = outer
        self._running: ContextVar[Callable[..., Any] | None] = ContextVar("running", default=None)
        self.presented = presented_as(type(view).forward, self._call)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        refuse_recording(args, kwargs)
        if args and args[0] is self._view:  # accelerate binds what it unwraps
            args = args[1:]
        running = self._running.get() or self._within_outer(self._function)
        return self._with(None, running, args, kwargs)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, within what was put around this forward."""
        function = self._within_outer(function)
        if self._view.forward is self.presented:
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            reached = False

            def inner(*args: Any, **kwargs: Any) -> Any:
                nonlocal reached
                reached = True
                return function(*args, **kwargs)

            cause: UnsupportedUsageError | None = None
            output = None
            try:
                output = self._with(inner, self._view.forward, args, kwargs)
            except UnsupportedUsageError as error:
                if reached:
                    raise
                cause = error
            if not reached:
                raise UnsupportedUsageError(
                    "the forward of the compiled model was replaced by one that does not call it, and generate would "
                    "not be pruned; call the compiled model's forward in it, or use a forward hook"
                ) from cause
            return output

        return presented_as(type(self._view).forward, call)

    def _within_outer(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function if self._outer is None else self._outer.around(function)

    def _with(self, running: Callable[..., Any] | None, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        token = self._running.set(running)
        try:
            return function(*args, **kwargs)
        finally:
            self._running.reset(token)
