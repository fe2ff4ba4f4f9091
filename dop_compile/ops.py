"""The operations that the passes insert into a decoder graph.

All are plain tensor functions without data-dependent shapes: they run eagerly, compile and export alike. Tokens are
moved by gathers only; writing back is a gather from "nothing or the update", which is deterministic and fuses with
the residual addition.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "masked_assign",
    "preview_cache",
    "rank_tokens",
    "ranked_index",
    "select_attention_mask",
    "select_padding_mask",
    "token_add",
    "token_merge",
    "token_slice",
    "update_cache",
    "zero_keyless",
]


def token_slice(x: Tensor, index: Tensor, batch_dim: int = 0, token_dim: int = 1) -> Tensor:
    """Take tokens of each row: x (..., batch, ..., tokens, ...), index (batch, count) -> count tokens."""
    if index.shape[0] == 1:
        return x.index_select(token_dim, index[0])
    if x.dim() == 3 and (batch_dim, token_dim) == (0, 1):
        offset = torch.arange(x.shape[0], device=index.device)[:, None] * x.shape[1]
        return F.embedding(index + offset, x.flatten(0, 1))
    batch, count = index.shape
    shape, target = [1] * x.dim(), list(x.shape)
    shape[batch_dim], shape[token_dim] = batch, count
    target[batch_dim] = batch
    x = x.expand(target)  # rotary tables of positions that all rows share have one row
    target[token_dim] = count
    return x.gather(token_dim, index.view(shape).expand(target))


def token_add(x: Tensor, update: Tensor, index: Tensor) -> Tensor:
    """Add `update` (batch, count, hidden) to the tokens of x (batch, tokens, hidden) that it belongs to.

    `index` (batch, tokens) is 0 where a token has no update, else 1 + its flat row in `update`.
    """
    rows = F.pad(update.flatten(0, 1), (0, 0, 1, 0))
    return x + F.embedding(index, rows)


def token_merge(index: Tensor, *sources: Tensor) -> Tensor:
    """Take tokens from the concatenation of several (batch, tokens_i, hidden) streams; index (batch, count)."""
    return token_slice(torch.cat(sources, dim=1), index)


def masked_assign(x: Tensor, mask: Any, value: Tensor) -> Tensor:
    """``x[mask] = value`` as a value: the input is left as it was."""
    x = x.clone()
    x[mask] = value
    return x


def zero_keyless(attention: Tensor, visible: Tensor | None) -> Tensor:
    """Zero the attention output (batch, queries, heads, head_dim) of queries that see no key."""
    if visible is None:
        return attention
    return torch.where(visible[:, :, None, None], attention, 0)


def update_cache(cache: Any, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Store new keys and values of a layer; returns all that the layer holds."""
    result: tuple[Tensor, Tensor] = cache.store(keys, values, layer)
    return result


def preview_cache(cache: Any, keys: Tensor, values: Tensor | None, layer: int) -> tuple[Tensor, Tensor | None]:
    """All that a layer would hold with new keys and values, which are not stored."""
    result: tuple[Tensor, Tensor | None] = cache.preview(keys, values, layer)
    return result


def rank_tokens(
    rankings: Any, stage: int, module: Any, tensors: Any, mask: Any, sets: Any, settings: Any, stream: Any, held: Any
) -> Any:
    """Decide which visual tokens leave behind a layer; returns the layout that says so. See `dop_compile.rankings`."""
    return rankings.rank(stage, module, tensors, mask, sets, settings, stream, held)


def ranked_index(layout: Any, kind: str, tokens: Any, others: Any) -> Tensor:
    """An index tensor between token sets that a ranking tells apart."""
    result: Tensor = layout.index(kind, tokens, others)
    return result


def select_padding_mask(masks: Any, tokens: Any) -> Any:
    """Which positions of a token set's grid hold a token, (batch, count) of 0 and 1; None where all do."""
    return masks.padding(tokens)


def select_attention_mask(
    mask: Any, masks: Any, layer: int, queries: Any, keys: Any, among: Any = None
) -> tuple[Any, Any]:
    """The rows and columns of the model's own mask that a layer needs; see `dop_compile.runtime.masks`."""
    result: tuple[Any, Any] = masks.select(mask, layer, queries, keys, among)
    return result
