"""What every part is told, and the decoders with random weights that they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from prefill import GEOMETRIES, Geometry, policies
from transformers import LlamaConfig, LlamaForCausalLM

from dop_compile import Policy, prefill_flops
from gpu.store import Store
from gpu.timing import Clock

__all__ = ["Decoder", "Setting", "counts", "eq11", "geometry"]

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Args:
    tiny: sizes that a processor measures in seconds, to try the scripts.
    """

    device: torch.device
    tiny: bool
    rounds: int
    clock: Clock
    store: Store

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def compiler(self) -> str:
        """The backend of torch.compile; in the tiny setting one that generates no code."""
        return "aot_eager" if self.tiny else "inductor"


def geometry(setting: Setting, name: str) -> Geometry:
    """One of the published ones, or a sixteenth of its tokens in four small layers."""
    full = GEOMETRIES[name]
    if not setting.tiny:
        return full
    fewer = {tier: (mha, mlp, max(1, tokens // 16)) for tier, (mha, mlp, tokens) in full.published.items()}
    return dataclasses.replace(full, config=TINY, system=4, visual=full.visual // 16, text=7, published=fewer)


def counts(shape: Geometry) -> dict[str, int]:
    return {"system": shape.system, "visual": shape.visual, "text": shape.text}


def eq11(config: Any, policy: Policy, tokens: dict[str, int]) -> float:
    """FLOPs as a share of the original's."""
    full = prefill_flops(config, Policy.full(policy.num_layers), **tokens)
    return float(prefill_flops(config, policy, **tokens) / full)


class Decoder:
    """A Llama of a geometry, prompts for it, and calls that do one prefill or one `generate`."""

    def __init__(self, setting: Setting, shape: Geometry, vocabulary: int = 32000):
        self.shape, self.device = shape, setting.device
        sizes: dict[str, Any] = dict(shape.config)
        config = LlamaConfig(**sizes, vocab_size=vocabulary, max_position_embeddings=8192)
        kind: Any = LlamaForCausalLM
        torch.manual_seed(0)
        with torch.device(setting.device):
            self.model = kind._from_config(config, attn_implementation="sdpa", dtype=setting.dtype).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.policies = policies(shape)

    def prompt(self, batch: int) -> dict[str, torch.Tensor]:
        shape = self.shape
        tokens = shape.system + shape.visual + shape.text
        drawn = torch.randint(1, self.model.config.vocab_size, (batch, tokens), generator=torch.Generator())
        groups = torch.zeros(batch, tokens, dtype=torch.long)
        groups[:, : shape.system] = 2
        groups[:, shape.system : shape.system + shape.visual] = 1
        return {"input_ids": drawn.to(self.device), "token_groups": groups.to(self.device)}

    def share(self, tier: str) -> float | None:
        """Eq. 11 FLOPs of a tier, of the original's."""
        if tier not in self.policies:
            return None
        return eq11(self.model.config, self.policies[tier], counts(self.shape))

    def prefill(self, model: Any, batch: int, tier: str | None = None) -> Callable[[], Any]:
        """A prefill and the logits of its last row; `tier` None: `model` is an original."""
        given: dict[str, Any] = self.prompt(batch)
        if tier is None:
            del given["token_groups"]
        else:
            given["tier"] = tier
        return lambda: model(**given, use_cache=True, logits_to_keep=1)

    def generate(self, model: Any, batch: int, tier: str | None = None, **settings: Any) -> Callable[[int], Any]:
        given: dict[str, Any] = {**self.prompt(batch), **settings}
        if tier is None:
            del given["token_groups"]
        else:
            given["tier"] = tier
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        return lambda count: model.generate(**given, max_new_tokens=count, min_new_tokens=count, do_sample=False)
