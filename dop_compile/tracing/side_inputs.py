"""Values per token that a decoder takes besides its embeddings.

Gemma's per-layer embeddings are looked up by token id. Outer models hand them over; a text model's decoder looks them
up itself, which it cannot once it is given embeddings alone, so they are looked up before.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dop_compile.hf.names import PER_LAYER
from dop_compile.tracing.trace import DecoderInputs

__all__ = ["default_inputs", "embed_ids"]


def _per_layer_size(decoder: Any) -> int:
    size = getattr(decoder, "hidden_size_per_layer_input", 0)
    return int(size or 0) if hasattr(decoder, "get_per_layer_inputs") else 0


def embed_ids(decoder: Any, input_ids: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The embeddings of a decoder's ids; added to its arguments is what else it would look up by them."""
    embeds: Tensor = decoder.get_input_embeddings()(input_ids)
    if _per_layer_size(decoder) and arguments.get(PER_LAYER) is None:
        arguments[PER_LAYER] = decoder.get_per_layer_inputs(input_ids, embeds)
    return embeds


def default_inputs(decoder: Any, **settings: Any) -> DecoderInputs:
    """The inputs of a plain call of the decoder."""
    size = _per_layer_size(decoder)
    if not size:
        return DecoderInputs(**settings)
    sizes = (int(decoder.config.num_hidden_layers), size)
    return DecoderInputs(tokens=((PER_LAYER, sizes, next(decoder.parameters()).dtype),), **settings)
