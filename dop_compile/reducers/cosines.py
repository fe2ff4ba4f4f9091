"""Cosines of many tokens, as they are asked for: never all of them with all.

`exact` ones are those of `numbers.cosine`: summed up in float64, rounded to float32, in which choices are made. `near`
ones are float32 products, which are twice as fast, and differ from the exact ones by no more than `error`: they tell
which exact ones a choice can depend on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dop_compile.reducers.numbers import wide

__all__ = ["Cosines", "product"]

ROWS = 512
"""Of features that are converted at a time. What is found of them is written to its place: results that are small, and
kept between large ones that are not, would leave no room where these have been."""
PAIR_NUMBERS = 1 << 19


def product(a: Tensor, b: Tensor) -> Tensor:
    """(n, m) float32 a @ b.T, also where autocast would take a narrower dtype."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.T


class Cosines:
    """Cosines of one part's features (tokens, dim), of any dtype."""

    def __init__(self, features: Tensor):
        self._features = features
        self.tokens, self.dim = features.shape
        tiny = torch.finfo(torch.float32).tiny
        norms = torch.empty(self.tokens, dtype=wide(features.device), device=features.device)
        for part, into in zip(features.split(ROWS), norms.split(ROWS), strict=True):
            into.copy_(torch.linalg.vector_norm(part.to(norms.dtype), dim=1))
        self._scale = 1 / norms.clamp(min=tiny)
        # Every order of summation keeps within dim roundings of the sum of magnitudes, which is at most 1. Settings
        # that let float32 products be rounded to bfloat16 first cost 2^-8 more.
        self.error = (self.dim + 16) * 2.0**-24 + (0 if torch.get_float32_matmul_precision() == "highest" else 2.0**-7)

    @property
    def device(self) -> torch.device:
        return self._features.device

    def units(self, tokens: Tensor | slice) -> Tensor:
        """(n, dim) of length 1, in the dtype of sums."""
        return self._features[tokens].to(self._scale.dtype) * self._scale[tokens][:, None]

    def narrow_units(self, tokens: Tensor) -> Tensor:
        """(n, dim) float32 for `product`; what is not a number is 0."""
        result = torch.empty(len(tokens), self.dim, device=self.device)
        for into, part in zip(result.split(ROWS), tokens.to(self.device).split(ROWS), strict=True):
            into.copy_(torch.nan_to_num(self.units(part)))
        return result

    def with_units(self, tokens: Tensor, units: Tensor) -> Tensor:
        """(n, m) float32 exact cosines of tokens with rows of `units`."""
        return torch.nan_to_num((self.units(tokens) @ units.T).float())

    def own(self) -> Tensor:
        """(tokens,) float32 cosine of each token with itself: 1, or 0."""
        result = torch.empty(self.tokens, device=self.device)
        for first, into in zip(range(0, self.tokens, ROWS), result.split(ROWS), strict=False):
            into.copy_(self.units(slice(first, first + ROWS)).square().sum(dim=1))
        return torch.nan_to_num(result)

    def pairs(self, tokens: Tensor, others: Tensor) -> Tensor:
        """(n, k) float32 exact cosines of tokens (n,) with others (n, k), both on the CPU as is the result."""
        step = max(1, PAIR_NUMBERS // max(1, self.dim * others.shape[1]))
        tokens, others = tokens.to(self.device), others.to(self.device)
        found = torch.empty(others.shape, device=self.device)
        for into, one, other in zip(found.split(step), tokens.split(step), others.split(step), strict=True):
            rows = self._features[other.flatten()].to(self._scale.dtype).view(*other.shape, self.dim)
            into.copy_((rows @ self.units(one)[..., None])[..., 0] * self._scale[other])
        return torch.nan_to_num(found).cpu()
