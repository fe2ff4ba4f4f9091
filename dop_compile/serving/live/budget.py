"""How long each tier takes to the first token on this machine, and the largest one that keeps to a limit.

Measured when the server starts: every tier reads a short and a longer prompt, with a picture and without. What a
request will take is read off the line through the two, at its number of tokens before reduction.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dop_compile.hf.model_path import placeholder_ids
from dop_compile.policy.costs import prefill_flops
from dop_compile.policy.policy import Policy
from dop_compile.serving.live.prompts import Prompts
from dop_compile.serving.requests import RequestError

__all__ = ["Budget", "Line"]

RUNS = 3
SIDE = 336
WORDS = (1, 100)
"""Of the measured prompts."""


@dataclass(frozen=True)
class Line:
    """Milliseconds to the first token by number of prompt tokens: linear, and not below the smallest measured.

    Args:
        points: (tokens, milliseconds), ascending.
    """

    points: tuple[tuple[int, float], ...]

    def milliseconds(self, tokens: int) -> float:
        (first, ms), (last, last_ms) = self.points[0], self.points[-1]
        slope = max((last_ms - ms) / (last - first), 0.0) if last > first else 0.0
        return ms + slope * max(tokens - first, 0)


class Budget:
    """Predictions for every tier of a compiled model; measures them when it is made."""

    def __init__(self, model: Any, prompts: Prompts, policies: Mapping[str, Policy]):
        self._policies = policies
        self._config = model.config
        self._placeholders = torch.tensor(placeholder_ids(model.config))
        self.lines = {
            (tier, pictures): _measure(model, prompts, policies, tier, pictures)
            for tier in policies
            for pictures in (False, True)
        }

    def choose(self, max_ms: float, input_ids: Tensor, pictures: int) -> str:
        """The tier of the most operations whose first token is predicted to come in time.

        Args:
            input_ids: (1, tokens) as the first tier reads the prompt.
            pictures: in it.

        Raises:
            RequestError: there is none.
        """
        tokens = int(input_ids.shape[1])
        predicted = {tier: self.lines[tier, pictures > 0].milliseconds(tokens) for tier in self._policies}
        fitting = [tier for tier in predicted if predicted[tier] <= max_ms]
        if not fitting:
            fastest = min(predicted, key=lambda tier: predicted[tier])
            raise RequestError(
                f"max_ms: no tier is predicted to fit {max_ms:g} ms; the fastest, {fastest!r}, takes about "
                f"{predicted[fastest]:.3g} ms for this prompt; allow more, or name a tier"
            )
        visual = int(torch.isin(input_ids, self._placeholders).sum())
        return max(fitting, key=lambda tier: self._flops(tier, visual, tokens - visual))

    def _flops(self, tier: str, visual: int, text: int) -> int:
        return prefill_flops(self._config, self._policies[tier], system=0, visual=visual, text=text)


def _measure(model: Any, prompts: Prompts, policies: Mapping[str, Policy], tier: str, pictures: bool) -> Line:
    picture = [{"type": "image", "image": Image.effect_noise((SIDE, SIDE), 64).convert("RGB")}] if pictures else []
    default = policies[next(iter(policies))]
    points = []
    for words in WORDS:
        messages = [{"role": "user", "content": [*picture, {"type": "text", "text": " ".join(["describe"] * words)}]}]
        tokens = int(prompts.read([messages], default)["input_ids"].shape[1])
        inputs = prompts.read([messages], policies[tier]).to(model.device, model.dtype)
        points.append((tokens, _first_token_ms(model, inputs, tier)))
    return Line(tuple(sorted(points)))


def _first_token_ms(model: Any, inputs: Any, tier: str) -> float:
    times = []
    for _ in range(1 + RUNS):  # the first run compiles and allocates
        started = time.perf_counter()
        model.generate(**inputs, tier=tier, max_new_tokens=1, do_sample=False)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[1:])
