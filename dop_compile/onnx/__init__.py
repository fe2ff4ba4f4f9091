"""Export to ONNX: one prefill graph per budget tier, one decode graph, one copy of the weights.

`dop_compile.onnx.contract.manifest` documents the directory and every graph's inputs and outputs. Names are imported
when they are first used: nothing here needs the ONNX packages before that.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dop_compile.onnx.check.verification import verify
    from dop_compile.onnx.contract.manifest import Manifest
    from dop_compile.onnx.deploy.triton import triton_repository
    from dop_compile.onnx.export.export import export_onnx
    from dop_compile.onnx.export.shapes import Shapes
    from dop_compile.onnx.run.pipeline import OnnxPipeline
    from dop_compile.onnx.run.sampling import Sampling

__all__ = [
    "Manifest",
    "OnnxPipeline",
    "Sampling",
    "Shapes",
    "export_onnx",
    "require_packages",
    "triton_repository",
    "verify",
]

_HOMES = {
    "Manifest": "dop_compile.onnx.contract.manifest",
    "OnnxPipeline": "dop_compile.onnx.run.pipeline",
    "Sampling": "dop_compile.onnx.run.sampling",
    "Shapes": "dop_compile.onnx.export.shapes",
    "export_onnx": "dop_compile.onnx.export.export",
    "triton_repository": "dop_compile.onnx.deploy.triton",
    "verify": "dop_compile.onnx.check.verification",
}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_packages() -> None:
    """ModuleNotFoundError, with what to do, where a package for ONNX is missing."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ModuleNotFoundError(f"{', '.join(missing)}: not installed; pip install dop_compile[onnx]")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_packages()
    return getattr(importlib.import_module(_HOMES[name]), name)
