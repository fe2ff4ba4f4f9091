"""How relevant each visual token is to the text: two measures, for the reducers that ask for one.

1. `InstructionRelevance`: the cosine of a token's projected feature to the mean of the instruction's own token
   embeddings. Needs nothing but the model, and is the default, since Hugging Face checkpoints hold no CLIP text model.
2. `ClipRelevance`: minus the mean, over segments of the text, of the cosine of CLIP's patch and text embeddings. Minus,
   because CLIP's patches are least similar to a text where they show what it speaks of; it is what the published code
   of CDPruner and TRIM does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dop_compile.reducers.base import VisualContext
from dop_compile.reducers.numbers import cosine, wide
from dop_compile.transfer import to_device

__all__ = ["ClipRelevance", "InstructionRelevance", "Relevance", "check_relevance"]


class Relevance(Protocol):
    """Scores visual tokens by a text."""

    @property
    def requires(self) -> frozenset[str]:
        """Fields of the context that it reads."""
        ...

    def __call__(self, contexts: Sequence[VisualContext]) -> list[Tensor]:
        """(tokens,) float32 of each context; higher is more relevant."""
        ...


def check_relevance(reducer: str, value: object) -> None:
    """Refuse what does not measure relevance.

    Raises:
        TypeError: naming the reducer.
    """
    if not callable(value) or not isinstance(getattr(value, "requires", None), frozenset):
        raise TypeError(
            f"reducer {reducer!r}: relevance must be an InstructionRelevance or a ClipRelevance, not {value!r}; it is "
            "no option of a policy, but is given to the reducer that `register` makes known"
        )


def _check_text(contexts: Sequence[VisualContext]) -> None:
    for context in contexts:
        if not len(context.text):
            raise ValueError(
                f"relevance to the text needs a text, but sample {context.sample_index} has no token besides its "
                "images; choose a reducer that reads none, such as 'vispruner' or 'divprune'"
            )


@dataclass(frozen=True)
class InstructionRelevance:
    """Cosine to the mean embedding of the tokens behind the first visual token (of all text if there are none)."""

    requires = frozenset[str]()

    def __call__(self, contexts: Sequence[VisualContext]) -> list[Tensor]:
        _check_text(contexts)
        texts = [context.text[context.instruction] for context in contexts]
        dtype = wide(texts[0].device)
        (lengths,) = to_device([np.array([len(text) for text in texts])], texts[0].device)
        means = pad_sequence([text.to(dtype) for text in texts], batch_first=True).sum(dim=1) / lengths[:, None]
        return [cosine(context.projected, mean[None])[:, 0] for context, mean in zip(contexts, means, strict=True)]


@dataclass(frozen=True, eq=False)
class ClipRelevance:
    """Minus the mean cosine of CLIP patch and text embeddings.

    Args:
        model: a `CLIPModel` (or what has its `vision_model`, `visual_projection`, `text_model` and `text_projection`)
            whose vision tower is the one that the vision-language model has.
        tokenizer: its tokenizer. A text longer than it takes is divided into segments.
        decode: token ids of the vision-language model (n_text,) to text, for example
            `lambda ids: processor.tokenizer.decode(ids, skip_special_tokens=True)`.
    """

    model: Any
    tokenizer: Any
    decode: Callable[[Tensor], str]
    requires = frozenset({"features", "text_ids"})

    def __post_init__(self) -> None:
        parts = ("vision_model", "visual_projection", "text_model", "text_projection")
        missing = [part for part in parts if not hasattr(self.model, part)]
        if missing:
            raise TypeError(f"a CLIPModel is needed; {type(self.model).__name__} lacks {', '.join(missing)}")

    @torch.no_grad()
    def __call__(self, contexts: Sequence[VisualContext]) -> list[Tensor]:
        _check_text(contexts)
        return [-cosine(self._patches(c), self._texts(c)).mean(dim=1) for c in contexts]

    def _patches(self, context: VisualContext) -> Tensor:
        norm = self.model.vision_model.post_layernorm
        weight = self.model.visual_projection.weight
        assert context.features is not None
        if context.features.shape[1] != weight.shape[1]:
            raise ValueError(
                f"the CLIP model's vision tower is {weight.shape[1]} wide, but the features before the projector are "
                f"{context.features.shape[1]}; give the CLIP model that the vision-language model's tower is from"
            )
        patches: Tensor = self.model.visual_projection(norm(context.features.to(weight)))
        return patches

    def _texts(self, context: VisualContext) -> Tensor:
        """(segments, projected) embeddings of the instruction."""
        assert context.text_ids is not None
        text = self.decode(context.text_ids[context.instruction])
        if not text.strip():
            raise ValueError(f"the instruction of sample {context.sample_index} is decoded to an empty text")
        limit = self.model.text_model.config.max_position_embeddings
        encoded = self.tokenizer(
            [text],
            truncation=True,
            max_length=limit,
            return_overflowing_tokens=True,
            padding=True,
            return_tensors="pt",
        )
        weight = self.model.text_projection.weight
        ids, mask = (encoded[name].to(weight.device) for name in ("input_ids", "attention_mask"))
        pooled = self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return self.model.text_projection(pooled).to(context.projected.device)  # type: ignore[no-any-return]
