"""Names of a LLaVA's weights as transformers 5 writes them, and as vLLM's class knows them."""

from __future__ import annotations

import re

__all__ = ["renamed"]

TOWER = re.compile(r"^(model\.)?vision_tower\.(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)")


def renamed(name: str) -> str:
    """CLIP's and SigLIP's parts stood in a `vision_model` before, and do in vLLM."""
    return TOWER.sub(r"\1vision_tower.vision_model.", name)
