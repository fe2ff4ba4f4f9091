"""Processes that share the samples of a measurement, as `torchrun` starts them; or one model, by tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor

__all__ = ["Team", "barrier", "gather", "of_first", "world"]


def world() -> tuple[int, int]:
    """This process's rank, and how many there are; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait for all processes."""
    if world()[1] > 1:
        dist.barrier()


@dataclass(frozen=True)
class Team:
    """How processes share a measurement: this one measures every sample whose number is `rank` modulo `processes`.

    `leader` is true in the one that shows progress and saves the result.
    """

    rank: int
    processes: int
    leader: bool

    @classmethod
    def of(cls, model: Any) -> Team:
        """The processes share the samples; those that share a tensor parallel model measure all of them together.

        Raises:
            ValueError: a model that is parallel over some of the processes only.
        """
        rank, processes = world()
        sizes = {weight.device_mesh.size() for weight in model.parameters() if isinstance(weight, DTensor)}
        if not sizes:
            return cls(rank, processes, rank == 0)
        if sizes != {processes}:
            raise ValueError(
                f"model: tensor parallel over {max(sizes)} of {processes} processes; start as many processes as share "
                "the model"
            )
        return cls(0, 1, rank == 0)

    @property
    def writes(self) -> bool:
        """Whether this process keeps what it has measured."""
        return self.leader or self.processes > 1

    def share(self, samples: Sequence[Any]) -> range:
        """The numbers of the samples that this process measures."""
        return range(self.rank, len(samples), self.processes)


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
