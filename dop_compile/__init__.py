"""Compile Hugging Face multimodal decoders that skip the operations a policy prunes.

Every name is imported when it is first used: `from dop_compile import Policy` needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dop_compile.version import VERSION

if TYPE_CHECKING:
    from dop_compile.compiler import dop_compile
    from dop_compile.drop_in.typed import CompiledModel
    from dop_compile.drop_in.warmup import Warmup
    from dop_compile.errors import PassError, UnsupportedModelError, UnsupportedUsageError
    from dop_compile.hf.fingerprint import model_fingerprint
    from dop_compile.loading import from_pretrained
    from dop_compile.onnx.export.export import export_onnx
    from dop_compile.policy import Policy
    from dop_compile.policy.costs import prefill_flops
    from dop_compile.policy.tiers import load_policies, push_policies, save_policies
    from dop_compile.reports.explain import Explanation, executed_flops, explain

__all__ = [
    "CompiledModel",
    "Explanation",
    "PassError",
    "Policy",
    "UnsupportedModelError",
    "UnsupportedUsageError",
    "Warmup",
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

__version__ = VERSION

_HOMES = {
    "CompiledModel": "drop_in.typed",
    "Explanation": "reports.explain",
    "PassError": "errors",
    "Policy": "policy",
    "UnsupportedModelError": "errors",
    "UnsupportedUsageError": "errors",
    "Warmup": "drop_in.warmup",
    "dop_compile": "compiler",
    "executed_flops": "reports.explain",
    "explain": "reports.explain",
    "export_onnx": "onnx",
    "from_pretrained": "loading",
    "load_policies": "policy.tiers",
    "model_fingerprint": "hf.fingerprint",
    "prefill_flops": "policy.costs",
    "push_policies": "policy.tiers",
    "save_policies": "policy.tiers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
