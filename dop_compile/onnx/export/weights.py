"""One file that holds every weight once, written tensor by tensor.

Tensors are found again by where they lie in memory, and by the SHA-256 of their bytes: initializers of different graphs
have different names. Large ones are copied to the file in pieces, so that no second copy of the weights is ever in
memory, also not of those that are stored transposed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dop_compile.onnx.contract.parts import DataFile, file_sha256

__all__ = ["WeightStore"]

PIECE_BYTES = 1 << 24
ALIGNMENT = 64
PAGE_ALIGNED_FROM = 1 << 16
PAGE = 4096


class WeightStore:
    """Writes tensors to a new file. A context manager, which closes the file.

    Raises:
        OSError: the file cannot be written, with what was being written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("xb")
        self._end = 0
        self._places: dict[Any, tuple[int, int]] = {}
        self._by_content: dict[tuple[str, int], tuple[int, int]] = {}
        self._held: list[Tensor] = []

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def tensors(self) -> int:
        """Number of different tensors in the file."""
        return len(self._by_content)

    def add(self, tensor: Tensor, *, lasting: bool) -> tuple[int, int]:
        """Offset and length in bytes of a tensor's elements in row-major order, written if they are new.

        Args:
            lasting: the tensor is a weight of the model, which is not changed or freed meanwhile.
        """
        key = _where(tensor)
        if lasting and key in self._places:
            return self._places[key]
        place = self._write(tensor)
        if lasting:
            self._places[key] = place
            self._held.append(tensor)  # or its memory could become another tensor's
        return place

    def holds(self, tensor: Tensor) -> bool:
        """Whether a weight of the model was written, in this very order of its elements."""
        return _where(tensor) in self._places

    def _write(self, tensor: Tensor) -> tuple[int, int]:
        length = tensor.numel() * tensor.element_size()
        step = PAGE if length >= PAGE_ALIGNED_FROM else ALIGNMENT
        offset = -(-self._end // step) * step
        digest = hashlib.sha256()
        self._file.write(bytes(offset - self._end))
        for piece in _pieces(tensor.detach()):
            data: Any = piece.cpu().reshape(-1).view(torch.uint8).numpy()  # an array is a buffer
            digest.update(data)
            self._file.write(data)
        content = (digest.hexdigest(), length)
        if content in self._by_content:
            self._file.seek(self._end)
            self._file.truncate()
            return self._by_content[content]
        self._by_content[content] = offset, length
        self._end = offset + length
        self._file.flush()  # whoever checks a graph looks at the file
        return offset, length

    def finish(self) -> DataFile:
        """Close the file; its size and hash."""
        self._file.close()
        return DataFile(self.path.name, self.path.stat().st_size, file_sha256(self.path))


def _where(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory seen in the same way."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), str(tensor.device)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's elements in row-major order, in contiguous pieces of limited size."""
    size = tensor.numel() * tensor.element_size()
    if size <= PIECE_BYTES or tensor.dim() == 0:
        yield tensor.contiguous()
        return
    rows = max(1, PIECE_BYTES * tensor.shape[0] // size)
    for start in range(0, tensor.shape[0], rows):
        part = tensor.narrow(0, start, min(rows, tensor.shape[0] - start))
        if part.shape[0] == 1 and part.numel() * part.element_size() > PIECE_BYTES:
            yield from _pieces(part[0])
        else:
            yield part.contiguous()
