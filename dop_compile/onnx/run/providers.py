"""Which of ONNX Runtime's providers runs here: tried, since a provider that is installed may find no device."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort

__all__ = ["CPU", "choose_provider"]

CPU = "CPUExecutionProvider"
FATAL, WARNING = 4, 2
"""Of ONNX Runtime's log severities, the highest and the default."""


def choose_provider(path: Path, providers: Sequence[str] | None) -> str:
    """The first provider that runs here; says so in one line on stderr where that is not the first of the list.

    Args:
        path: a small graph, to try with.
        providers: names in order of preference; None: CUDA where the installed package has it, else the processor.

    Raises:
        ValueError: an unknown provider, or none of them runs here.
    """
    if isinstance(providers, str):
        raise TypeError(f"providers: expected a list of names, got {providers!r}")
    available = ort.get_available_providers()
    if providers is None:
        providers = [name for name in ("CUDAExecutionProvider", CPU) if name in available]
    if unknown := [name for name in providers if name not in ort.get_all_providers()]:
        raise ValueError(f"providers: {unknown[0]!r} is no provider; available here are {', '.join(available)}")
    reasons = []
    for name in providers:
        if name not in available:
            reasons.append(f"{name} is not in the installed onnxruntime")
        elif not _starts(path, name):
            reasons.append(f"{name} does not start here (no such device, or its libraries are missing)")
        else:
            if reasons:
                print(f"{'; '.join(reasons)}: using {name}", file=sys.stderr)
            return name
    raise ValueError(f"providers: {'; '.join(reasons) or 'none is named'}; available here are {', '.join(available)}")


def _starts(path: Path, provider: str) -> bool:
    """Whether a session really gets the provider: ONNX Runtime goes on without, and logs a page."""
    if provider == CPU:
        return True
    options = ort.SessionOptions()
    options.log_severity_level = FATAL
    ort.set_default_logger_severity(FATAL)  # a failure to load a provider is logged outside of the session
    try:
        return provider in ort.InferenceSession(str(path), options, providers=[provider]).get_providers()
    except Exception:  # ONNX Runtime's own exceptions have no common class
        return False
    finally:
        ort.set_default_logger_severity(WARNING)
