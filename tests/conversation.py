"""Turns of a conversation on one cache, and the same as one prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dop_compile import Policy
from tests.families import FAMILIES, FIRST_ORDINARY_ID, Family
from tests.support import Batch, Rows, compile_eagerly, extended, make_batch

__all__ = ["Conversation", "assert_original_over_two_turns", "conversation_batch", "joined"]


def conversation_batch(name: str | Family, rows: Rows | None) -> Batch:
    """With a model that does not answer with a special id, which a later turn would take for an image."""
    model = (FAMILIES[name] if isinstance(name, str) else name).build()
    with torch.no_grad():
        model.get_output_embeddings().weight[:FIRST_ORDINARY_ID] = 0
    return make_batch(name, rows, model=model)


class Conversation:
    """Turns of `generate` on one cache, and beside it the batch that holds all of them as one prompt."""

    def __init__(self, model: Any, batch: Batch, cache: Any = None):
        self.model = model
        self.batch: Batch | None = None
        self.turn, self.cache = batch, cache
        self.kept: list[list[int]] = [[] for _ in batch.counts]

    def ask(self, kept: list[list[int]] | None = None, tokens: int = 3) -> list[list[int]]:
        """Generate after the current turn; returns the new tokens."""
        if kept is not None:
            before = [0] * len(kept) if self.batch is None else self.batch.counts
            self.kept = [
                old + [n + index for index in new] for old, new, n in zip(self.kept, kept, before, strict=True)
            ]
        self.batch = self.turn if self.batch is None else joined(self.batch, self.turn)
        inputs = self.batch.inputs | {
            n: v for n, v in self.turn.inputs.items() if n.startswith(("pixel", "image", "spatial"))
        }
        inputs = {n: v for n, v in inputs.items() if n in self.turn.inputs}
        out = self.model.generate(
            **inputs,
            **({} if kept is None else {"visual_indices": kept}),
            past_key_values=self.cache,
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        self.cache = out.past_key_values
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        assert (new >= FIRST_ORDINARY_ID).all()
        self.asked, self.batch = self.batch, extended(self.batch, new)
        return new.tolist()

    def say(self, rows: Rows, padding: str = "left") -> None:
        family = self.turn.family
        inputs = family.make_inputs(self.turn.model, rows, padding=padding, seed=9)
        if not any(segment[0] == "image" for row in rows for segment in row):
            inputs.pop(family.type_ids or "", None)
        towers = None if self.turn.towers is None else family.make_towers(self.turn.model, rows, seed=9)
        self.turn = replace(self.turn, inputs=inputs, towers=towers)


def joined(first: Batch, second: Batch) -> Batch:
    inputs = second.inputs | first.inputs
    for name, value in first.inputs.items():
        if name in ("input_ids", "attention_mask"):
            inputs[name] = torch.cat([value, second.inputs[name]], 1)
        elif name == first.family.type_ids:
            more = second.inputs.get(name, torch.zeros_like(second.inputs["input_ids"]))
            inputs[name] = torch.cat([value, more], 1)
        elif name in second.inputs:
            inputs[name] = torch.cat([value, second.inputs[name]], 0)
    towers = None
    if first.towers is not None and second.towers is not None:
        towers = [
            {**old, **new, **{name: torch.cat([old[name], new[name]]) for name in old.keys() & new.keys()}}
            for old, new in zip(first.towers, second.towers, strict=True)
        ]
    return replace(first, inputs=inputs, towers=towers)


def assert_original_over_two_turns(batch: Batch) -> None:
    """100 % answers as the untouched model does, also in a turn of text after the first."""
    answers = []
    for model in (batch.model, compile_eagerly(batch.model, Policy.full(batch.family.num_layers))):
        talk = Conversation(model, batch)
        first = talk.ask()
        talk.say([[("text", 3)]])
        answers.append((first, talk.ask()))
    assert answers[0] == answers[1]
