"""Keys of memos for what is the same only if it is the very same object."""

from __future__ import annotations

from typing import Any

__all__ = ["Same"]


class Same:
    """Equal for one object alone, which it keeps alive: an `id` would be given to another one later."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)
