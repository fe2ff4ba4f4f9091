"""Processes that share the samples of a measurement, as `torchrun` starts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["barrier", "gather_rows", "world"]


def world() -> tuple[int, int]:
    """This process's rank, and how many there are; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait for all processes."""
    if world()[1] > 1:
        dist.barrier()


def gather_rows(
    rows: Mapping[int, dict[str, Any]], samples: int, chosen: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """All rows on every process. Rows that several processes have read from disk are counted once."""
    if world()[1] == 1:
        return [rows[number] for number in range(samples)]
    width = 1 + 32 + 3 + 1 + sum(map(len, chosen.values()))
    table = torch.full((samples, width), -torch.inf, dtype=torch.float64)
    for number, row in rows.items():
        flat = [value for axis in chosen for value in row["values"][axis]]
        line = [float(number), *bytes.fromhex(row["digest"]), *row["counts"], row["prefills"], *flat]
        table[number] = torch.tensor(line, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        table = table.cuda()
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    found = []
    for line in table.cpu().tolist():
        values, start = {}, 37
        for axis, points in chosen.items():
            values[axis] = line[start : start + len(points)]
            start += len(points)
        digest = bytes(int(byte) for byte in line[1:33]).hex()
        found.append(
            {"digest": digest, "counts": [int(n) for n in line[33:36]], "prefills": line[36], "values": values}
        )
    return found
