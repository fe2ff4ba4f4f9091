"""Which visual tokens each layer's keys and values hold after a prompt, read off the cache that a prefill leaves.

(refused) Pictures whose tokens are in no grid that is known: tiles and thumbnails, newlines between rows, queries.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dop_compile.hf.model_path import placeholder_ids
from dop_compile.hf.pictures import picture_tokens
from dop_compile.hf.spellings import cache_of
from dop_compile.runtime.cache import PrunedCache
from dop_compile.serving.live.prompts import Prompts
from dop_compile.serving.patches import PatchView
from dop_compile.serving.requests import RequestError

__all__ = ["read_patches"]


@torch.no_grad()
def read_patches(model: Any, prompts: Prompts, tier: str, inputs: Any) -> PatchView:
    """Of one prompt.

    Args:
        inputs: one row, as `Prompts.read` returns it.

    Raises:
        RequestError: there are no pictures, or their tokens are in no known grid.
    """
    placeholders = torch.tensor(placeholder_ids(model.config))
    visual = torch.isin(inputs["input_ids"][0], placeholders)
    if not bool(visual.any()):
        raise RequestError("messages: there is no picture in them whose patches could be shown")
    grids = _grids(model.config, inputs, int(visual.sum()), prompts.merge_size)
    output = model.tier(tier)(**inputs.to(model.device, model.dtype), use_cache=True, logits_to_keep=1)
    cache = cache_of(output)
    assert isinstance(cache, PrunedCache)
    numbers = visual.cumsum(0) - 1
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    read = []
    for layer in range(layers):
        columns = _columns(cache, layer)
        read.append(tuple(sorted(numbers[columns[visual[columns]]].tolist())))
    return PatchView(grids, tuple(read), prompts.crops)


def _grids(config: Any, inputs: Any, tokens: int, merge: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of tokens of each picture."""
    sizes = inputs.get("image_grid_thw")
    if sizes is not None:
        grids = tuple((height // merge, width // merge) for _, height, width in sizes.tolist())
    else:
        known = picture_tokens(config)
        side = 0 if known is None else math.isqrt(known.count)
        count = tokens // known.count if known is not None else 0
        grids = ((side, side),) * count
    if sum(height * width for height, width in grids) != tokens:
        raise RequestError("messages: the tokens of this model's pictures are in no grid that could be shown")
    return grids


def _columns(cache: PrunedCache, layer: int) -> Tensor:
    """Columns of the prompt whose keys and values a layer holds."""
    entries = cache.entries.get(layer)
    if entries is None:
        raise RequestError(f"layer {layer} keeps no keys and values, but a state; what it has read cannot be shown")
    slots = torch.arange(entries.count) if entries.slots is None else entries.slots[0].cpu()
    if entries.valid is not None:
        slots = slots[entries.valid[0].cpu()]
    columns = slots if cache.columns is None else cache.columns[0].cpu()[slots]
    return columns[columns >= 0]
