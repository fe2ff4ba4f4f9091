"""Probabilities against transformers' own logits processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dop_compile.onnx.run.sampling import Sampler, Sampling, probabilities
from dop_compile.onnx.run.stream import Token, TokenStream

VOCABULARY = 12


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.05, 5),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.floats(0.01, 1),
)
def test_probabilities_are_transformers(seed: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits = np.random.default_rng(seed).normal(size=VOCABULARY) * 3
    scores = torch.tensor(logits)[None]
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None and top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    found = probabilities(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    np.testing.assert_allclose(found, scores.softmax(-1)[0].numpy(), atol=1e-12)


def test_equal_logits_at_the_edge_of_top_k() -> None:
    logits = np.array([1.0, 2.0, 2.0, 3.0])
    assert probabilities(logits, Sampling(temperature=1, top_k=2)).nonzero()[0].tolist() == [1, 2, 3]


def test_penalty_counts_prompt_and_generated_but_not_padding() -> None:
    prompts, valid = np.array([[0, 1, 2], [3, 3, 1]]), np.array([[False, True, True], [True, True, True]])
    sampler = Sampler(Sampling(repetition_penalty=2.0), prompts, valid, 4)
    processor = RepetitionPenaltyLogitsProcessor(2.0)
    rng = np.random.default_rng(0)
    held = [[1, 2], [3, 3, 1]]
    for _ in range(4):
        logits = rng.normal(size=(2, 4))
        expected = [
            int(processor(torch.tensor([ids]), torch.tensor(row)[None]).argmax())
            for ids, row in zip(held, logits, strict=True)
        ]
        chosen = sampler.pick(logits).tolist()
        assert chosen == expected
        for ids, token in zip(held, chosen, strict=True):
            ids.append(token)


def test_rows_draw_apart_and_nothing_impossible() -> None:
    prompts = np.zeros((64, 1), dtype=np.int64)
    sampler = Sampler(Sampling(temperature=1.0, top_k=3, seed=0), prompts, prompts == 0, VOCABULARY)
    chosen = sampler.pick(np.tile(np.arange(VOCABULARY) / 4, (64, 1)))
    assert set(chosen.tolist()) == {9, 10, 11}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1.0, "top_k": 0}, "top_k"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p"),
        ({"top_p": 0.5}, "set temperature"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)  # type: ignore[arg-type]


def test_text_of_incomplete_characters_waits() -> None:
    """Each id is a byte."""

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    seen: list[Token] = []
    found = TokenStream(1, {0}, 20, decode, seen.append)  # type: ignore[arg-type]
    for byte in "aé€!".encode():
        found.add([byte])
    assert [token.text for token in seen] == ["a", "", "é", "", "", "€", "!"]
    assert not found.done
    found.add([0xC3])
    found.add([0])
    assert found.done
    assert "".join(token.text for token in seen) == decode(found.ids[0])
