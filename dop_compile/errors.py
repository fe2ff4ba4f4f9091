"""Typed errors: what a graph must be for the compiler to rewrite it, and where it is not."""

__all__ = ["PassError", "UnsupportedModelError", "UnsupportedUsageError"]


class UnsupportedModelError(TypeError):
    """The model's decoder cannot be traced or its blocks cannot be recognised."""


class UnsupportedUsageError(ValueError):
    """A call asks a compiled model for something that it does not do; the message says what to do instead."""


class PassError(RuntimeError):
    """A pass found a graph that it cannot rewrite, or left one that is not legal.

    Attributes:
        pass_name: the pass that failed.
        reason: what is wrong, without the place.
        node: name of the offending node, if there is one.
        layer: the layer it belongs to, if it belongs to one.
        finished: names of the passes that ran before it.
    """

    def __init__(
        self,
        pass_name: str,
        reason: str,
        *,
        node: str | None = None,
        layer: int | None = None,
        finished: tuple[str, ...] = (),
    ):
        self.pass_name = pass_name
        self.reason = reason
        self.node = node
        self.layer = layer
        self.finished = finished
        where = ("" if layer is None else f", layer {layer}") + (f", node {node!r}" if node else "")
        before = f" (after {', '.join(finished)})" if finished else ""
        super().__init__(f"pass {pass_name!r}{where}{before}: {reason}")
