"""Compile Hugging Face multimodal decoders that skip the operations a policy prunes."""

from typing import TYPE_CHECKING, Any

from dop_compile.compiler import dop_compile
from dop_compile.errors import PassError, UnsupportedModelError, UnsupportedUsageError
from dop_compile.hf.fingerprint import model_fingerprint
from dop_compile.loading import from_pretrained
from dop_compile.policy.costs import prefill_flops
from dop_compile.policy.policy import Policy
from dop_compile.policy.tiers import load_policies, push_policies, save_policies
from dop_compile.reports.explain import Explanation, executed_flops, explain

if TYPE_CHECKING:
    from dop_compile.onnx.export.export import export_onnx

__all__ = [
    "Explanation",
    "PassError",
    "Policy",
    "UnsupportedModelError",
    "UnsupportedUsageError",
    "dop_compile",
    "executed_flops",
    "explain",
    "export_onnx",
    "from_pretrained",
    "load_policies",
    "model_fingerprint",
    "prefill_flops",
    "push_policies",
    "save_policies",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "export_onnx":  # imported late: it needs the packages of the extra "onnx"
        from dop_compile import onnx

        return onnx.export_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
