"""What a visual token reducer is given, and what it gives back.

A reducer runs before the decoder and names, for each sample, the visual tokens that enter it.

    processor -> vision tower -> projector -> [reducer] -> decoder
                     |               |
                  features       projected

Shapes: `tokens` visual tokens of one sample, `n_text` other prompt tokens, `hidden` the decoder's width.
Newline embeddings inside a placeholder run are never dropped, so they are not among the `tokens`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["OPTIONAL_FIELDS", "Reducer", "Selection", "VisualContext"]

OPTIONAL_FIELDS = frozenset({"features", "cls_attention", "keys", "project", "tiles", "grid", "text_ids"})
"""The fields of `VisualContext` that are filled in only for reducers that name them in `requires`."""


@dataclass(frozen=True, eq=False)
class VisualContext:
    """The visual tokens of one sample, in raster order, image after image.

    Attributes:
        projected: (tokens, hidden) features after the projector, as they enter the decoder.
        text: (n_text, hidden) embeddings of the sample's other prompt tokens, padding left out.
        segments: (tokens,) int64, the image or video of this sample that each token belongs to, from 0.
        sample_index: the sample's row in the batch. Only a reducer that is given something per row may
            use it: a row must select the same tokens alone and in a batch.
        features: (tokens, vision_hidden) what the projector was given for each token; of towers that merge several
            patches into a token, these patches one after the other.
        cls_attention: (tokens,) float32, attention that the [CLS] query of the vision layer before the projector pays
            to each token, mean over heads; of a tower without [CLS], the mean over all queries. Where a token is
            made of several patches, the mean over them.
        keys: (tokens, key_dim) float32, keys of the same layer, mean over heads (and over a token's patches).
        project: the projector, for single tokens: (n, vision_hidden) features to (n, hidden). For reducers that merge
            tokens before it.
        tiles: (tokens,) int64 on the CPU, the tile of its image or frame of its video that each token belongs to:
            what went through the vision tower as one picture. Numbered from 0 upwards, not necessarily densely.
        grid: (frames or tiles, height, width) in tokens of each segment.
        text_ids: (n_text,) int64, ids of the tokens of `text`.
        segment_index: 0 for a whole sample; the segment's number in its sample where `select_tokens` has
            narrowed the context to a single segment (whose `segments` are then all 0).
        instruction_start: how many rows of `text` stand before the first visual token of the call; those after them
            are the instruction.
        relevance: (tokens,) what the reducer's own `prepare` found out about the whole segment.

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
    keys: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    tiles: Tensor | None = None
    text_ids: Tensor | None = None
    instruction_start: int = 0
    relevance: Tensor | None = None

    def __post_init__(self) -> None:
        if self.projected.ndim != 2:
            raise ValueError(f"projected must be (tokens, hidden), not {tuple(self.projected.shape)}")
        tokens, hidden = self.projected.shape
        if self.text.ndim != 2 or self.text.shape[1] != hidden:
            raise ValueError(f"text must be (n_text, {hidden}), not {tuple(self.text.shape)}")
        for name in ("segments", "tiles"):
            value = getattr(self, name)
            if value is not None and (value.shape != (tokens,) or value.dtype != torch.long):
                raise ValueError(f"{name} must be ({tokens},) int64, not {tuple(value.shape)} {value.dtype}")
        for name, width in (("features", "vision_hidden"), ("keys", "key_dim")):
            value = getattr(self, name)
            if value is not None and (value.ndim != 2 or value.shape[0] != tokens):
                raise ValueError(f"{name} must be ({tokens}, {width}), not {tuple(value.shape)}")
        for name in ("cls_attention", "relevance"):
            value = getattr(self, name)
            if value is not None and value.shape != (tokens,):
                raise ValueError(f"{name} must be ({tokens},), not {tuple(value.shape)}")
        if self.text_ids is not None and self.text_ids.shape != (len(self.text),):
            raise ValueError(f"text_ids must be ({len(self.text)},), not {tuple(self.text_ids.shape)}")

    @property
    def tokens(self) -> int:
        """The number of visual tokens of the sample."""
        return self.projected.shape[0]

    @property
    def instruction(self) -> slice:
        """The rows of `text` behind the first visual token; all rows where there is none behind it."""
        return slice(self.instruction_start if self.instruction_start < len(self.text) else 0, None)


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

    A sample's images or videos are reduced one by one, each to its share of the count. More may be said by attributes:

    - `whole_sample = True`: called once with all images of a sample; divides the count itself.
    - `per_tile = True`: called once per tile or frame, each having its share of the count. Implies that `tiles` is
      required.
    - `at_most = True`: may keep fewer tokens than asked for.
    - `select_many(contexts, counts) -> Sequence[Selection]`: called in place of the reducer itself with all contexts
      of a batch that have the same number of tokens, so that their numbers can be computed together.
    - `reads_values = False`: it goes by numbers of tokens alone. `projected` (tokens, 0) and `text` (n_text, 0) then
      hold nothing and are on the CPU, so that a prefill on a GPU does not wait for its answer.
    - `prepare(contexts) -> Sequence[VisualContext]`: called before contexts are divided into tiles, for what needs the
      whole image; returns them with `relevance` set.
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
