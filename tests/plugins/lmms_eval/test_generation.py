"""Generation arguments of tasks, stop strings and losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dop_compile.plugins.lmms_eval.generation import AtStops, Forced, cut, losses, settings_of, stops_of


@pytest.mark.parametrize(
    ("given", "sampled"),
    [
        ({}, False),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, False),
        ({"temperature": 0}, False),
        ({"temperature": 0.2}, True),
        ({"do_sample": True, "temperature": 0.2}, True),
        ({"do_sample": True, "temperature": 0}, False),
    ],
)
def test_answers_are_greedy_unless_a_temperature_is_given(given: dict[str, Any], sampled: bool) -> None:
    settings, unknown = settings_of({**given, "until": ["\n"]}, 32)
    assert settings["do_sample"] is sampled
    assert settings["temperature"] == (given["temperature"] if sampled else None)
    assert settings["max_new_tokens"] == 32
    assert settings["num_beams"] == 1
    assert "until" not in settings
    assert not unknown


def test_what_the_task_says_goes_before_and_the_unknown_is_named() -> None:
    given = {"max_new_tokens": 4, "num_beams": 3, "image_aspect_ratio": "original", "top_p": None}
    settings, unknown = settings_of(given, 32)
    assert (settings["max_new_tokens"], settings["num_beams"]) == (4, 3)
    assert unknown == ("image_aspect_ratio",)
    assert "image_aspect_ratio" not in settings


def test_stops() -> None:
    assert stops_of({"until": "\n\n"}) == ("\n\n",)
    assert stops_of({"until": ["a", ""]}) == ("a",)
    assert stops_of({"until": None}) == stops_of({}) == ()
    with pytest.raises(TypeError, match="until: expected strings"):
        stops_of({"until": [3]})
    assert cut("one. two\n", ("\n", ". ")) == "one"
    assert cut("one", ("two",)) == "one"
    assert cut("one", ()) == "one"


def test_a_row_ends_with_its_stop_string_only() -> None:
    words = ["?", "a", "b", "END"]

    def decode(ids: Tensor) -> list[str]:
        return ["".join(words[number] for number in row) for row in ids.tolist()]

    ends = AtStops(["END", "ab"], decode, columns=1)
    said = torch.tensor([[3, 1, 1], [3, 1, 2], [1, 2, 1], [0, 3, 1]])
    assert ends(said, None).tolist() == [False, True, False, True]  # the prompt, in column 0, is not looked at


def test_losses_are_those_of_the_model() -> None:
    logits = torch.randn(4, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # step, row, word
    best = logits.argmax(dim=-1).T
    tokens = torch.stack([torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, -1, -1]), best[2]])
    found = losses(tokens, list(logits))
    for row, (loss, greedy) in enumerate(found):
        expected = F.cross_entropy(logits[:, row], tokens[row], ignore_index=-1)  # a mean, as models return it
        assert loss == pytest.approx(float(expected), rel=1e-12)
        assert greedy is bool(((tokens[row] == best[row]) | (tokens[row] < 0)).all())
    assert found[2][1]
    assert losses(torch.full((1, 4), -1), list(logits)) == [(0.0, True)]


def test_forced_tokens_are_the_only_ones_left() -> None:
    forced = Forced(torch.tensor([[4, 2], [3, -1]]), columns=5)
    scores = torch.randn(2, 7)
    assert forced(torch.zeros(2, 5), scores).argmax(dim=-1).tolist() == [4, 3]
    second = forced(torch.zeros(2, 6), scores)
    assert int(second[0].argmax()) == 2
    assert (second > -torch.inf).sum(dim=-1).tolist() == [1, 1]
