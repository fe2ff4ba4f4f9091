"""Generation arguments of lmms-eval's tasks as those of `generate`, and answers cut at stop strings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

__all__ = ["AtStops", "Forced", "cut", "losses", "settings_of", "stops_of"]

hf: Any = transformers

KNOWN = frozenset(hf.GenerationConfig().to_dict())
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
UNTIL = "until"


def stops_of(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The strings at which an answer ends; TypeError for anything but strings."""
    until = given.get(UNTIL) or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(stop, str) for stop in stops):
        raise TypeError(f"generation_kwargs: until: expected strings, got {until!r}")
    return tuple(stop for stop in stops if stop)


def settings_of(given: Mapping[str, Any], max_new_tokens: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Arguments of `generate`, and the names among `given` that it does not know.

    Greedy unless `do_sample` or a temperature above zero asks for sampling; one beam unless told. `max_new_tokens` is
    that of tasks that say nothing.
    """
    own = {name: value for name, value in given.items() if name != UNTIL and value is not None}
    unknown = tuple(sorted(name for name in own if name not in KNOWN))
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": 1}
    settings |= {name: value for name, value in own.items() if name in KNOWN}
    warm = float(settings.get("temperature") or 0.0) > 0
    settings["do_sample"] = warm and bool(settings.get("do_sample", True))
    if not settings["do_sample"]:
        settings |= dict.fromkeys(SAMPLING)  # None also over the checkpoint's own
    return settings, unknown


def cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]


class AtStops(StoppingCriteria):
    """Ends a row once its answer holds one of the stop strings.

    transformers' own `stop_strings` looks at tokens, and fails for tokenizers that change letters.

    Args:
        decode: rows of token ids to texts.
        columns: of the prompt.
    """

    def __init__(self, stops: Sequence[str], decode: Callable[[Tensor], list[str]], columns: int):
        self._stops, self._decode, self._columns = tuple(stops), decode, columns

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(rows,) bool."""
        texts = self._decode(input_ids[:, self._columns :])
        return torch.tensor([cut(text, self._stops) != text for text in texts], device=input_ids.device)


class Forced(LogitsProcessor):
    """Makes `generate` say given tokens.

    Args:
        tokens: (rows, steps) what each row says; -1 behind its end, where any token will do.
        columns: of the prompt.
    """

    def __init__(self, tokens: Tensor, columns: int):
        self._tokens, self._columns = tokens.clamp(min=0), columns

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, vocabulary) scores that leave the next token alone."""
        wanted = self._tokens[:, input_ids.shape[1] - self._columns].to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, wanted[:, None], 0.0)


def losses(tokens: Tensor, logits: Sequence[Tensor]) -> list[tuple[float, bool]]:
    """Per row the mean of minus the log-probability of its tokens, in nats, and whether each was the likeliest.

    Args:
        tokens: (rows, steps) ids, -1 behind a row's end; a row without tokens has a loss of 0.
        logits: per step (rows, vocabulary), what the model thought before that token.
    """
    found = []
    for row, ids in enumerate(tokens.tolist()):
        said = [(logits[step][row].double(), number) for step, number in enumerate(ids) if number >= 0]
        total = -sum(float(scores.log_softmax(dim=-1)[number]) for scores, number in said)
        found.append((total / max(len(said), 1), all(int(scores.argmax()) == number for scores, number in said)))
    return found
