"""A step's attention metadata, made that of layers in which visual tokens are no queries, no keys, or neither.

All of it is derived anew in every step from `CommonAttentionMetadata`, whose `mm_req_doc_ranges` says where each
request's visual tokens are. No state is kept, so requests may come, go, be preempted, recomputed and reordered.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dop_compile.errors import UnsupportedUsageError
from dop_compile.plugins.vllm.roles import Attention
from dop_compile.plugins.vllm.runs import Sequences, Step, step_of

__all__ = ["Plan", "narrow"]

PER_REQUEST = (
    "dcp_local_seq_lens",
    "dcp_local_seq_lens_cpu_upper_bound",
    "replayssm_decode_base_cpu",
    "req_idx",
    "rswa_prefix_lens",
    "_num_computed_tokens_cache",
    "_token_to_req_indices_cache",
)
"""Fields of the metadata that have an entry for each request, and that no supported backend reads here: left out."""


@dataclass(frozen=True)
class Plan:
    """What a narrowed layer does in one step, in rows of the step.

    Args:
        visual: (visual,) rows of visual tokens.
        others: (others,) the rest.
        queries: (queries,) rows whose attention is computed.
        unseeing: (n,) visual rows that are queries and see nothing.
        visual_slots: (visual,) where keys of visual tokens go in the cache; None where they are not stored.
        slots: (others,) where the others' keys go.
    """

    visual: Tensor
    others: Tensor
    queries: Tensor
    unseeing: Tensor
    visual_slots: Tensor | None
    slots: Tensor


def narrow(attention: Attention, metadata: Any, block_size: int) -> tuple[Any, Plan | None]:
    """The metadata of a layer in which visual tokens are `attention`, and its plan; None where nothing is different.

    Args:
        attention: "frozen", "absent" or "keyless".
        metadata: vLLM's `CommonAttentionMetadata` of the step.
        block_size: tokens to a block of the layer's cache.

    Raises:
        UnsupportedUsageError: a field that is needed is not filled in.
    """
    if not metadata.mm_req_doc_ranges:
        return metadata, None
    for name in ("seq_lens_cpu_upper_bound", "positions"):
        if getattr(metadata, name) is None:
            raise UnsupportedUsageError(f"this vLLM tells attention backends no {name}; see dop_compile's versions")
    step = step_of(
        metadata.query_start_loc_cpu.numpy(), metadata.seq_lens_cpu_upper_bound.numpy(), metadata.mm_req_doc_ranges
    )
    if not len(step.visual) and (attention == "frozen" or not step.dropped.any()):
        return metadata, None
    plan = _plan(step, attention, metadata, block_size)
    if not len(plan.queries):
        return metadata, plan  # nothing but visual tokens in this step: the layer's attention is not called
    return _narrowed(metadata, step.sequences(attention), plan), plan


def _plan(step: Step, attention: Attention, metadata: Any, block_size: int) -> Plan:
    device = metadata.seq_lens.device

    def rows(numbers: Any) -> Tensor:
        return torch.from_numpy(numbers).to(device)

    visual, others = rows(step.visual), rows(step.others)
    queries, unseeing = rows(step.sequences(attention).rows), rows(step.unseeing)
    if attention == "frozen":
        slots = metadata.slot_mapping
        return Plan(visual, others, queries, unseeing, slots[visual], slots[others])
    return Plan(visual, others, queries, unseeing, None, _slots(step, others, metadata, block_size))


def _slots(step: Step, others: Tensor, metadata: Any, block_size: int) -> Tensor:
    """(others,) places in the cache of keys that are stored without gaps, in the blocks that the request has.

    From positions on the device: with speculation those on the CPU may be ahead of what was accepted.
    """
    counts = [0 if run.visual else len(run) for run in step.runs]
    requests = torch.from_numpy(np.repeat([run.request for run in step.runs], counts)).to(others.device)
    at = metadata.positions[others].long() - torch.from_numpy(step.dropped).to(others.device)
    blocks = metadata.block_table_tensor[requests, at // block_size].long()
    slots: Tensor = blocks * block_size + at % block_size
    return slots


def _narrowed(metadata: Any, sequences: Sequences, plan: Plan) -> Any:
    requests = torch.from_numpy(sequences.requests)
    index = requests.to(metadata.seq_lens.device)
    shortened = torch.from_numpy(sequences.shortened.astype(np.int32))
    starts = torch.zeros(len(sequences.counts) + 1, dtype=torch.int32)
    starts[1:] = torch.from_numpy(np.cumsum(sequences.counts))
    known = {field.name for field in fields(metadata)}
    return metadata.replace(
        query_start_loc=starts.to(index.device),
        query_start_loc_cpu=starts,
        seq_lens=metadata.seq_lens[index] - shortened.to(index.device),
        seq_lens_cpu_upper_bound=metadata.seq_lens_cpu_upper_bound[requests] - shortened,
        num_reqs=len(sequences.counts),
        num_actual_tokens=len(sequences.rows),
        max_query_len=int(sequences.counts.max()),
        block_table_tensor=metadata.block_table_tensor[index],
        slot_mapping=plan.slots,
        positions=metadata.positions[plan.queries],
        is_prefilling=None if metadata.is_prefilling is None else metadata.is_prefilling[requests],
        **dict.fromkeys(known.intersection(PER_REQUEST)),
    )
