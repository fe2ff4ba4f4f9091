"""What a visual token reducer is given, and what it gives back.

A reducer runs before the decoder, once per sample, and names the visual tokens that enter it.

    processor -> vision tower -> projector -> [reducer] -> decoder
                     |               |
                  features       projected

Shapes: `tokens` visual tokens of one sample, `n_text` other prompt tokens, `hidden` the decoder's width.
Newline embeddings inside a placeholder run are never dropped, so they are not among the `tokens`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["OPTIONAL_FIELDS", "Reducer", "Selection", "VisualContext"]

OPTIONAL_FIELDS = frozenset({"features", "cls_attention", "grid"})
"""The fields of `VisualContext` that are filled in only for reducers that name them in `requires`."""


@dataclass(frozen=True, eq=False)
class VisualContext:
    """The visual tokens of one sample, in raster order, image after image.

    Attributes:
        projected: (tokens, hidden) features after the projector, as they enter the decoder.
        text: (n_text, hidden) embeddings of the sample's other prompt tokens, padding left out.
        segments: (tokens,) int64, the image or frame of this sample that each token belongs to, from 0.
        sample_index: the sample's row in the batch. Only a reducer that is given something per row may
            use it: a row must select the same tokens alone and in a batch.
        features: (tokens, vision_hidden) features before the projector.
        cls_attention: (tokens,) attention that the [CLS] query of one vision layer pays to each token, mean
            over heads; of a tower without [CLS], the mean over all queries.
        grid: (frames, height, width) in tokens of each segment.
        segment_index: 0 for a whole sample; the segment's number in its sample where `select_tokens` has
            narrowed the context to a single segment (whose `segments` are then all 0).

    Raises:
        ValueError: shapes that contradict each other; the message names the field.
    """

    projected: Tensor
    text: Tensor
    segments: Tensor
    sample_index: int
    features: Tensor | None = None
    cls_attention: Tensor | None = None
    grid: Sequence[tuple[int, int, int]] | None = None
    segment_index: int = 0

    def __post_init__(self) -> None:
        if self.projected.ndim != 2:
            raise ValueError(f"projected must be (tokens, hidden), not {tuple(self.projected.shape)}")
        tokens, hidden = self.projected.shape
        if self.text.ndim != 2 or self.text.shape[1] != hidden:
            raise ValueError(f"text must be (n_text, {hidden}), not {tuple(self.text.shape)}")
        if self.segments.shape != (tokens,) or self.segments.dtype != torch.long:
            raise ValueError(
                f"segments must be ({tokens},) int64, not {tuple(self.segments.shape)} {self.segments.dtype}"
            )
        if self.features is not None and (self.features.ndim != 2 or self.features.shape[0] != tokens):
            raise ValueError(f"features must be ({tokens}, vision_hidden), not {tuple(self.features.shape)}")
        if self.cls_attention is not None and self.cls_attention.shape != (tokens,):
            raise ValueError(f"cls_attention must be ({tokens},), not {tuple(self.cls_attention.shape)}")

    @property
    def tokens(self) -> int:
        """The number of visual tokens of the sample."""
        return self.projected.shape[0]


@dataclass(frozen=True, eq=False)
class Selection:
    """The tokens that a reducer keeps.

    Attributes:
        indices: (kept,) int64 into the context's tokens, **ranked best first**, without duplicates. The
            runtime sorts them to raster order before they enter the decoder; the ranking is what tells
            salient tokens from the rest.
        features: (kept, hidden) what enters the decoder in place of `projected[indices]`, in the same order,
            dtype and device, for reducers that merge tokens. None leaves the tokens as they are.
        positions: (kept,) int64 into the context's tokens: the token whose position ids each kept token
            takes. Given as tokens, so that one answer holds for plain and for multi-axis rotary embeddings.
            None: its own.
    """

    indices: Tensor
    features: Tensor | None = None
    positions: Tensor | None = None


@runtime_checkable
class Reducer(Protocol):
    """Selects visual tokens. Any callable object with these attributes is one; no base class is needed.

    Deterministic: the same context and count give the same selection; ties go to the lowest index.

    A sample's images or frames are reduced one by one, each to its share of the count. A reducer that also
    has the attribute `whole_sample = True` is called once with all of them and divides the count itself.
    """

    @property
    def name(self) -> str:
        """The name that policies use."""
        ...

    @property
    def requires(self) -> frozenset[str]:
        """The `OPTIONAL_FIELDS` of the context that it reads."""
        ...

    def __call__(self, context: VisualContext, count: int) -> Selection:
        """Keep exactly `count` tokens of `context`; `count` is between 0 and `context.tokens`."""
        ...
