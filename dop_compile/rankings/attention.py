"""Rankings by the attention that visual tokens receive."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dop_compile.rankings.base import LayerView, best, slots_of

__all__ = ["LastToken", "Product", "TextRaters"]


class LastToken:
    """Attention from the prompt's last token, mean over heads (FastV, PyramidDrop).

    Args:
        next_layer: that of the next layer, which the tokens that leave do not take part in (PyramidDrop).
    """

    raters = frozenset({"text"})
    keys = frozenset({"visual"})
    reads_stream = False

    def __init__(self, next_layer: bool = False):
        if not isinstance(next_layer, bool):
            raise TypeError(f"last_token: next_layer: expected True or False, got {next_layer!r}")
        self.reads_next = next_layer

    def __call__(self, view: LayerView, counts: Sequence[int]) -> Tensor:
        return best(view.received(view.last), view.candidates, counts)


class TextRaters:
    """Attention from the text tokens that the picture is about (SparseVLM).

    A text token rates if visual tokens refer to it no less than to the mean text token: the softmax over text tokens of
    the products of visual and text embeddings that enter the decoder, mean over visual tokens. In the authors' code it
    has to be more; here the only text token rates, and so do all where they are alike.
    """

    raters = frozenset({"text"})
    keys = frozenset({"visual"})
    reads_stream = False
    reads_next = False

    def __call__(self, view: LayerView, counts: Sequence[int]) -> Tensor:
        rating = view.once("text_raters", lambda: self.weights(view))
        return best(view.received(view.group("text"), rating), view.candidates, counts)

    @staticmethod
    def weights(view: LayerView) -> Tensor:
        """(batch, slots) 1 for tokens that rate, else 0. All visual tokens that entered refer, also those that left."""
        words, is_text = (part.to(view.device) for part in slots_of(view.group("text")))
        patches, is_visual = (part.to(view.device) for part in slots_of(view.entered))
        text, visual = (_rows(view.embeds, slots).float() for slots in (words, patches))
        products = (visual @ text.transpose(1, 2)).masked_fill(~is_text[:, None], float("-inf"))
        shares = products.softmax(dim=2).masked_fill(~(is_visual[:, :, None] & is_text[:, None]), 0.0)
        relevance = shares.sum(dim=1) / is_visual.sum(dim=1, keepdim=True).clamp(min=1)
        mean = relevance.sum(dim=1, keepdim=True) / is_text.sum(dim=1, keepdim=True).clamp(min=1)
        rating = ((relevance >= mean) & is_text).float()
        return rating.new_zeros(view.embeds.shape[:2]).scatter_add(1, words, rating)


class Product:
    """Attention from visual tokens times that from text tokens, max over heads, summed over the queries (FitPrune)."""

    raters = frozenset({"text", "visual"})
    keys = frozenset({"visual"})
    reads_stream = False
    reads_next = False

    def __call__(self, view: LayerView, counts: Sequence[int]) -> Tensor:
        own, cross = self.masses(view)
        return best(own * cross, view.candidates, counts)

    @staticmethod
    def masses(view: LayerView) -> tuple[Tensor, Tensor]:
        """(batch, slots) attention received from visual and from text tokens."""
        visual, text = (view.received(view.group(name), heads="max") for name in ("visual", "text"))
        return visual, text


def _rows(values: Tensor, slots: Tensor) -> Tensor:
    return values.gather(1, slots[:, :, None].expand(-1, -1, values.shape[2]))
