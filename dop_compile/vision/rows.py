"""Attention that each token of a vision layer receives: one row, and never a full map.

A copy of the layer's attention module runs once more on the input that it had, with an attention function that keeps
queries and keys and returns zeros. So the queries and keys are those of the model's own code, whatever norms and rotary
embeddings it applies, and the tower itself runs under whichever implementation it was loaded with.

1. With a [CLS] token: softmax of its one query, mean over heads.
2. Without one: the mean over all queries and heads, some queries at a time.
3. Sequences packed into one row of the batch: the module's own code calls the attention function for each.

Where gradients are recorded the row carries them, and its backward pass computes the map's parts anew.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dop_compile.hf.copies import rebound, shallow_copy
from dop_compile.hf.private import ALL_ATTENTION_FUNCTIONS

__all__ = ["attention_rows"]

IMPLEMENTATION = "dop_compile_attention_rows"
CHUNK_NUMBERS = 1 << 24
"""Numbers of an attention map that exist at a time (64 MiB of float32)."""


def attention_rows(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], class_token: bool
) -> tuple[Tensor, Tensor] | None:
    """What one attention module of a vision tower pays to each of its tokens.

    Args:
        attention: the module; it is left as it is.
        args, kwargs: what it was called with.
        class_token: whether the first token is the query that counts; else all are.

    Returns:
        (batch, tokens) float32 attention and (batch, tokens, head_dim) float32 keys, mean over heads; packed sequences
        one after the other. None if the module does not go through Hugging Face's attention interface.
    """
    module: Any = shallow_copy(attention, own_children=False)
    replaced = getattr(vars(module).pop("forward", None), "plain", None)
    if not hasattr(module, "config"):
        return None
    module.config = copy.copy(module.config)
    module.config._attn_implementation_internal = IMPLEMENTATION
    module.dop_class_token = class_token
    module.dop_rows = []
    forward = functools.partial(type(module).forward, module)
    if replaced is not None:
        forward = rebound(replaced, {id(attention): module})
    forward(*args, **kwargs)
    if not module.dop_rows:
        return None
    rows, keys = zip(*module.dop_rows, strict=True)
    return torch.cat(rows, dim=1), torch.cat(keys, dim=1)


def _keep_rows(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function: (batch, heads, tokens, head_dim) in, zeros (batch, tokens, heads, head_dim) out."""
    batch, heads, tokens, width = query.shape
    scaling = width**-0.5 if scaling is None else scaling
    keys = key.float()
    each = keys if keys.shape[1] == heads else keys.repeat_interleave(heads // keys.shape[1], dim=1)
    each = each.transpose(-1, -2)
    queries = query[:, :, :1] if module.dop_class_token else query
    row = keys.new_zeros(batch, key.shape[2])
    step = max(1, CHUNK_NUMBERS // (batch * heads * key.shape[2]))
    differentiable = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    for first in range(0, queries.shape[2], step):
        some = queries[:, :, first : first + step]
        mask = attention_mask
        if mask is not None and mask.shape[-2] != 1:
            mask = mask[..., first : first + some.shape[2], :]
        if differentiable:
            row = row + checkpoint(_received, some, each, mask, scaling, use_reentrant=False, preserve_rng_state=False)
        else:
            row += _received(some, each, mask, scaling)
    module.dop_rows.append((row / queries.shape[2], keys.mean(dim=1)))
    return value.new_zeros(1).expand(batch, tokens, heads, value.shape[-1]), None


def _received(queries: Tensor, keys: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """(batch, tokens) what queries (batch, heads, some, head_dim) pay to each key (batch, heads, head_dim, tokens)."""
    scores = queries.float() @ keys * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(dim=-1).mean(dim=1).sum(dim=1)


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _keep_rows)
