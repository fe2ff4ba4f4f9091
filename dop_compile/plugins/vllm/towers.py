"""What reducers ask a CLIP tower for: the attention that [CLS] pays to each patch, and what the projector was given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce

from dop_compile.errors import UnsupportedUsageError

__all__ = ["ClassAttention"]


class ClassAttention:
    """Notes both while a LLaVA of vLLM's encodes pictures.

    Args:
        model: its tower is built up to the layer that the projector reads.

    Raises:
        UnsupportedUsageError: a tower without [CLS], or several layers.
    """

    def __init__(self, model: Any) -> None:
        tower: Any = getattr(model.vision_tower, "vision_model", None)
        if (
            not hasattr(getattr(tower, "embeddings", None), "class_embedding")
            or not isinstance(model.config.vision_feature_layer, int)
            or model.config.vision_feature_select_strategy != "default"
        ):
            raise UnsupportedUsageError(
                "reducer: it needs the attention of [CLS] in the one layer that the projector reads, which this vision "
                "tower does not give; use divprune"
            )
        self._attention = tower.encoder.layers[-1].self_attn
        self._projected: list[Tensor] = []
        self._given: list[Tensor] = []
        self._attention.qkv_proj.register_forward_hook(lambda _, __, output: self._projected.append(output[0]))
        model.multi_modal_projector.register_forward_pre_hook(lambda _, args: self._given.append(args[0]))

    def take(self) -> list[tuple[Tensor, Tensor]]:
        """(tokens, vision_hidden) and (tokens,) float32 of each picture since it was last asked."""
        features, projected = torch.cat(self._given), torch.cat(self._projected)
        self._given.clear()
        self._projected.clear()
        queries, keys, _ = projected.float().chunk(3, dim=-1)
        heads, size = self._attention.num_heads_per_partition, self._attention.head_dim
        keys = keys.unflatten(-1, (heads, size))
        first = queries[:, 0].unflatten(-1, (heads, size))
        weights = torch.einsum("phd,pthd->pht", first, keys).mul(self._attention.scale).softmax(-1).mean(1)
        if self._attention.tp_size > 1:  # each rank has some of the heads
            weights = tensor_model_parallel_all_reduce(weights) / self._attention.tp_size
        return list(zip(features, weights[:, 1:], strict=True))
