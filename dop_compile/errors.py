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
        node: name of the offending node, if there is one.
        finished: names of the passes that ran before it.
    """

    def __init__(self, pass_name: str, message: str, *, node: str | None = None, finished: tuple[str, ...] = ()):
        self.pass_name = pass_name
        self.node = node
        self.finished = finished
        where = f" at node {node!r}" if node else ""
        before = f" (after {', '.join(finished)})" if finished else ""
        super().__init__(f"pass {pass_name!r}{where}{before}: {message}")
