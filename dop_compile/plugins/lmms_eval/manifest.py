"""How lmms-eval learns of the model: what the entry point in the group `lmms_eval.models` is called for."""

from __future__ import annotations

from typing import Any

__all__ = ["manifest"]

CLASSES = "dop_compile.plugins.lmms_eval.models.dop_compile"


def manifest() -> Any:
    """An `lmms_eval.models.registry_v2.ModelManifest`: the chat model, and for `--force_simple` the simple one."""
    from lmms_eval.models.registry_v2 import ModelManifest  # this module is imported by those without lmms-eval, too

    return ModelManifest(
        model_id="dop_compile",
        simple_class_path=f"{CLASSES}.SimpleDopCompile",
        chat_class_path=f"{CLASSES}.DopCompile",
    )
