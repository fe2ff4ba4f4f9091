"""Which checkpoints can be served under a policy: vLLM's class for each, and what has to be known to shorten prompts.

Refused, by name of the reason: other architectures; other decoders; windows and layers that share keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dop_compile.errors import UnsupportedModelError

__all__ = ["FAMILIES", "PREFIX", "Family", "family_of"]

PREFIX = "Dop"
"""Before the names of architectures under which written directories are served."""

DECODERS = ("llama", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text")
"""Values of `text_config.model_type` whose layers are norm, attention, norm, MLP, each added to one residual stream."""


@dataclass(frozen=True)
class Family:
    """A checkpoint's architecture.

    Args:
        name: as papers call it.
        served: the class in `dop_compile.plugins.vllm.models` that serves it.
        axes: "line" where a token has one position, "grid" where it has one in time, height and width (M-RoPE).
        has_class_token: vision towers of this family may give the attention of [CLS], which some reducers need.
    """

    name: str
    served: str
    axes: Literal["line", "grid"]
    has_class_token: bool = False


FAMILIES: Mapping[str, Family] = {
    "LlavaForConditionalGeneration": Family("LLaVA-1.5", "DopLlava", "line", has_class_token=True),
    "LlavaNextForConditionalGeneration": Family("LLaVA-NeXT", "DopLlavaNext", "line"),
    "Qwen2VLForConditionalGeneration": Family("Qwen2-VL", "DopQwen2VL", "grid"),
    "Qwen2_5_VLForConditionalGeneration": Family("Qwen2.5-VL", "DopQwen2_5_VL", "grid"),
    "Qwen3VLForConditionalGeneration": Family("Qwen3-VL", "DopQwen3VL", "grid"),
    "InternVLForConditionalGeneration": Family("InternVL", "DopInternVL", "line"),
}

ELSEWHERE = {
    "InternVLChatModel": "its files are in the publisher's own format; take the checkpoint converted for transformers "
    "(its name ends in -hf), which policies are measured on too",
}
"""What to do about architectures that are near to known ones."""


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a checkpoint's `config.json`, once its decoder is known to be one that can be narrowed.

    Raises:
        UnsupportedModelError: it cannot be served under a policy; the message says why.
    """
    names = config.get("architectures") or ["none"]
    name = str(names[0]).removeprefix(PREFIX)
    if name not in FAMILIES:
        why = ELSEWHERE.get(name, f"expected one of {', '.join(FAMILIES)}")
        raise UnsupportedModelError(f"architectures: {name} cannot be served under a policy in vLLM: {why}")
    _check_decoder(name, config.get("text_config", config))
    return FAMILIES[name]


def _check_decoder(name: str, text: Mapping[str, Any]) -> None:
    kind = text.get("model_type")
    # Configurations of Qwen2-VL and Qwen2.5-VL saved by transformers 4 hold the decoder's fields at the top
    if kind not in DECODERS and str(kind) + "_text" not in DECODERS:
        raise UnsupportedModelError(
            f"{name}: text_config.model_type: a decoder of kind {kind!r} has not been tried in vLLM under a policy; "
            f"expected one of {', '.join(DECODERS)}"
        )
    others = sorted({str(t) for t in text.get("layer_types") or [] if t != "full_attention"})
    if others or text.get("use_sliding_window"):
        raise UnsupportedModelError(
            f"{name}: text_config: layers with {', '.join(others) or 'a sliding window'}; keys of pruned tokens are "
            "left out of the cache, where windows would count wrong. Only full attention can be served"
        )
