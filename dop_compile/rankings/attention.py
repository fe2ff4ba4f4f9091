"""Rankings by the attention that visual tokens receive."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dop_compile.rankings.base import best
from dop_compile.rankings.view import LayerView

__all__ = ["LastToken", "Product", "TextRaters"]


class LastToken:
    """Attention from the prompt's last token, mean over heads (FastV, PyramidDrop)."""

    raters = frozenset({"text"})
    keys = frozenset({"visual"})
    reads_stream = False

    def __call__(self, view: LayerView, counts: Sequence[int]) -> Tensor:
        return best(view.received(view.last), view.candidates, counts)


class TextRaters:
    """Attention from the text tokens that the picture is about (SparseVLM).

    A text token rates if visual tokens refer to it more than to the mean text token: the softmax over text tokens of
    the products of visual and text embeddings that enter the decoder, mean over visual tokens.
    """

    raters = frozenset({"text"})
    keys = frozenset({"visual"})
    reads_stream = False

    def __call__(self, view: LayerView, counts: Sequence[int]) -> Tensor:
        text = view.group("text")
        return best(view.received(text, self.weights(view, text.to(view.device))), view.candidates, counts)

    @staticmethod
    def weights(view: LayerView, text: Tensor) -> Tensor:
        """(batch, slots) 1 for tokens that rate, else 0. All visual tokens that entered refer, also those that left."""
        embeds = view.embeds.float()
        products = embeds @ embeds.transpose(1, 2)
        relation = products.masked_fill(~text[:, None], float("-inf")).softmax(dim=2).nan_to_num()
        visual = view.entered.to(view.device).float()
        relevance = torch.einsum("bv,bvt->bt", visual, relation) / visual.sum(dim=1, keepdim=True).clamp(min=1)
        mean = relevance.sum(dim=1, keepdim=True) / text.sum(dim=1, keepdim=True).clamp(min=1)
        return ((relevance >= mean) & text).float()


class Product:
    """Attention from visual tokens times that from text tokens, each summed over its queries (FitPrune)."""

    raters = frozenset({"text", "visual"})
    keys = frozenset({"visual"})
    reads_stream = False

    def __call__(self, view: LayerView, counts: Sequence[int]) -> Tensor:
        own, cross = self.masses(view)
        return best(own * cross, view.candidates, counts)

    @staticmethod
    def masses(view: LayerView) -> tuple[Tensor, Tensor]:
        """(batch, slots) attention received from visual and from text tokens."""
        return view.received(view.group("visual")), view.received(view.group("text"))
