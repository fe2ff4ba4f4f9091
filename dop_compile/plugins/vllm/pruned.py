"""What vLLM's multimodal models have in common under a policy: mixed in before a model's class of vLLM's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dop_compile.errors import UnsupportedUsageError
from dop_compile.plugins.vllm.backends import without_prefix_flag
from dop_compile.plugins.vllm.decoder import PrunedDecoder
from dop_compile.plugins.vllm.engine import check_backend, check_engine
from dop_compile.plugins.vllm.internals import check_internals
from dop_compile.plugins.vllm.positions import Placed, columns, pack, unpack
from dop_compile.plugins.vllm.processors import SHARE
from dop_compile.plugins.vllm.roles import Roles
from dop_compile.plugins.vllm.section import Section
from dop_compile.plugins.vllm.selection import Selector
from dop_compile.plugins.vllm.shares import Share

__all__ = ["Pruned"]


class Pruned:
    """A multimodal model whose decoder is `language_model.model`."""

    supports_mrope: ClassVar[bool] = True
    axes: ClassVar[str] = "line"
    """As in `Family`: on a line three equal rows are one, which is also how vLLM compiles such a decoder."""
    language_model: Any
    config: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_internals()
        model_config = vllm_config.model_config
        policy = Section.from_config(vars(model_config.hf_config)).policy
        check_engine(vllm_config, policy)
        with without_prefix_flag(model_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        decoder = self.language_model.model
        policy.check_layers(len(decoder.layers))
        for layer in decoder.layers:
            check_backend(layer.self_attn.attn)
        self._decoder = PrunedDecoder(decoder, Roles.of(policy))
        self._selector = None if policy.visual_tokens is None else Selector(policy)
        self._moved: tuple[Tensor, Tensor] | None = None  # rows of the coming step, and by how much they stand later
        self._prepare()

    def _prepare(self) -> None:
        """What a class needs besides, once it is made."""
        if self._selector is not None and self._selector.needs_attention:
            raise UnsupportedUsageError(f"reducer: {type(self).__name__} does not give the attention of [CLS]")

    def _renamed(self, name: str) -> str:
        """A weight's name in the checkpoint, as vLLM's class knows it."""
        return name

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        renamed = ((self._renamed(name), weight) for name, weight in weights)
        loaded: set[str] = super().load_weights(renamed)  # type: ignore[misc]
        self._decoder.take_weights()
        return loaded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """(rows, hidden) of the step, as vLLM's classes return it."""
        own = self._own_positions(positions)
        return self._decoder(own, inputs_embeds, input_ids=input_ids, intermediate_tensors=intermediate_tensors)

    # Fewer tokens

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """(kept, hidden) of each picture."""
        if self._selector is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        shares = [Share.from_tensor(numbers) for numbers in kwargs.pop(SHARE)]
        found, seen = self._encoded(kwargs)
        embeddings = []
        for number, (features, share) in enumerate(zip(found, shares, strict=True)):
            if not self._selector.reads_values:
                embeddings.append(features[self._selector.fixed(share).to(features.device)])
                continue
            before, attention = seen[number] if seen else (None, None)
            own = features[:, : self.config.get_text_config().hidden_size]  # without what goes into deeper layers
            kept = self._selector.choose(share, own, before, attention)
            embeddings.append(pack(features[kept], self._offsets(kept, number, kwargs)))
        return embeddings

    def _encoded(self, kwargs: dict[str, Any]) -> tuple[Sequence[Tensor], list[tuple[Tensor, Tensor]]]:
        """Embeddings of each picture, and what reducers may ask about it: features before the projector, attention."""
        return super().embed_multimodal(**kwargs), []  # type: ignore[misc]

    # Original positions

    def _offsets(self, kept: Tensor, number: int, kwargs: dict[str, Any]) -> Tensor:
        """(3, kept) positions of a picture's tokens from its first one's."""
        return kept.expand(3, -1)

    def _whole_positions(self, length: int, features: Sequence[Any]) -> Tensor:
        """(3, length) of a prompt before reduction."""
        return torch.arange(length).expand(3, -1)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """(3, tokens) positions of a prompt, and what to add to those of later tokens."""
        if self._selector is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc,no-any-return]
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        pictures = [self._placed(feature) for feature in features]
        own, firsts, length = columns(len(input_tokens), pictures)
        moved = [
            replace(feature, mm_position=replace(feature.mm_position, offset=first))
            for feature, first in zip(features, firsts, strict=True)
        ]
        whole = self._whole_positions(length, moved)
        positions, later = whole[:, own], int(whole.max()) + 1 - len(input_tokens)
        return positions, later

    def _placed(self, feature: Any) -> Placed:
        assert self._selector is not None
        at, share = feature.mm_position, Share.from_tensor(feature.data[SHARE].data)
        rows = torch.arange(at.length) if at.is_embed is None else at.is_embed.nonzero().flatten()
        kept = None if self._selector.reads_values else self._selector.fixed(share)
        return Placed(rows + at.offset, share.layout.tokens, kept)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """(rows, hidden) of the coming step; where its visual tokens stand is kept for it."""
        self._moved = None
        if self._selector is not None and self._selector.reads_values and multimodal_embeddings is not None:
            both = [unpack(packed) for packed in multimodal_embeddings]
            multimodal_embeddings = [features for features, _ in both]
            if both:
                assert is_multimodal is not None
                rows = is_multimodal.nonzero().flatten().to(input_ids.device)
                self._moved = rows, torch.cat([offsets for _, offsets in both], dim=1)
        embedded: Tensor = super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        return embedded

    def _own_positions(self, positions: Tensor) -> Tensor:
        """Those of the step, once it is known which tokens of its pictures entered."""
        if self._moved is not None:
            (rows, offsets), self._moved = self._moved, None
            positions = positions.index_add(1, rows, offsets.to(positions))
        return positions if self.axes == "grid" or positions.ndim == 1 else positions[0]
