"""Processes that share the samples of a measurement, as `torchrun` starts them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist

__all__ = ["barrier", "gather", "of_first", "share", "world"]


def world() -> tuple[int, int]:
    """This process's rank, and how many there are; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait for all processes."""
    if world()[1] > 1:
        dist.barrier()


def share(samples: Sequence[Any]) -> range:
    """The numbers of the samples that this process measures."""
    rank, processes = world()
    return range(rank, len(samples), processes)


def gather(own: Mapping[int, Any]) -> list[Any]:
    """One value per sample, from a process that has it; by the samples' numbers. The same list on every process."""
    parts: list[Any] = [dict(own)]
    if world()[1] > 1:
        parts = [None] * world()[1]
        dist.all_gather_object(parts, dict(own))
    whole = {number: value for part in parts for number, value in part.items()}
    return [whole[number] for number in sorted(whole)]


def of_first(read: Callable[[], Any]) -> Any:
    """What the first process reads, in all of them; so is the ValueError that it raises."""
    rank, processes = world()
    shared: list[Any] = [None, None]
    if rank == 0:
        try:
            shared[1] = read()
        except ValueError as error:
            shared[0] = str(error)
    if processes > 1:
        dist.broadcast_object_list(shared, src=0)
    if shared[0] is not None:
        raise ValueError(shared[0])
    return shared[1]
