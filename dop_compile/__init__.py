"""Compile Hugging Face multimodal decoders that skip the operations a policy prunes."""

from dop_compile.compiler import dop_compile
from dop_compile.costs import prefill_flops
from dop_compile.errors import PassError, UnsupportedModelError, UnsupportedUsageError
from dop_compile.explain import Explanation, executed_flops, explain
from dop_compile.fingerprint import model_fingerprint
from dop_compile.policy import Policy

__all__ = [
    "Explanation",
    "PassError",
    "Policy",
    "UnsupportedModelError",
    "UnsupportedUsageError",
    "dop_compile",
    "executed_flops",
    "explain",
    "model_fingerprint",
    "prefill_flops",
]

__version__ = "0.1.0"
