"""A compiled model decides which tokens are pruned by reading them, which a recorded call would do only once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dop_compile.errors import UnsupportedUsageError

__all__ = ["refuse_recording"]


def refuse_recording(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a call that torch.export, torch.jit.trace or torch.fx records.

    Raises:
        UnsupportedUsageError: it is such a call.
    """
    if torch.compiler.is_exporting():
        by = "torch.export (and what uses it, such as torch.onnx.export)"
    elif torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        by = "torch.jit.trace"
    elif any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
        by = "torch.fx"
    else:
        return
    raise UnsupportedUsageError(
        f"a compiled model cannot be recorded by {by}: which tokens are pruned is read from each prompt, and the "
        "record would keep those of one. Use export_onnx(compiled, ...), which writes graphs for any prompt, or record "
        "the original model"
    )
