"""FlashAttention's two entry points in plain torch, after its documentation, put behind Hugging Face's own interface.

A causal mask is aligned at the bottom right: of `k` keys, query `i` of `q` sees those up to `i + k - q`. A window
(left, right) counts from there. Queries that see nothing get zero. Sequences of a variable-length call see themselves.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as utils

Calls = list[tuple[int, int]]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """q (batch, queries, heads, dimension), k and v (batch, keys, key heads, dimension)."""
    assert dropout_p == 0
    groups = q.shape[2] // k.shape[2]
    k, v = (tensor.repeat_interleave(groups, 2) for tensor in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    last = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    key = torch.arange(k.shape[1])[None]
    left, right = window_size
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    if causal or right >= 0:
        seen &= key <= last + (0 if causal else right)
    if left >= 0:
        seen &= key >= last - left
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num()
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """q (all queries, heads, dimension); sequence i is rows `cu_seqlens[i]` to `cu_seqlens[i + 1]`, less one."""
    starts = list(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True))
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert starts[0] == (0, 0)
    assert starts[-1] == (len(q), len(k))
    outputs = []
    for (q0, k0), (q1, k1) in itertools.pairwise(starts):
        assert q1 - q0 <= max_seqlen_q
        assert k1 - k0 <= max_seqlen_k
        parts = (q[None, q0:q1], k[None, k0:k1], v[None, k0:k1])
        outputs.append(flash_attn_func(*parts, dropout_p, softmax_scale, causal, window_size, softcap)[0])
    return torch.cat(outputs)


def install(monkeypatch: pytest.MonkeyPatch, name: str) -> Calls:
    """Let Hugging Face find these functions under an implementation's name; returns (queries, keys) of every call."""
    calls: Calls = []

    def plain(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((args[0].shape[1], args[1].shape[1]))
        return flash_attn_func(*args, **kwargs)

    def packed(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((len(args[0]), len(args[1])))
        return flash_attn_varlen_func(*args, **kwargs)

    values = {
        "_loaded_implementation": name,
        "_flash_fn": plain,
        "_flash_varlen_fn": packed,
        "_flash_with_kvcache_fn": None,
        "_pad_fn": utils._pad_input,
        "_unpad_fn": utils._unpad_input,
        "_process_flash_kwargs_fn": utils._lazy_define_process_function(flash_attn_varlen_func),
        "_process_with_kvcache_kwargs_fn": dict,
    }
    for attribute, value in values.items():
        monkeypatch.setattr(utils, attribute, value)
    return calls
