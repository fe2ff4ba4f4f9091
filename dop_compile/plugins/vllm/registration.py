"""What vLLM calls in each of its processes: the entry point in the group `vllm.general_plugins`."""

from __future__ import annotations

from dop_compile.plugins.vllm.families import FAMILIES, PREFIX

__all__ = ["register"]

MODELS = "dop_compile.plugins.vllm.models"


def register() -> None:
    """Make the architectures of written directories known. Cheap, and nothing is changed for other models."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from dop_compile.plugins.vllm.engine import EngineSettings

    for architecture, family in FAMILIES.items():
        name = PREFIX + architecture
        ModelRegistry.register_model(name, f"{MODELS}:{family.served}")
        MODELS_CONFIG_MAP[name] = EngineSettings
