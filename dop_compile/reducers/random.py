"""Tokens drawn at random: the control that selection methods have to beat."""

from dataclasses import dataclass
from hashlib import blake2b

import torch

from dop_compile.reducers.base import Selection, VisualContext

__all__ = ["RandomReducer"]


@dataclass(frozen=True)
class RandomReducer:
    """Keeps the first `count` of a seeded permutation, so that a smaller count keeps a subset of a larger.

    The draw depends on the seed, the number of tokens and the number of the image in its sample, on
    nothing else: neither content, batch, row nor device. It is drawn on the CPU for that reason.

    Raises:
        TypeError: a seed that is not an integer.
    """

    seed: int = 0
    name = "random"
    requires = frozenset[str]()
    reads_values = False

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise TypeError(f"reducer 'random': seed must be an integer, not {self.seed!r}")

    def __call__(self, context: VisualContext, count: int) -> Selection:
        # Hashed, because neighbouring seeds of a Mersenne twister are not independent, and because a sum
        # of the three numbers would make different draws coincide.
        key = f"{self.seed}:{context.tokens}:{context.segment_index}".encode()
        seed = int.from_bytes(blake2b(key, digest_size=8).digest(), "big", signed=True)
        generator = torch.Generator(device="cpu").manual_seed(seed)
        order = torch.randperm(context.tokens, generator=generator, device="cpu")
        return Selection(order[:count].to(context.projected.device))
