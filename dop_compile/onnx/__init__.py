"""Export to ONNX: one prefill graph per budget tier, one decode graph, one copy of the weights.

`dop_compile.onnx.manifest` documents the directory and every graph's inputs and outputs.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Manifest", "export_onnx", "verify"]


def __getattr__(name: str) -> Any:
    if name == "Manifest":
        from dop_compile.onnx.manifest import Manifest

        return Manifest
    if name == "export_onnx":
        from dop_compile.onnx.export import export_onnx

        return export_onnx
    if name == "verify":
        from dop_compile.onnx.verify import verify

        return verify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
