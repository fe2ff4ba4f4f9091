"""What a pass says of its work."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["PassReport"]


@dataclass
class PassReport:
    """What a pass did: how many rewrites, and why it left what it left."""

    name: str
    number: int = 0
    rewritten: int = 0
    kept: list[str] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"# {self.number:02d} {self.name} | {self.rewritten} rewritten, {len(self.kept)} kept | "
            f"nodes {self.nodes_before} -> {self.nodes_after} | {1000 * self.seconds:.0f} ms"
        )
