"""What an engine may tell besides text: which visual tokens of a prompt each layer works with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dop_compile.serving.requests import Prepared

__all__ = ["PatchView", "ShowsPatches"]


@dataclass(frozen=True)
class PatchView:
    """The visual tokens of one prompt, in raster order, picture after picture.

    Args:
        grids: (rows, columns) of tokens of each picture, before reduction.
        read: per layer, numbers of the tokens whose keys and values later tokens read, ascending.
        cropped: whether the model sees the middle of a picture, cut to the grid's shape, and not all of it scaled.
    """

    grids: tuple[tuple[int, int], ...]
    read: tuple[tuple[int, ...], ...]
    cropped: bool


@runtime_checkable
class ShowsPatches(Protocol):
    """An engine that can tell."""

    def patches(self, prepared: Prepared) -> PatchView:
        """Which tokens are read; on the engine's thread, like `step`. Costs a prefill.

        Raises:
            RequestError: there are no pictures in the prompt, or it is not known where their tokens are.
        """
        ...
