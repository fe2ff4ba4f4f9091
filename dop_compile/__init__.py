"""Compile Hugging Face multimodal decoders that skip the operations a policy prunes."""

from dop_compile.compiler import dop_compile
from dop_compile.errors import PassError, UnsupportedModelError, UnsupportedUsageError
from dop_compile.fingerprint import model_fingerprint
from dop_compile.policy import Policy

__all__ = [
    "PassError",
    "Policy",
    "UnsupportedModelError",
    "UnsupportedUsageError",
    "dop_compile",
    "model_fingerprint",
]

__version__ = "0.1.0"
