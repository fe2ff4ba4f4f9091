"""Relevance of visual tokens to a text, by the instruction's embeddings and by CLIP."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dop_compile import Policy
from dop_compile.reducers import (
    CDPrunerReducer,
    ClipRelevance,
    InstructionRelevance,
    TrimReducer,
    VisualContext,
    register,
    registry,
    select_tokens,
)
from tests.drawing import examples
from tests.reducers import plain
from tests.reducers.drawn import contexts
from tests.reducers.tiny_clip import WORDS, clip, decode, tokenizer
from tests.support import compile_eagerly, make_batch


def relevance() -> ClipRelevance:
    return ClipRelevance(clip(), tokenizer(), decode)


def context(text_tokens: int = 5, start: int = 0, seed: int = 0) -> VisualContext:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(9, 32, generator=generator)
    weight = torch.randn(32, 6, generator=generator)
    ids = torch.randint(0, 50, (text_tokens,), generator=generator)
    zeros = torch.zeros(9, dtype=torch.long)
    return VisualContext(
        features @ weight,
        torch.randn(text_tokens, 6, generator=generator),
        zeros,
        0,
        features=features,
        text_ids=ids,
        tiles=zeros,
        instruction_start=start,
        project=lambda rows: rows @ weight,
    )


@examples(30)
@given(st.lists(contexts(), min_size=1, max_size=3))
def test_instruction(samples: list[VisualContext]) -> None:
    for sample, found in zip(samples, InstructionRelevance()(samples), strict=True):
        text = sample.text.numpy()
        text = text[sample.instruction_start :] if sample.instruction_start < len(text) else text
        assert np.array_equal(found.numpy(), plain.relevance(sample.projected.numpy(), text))


@pytest.mark.parametrize(("text_tokens", "start"), [(1, 0), (6, 0), (6, 2), (20, 0)])
@torch.no_grad()
def test_clip(text_tokens: int, start: int) -> None:
    """A text of 20 tokens is read in segments of 6 words between begin and end."""
    sample = context(text_tokens, start)
    words = [WORDS[word] for word in decode(sample.text_ids[start:]).split()]
    segments = [words[i : i + 6] for i in range(0, len(words), 6)]
    model = clip()
    texts = [
        model.text_projection(model.text_model(input_ids=torch.tensor([[1, *segment, 2]])).pooler_output)[0]
        for segment in segments
    ]
    patches = model.visual_projection(model.vision_model.post_layernorm(sample.features))
    expected = [-np.mean([plain.cosine(p.numpy(), t.numpy()) for t in texts]) for p in patches]
    assert len(segments) == -(-(text_tokens - start) // 6)
    torch.testing.assert_close(relevance()([sample])[0], torch.tensor(expected).float(), rtol=1e-4, atol=1e-6)


def test_reducers_use_the_measure_that_they_are_given() -> None:
    sample = context()
    (scores,) = relevance()([sample])
    assert select_tokens(TrimReducer(relevance()), sample, 4).indices[:3].tolist() == scores.topk(3).indices.tolist()
    assert int(select_tokens(CDPrunerReducer(relevance()), sample, 3).indices[0]) == int(scores.argmax())
    assert int(select_tokens(CDPrunerReducer(), sample, 3).indices[0]) != int(scores.argmax())


def test_on_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP's relevance through a policy: the reducer is made known under a name of its own."""
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))
    register("cdpruner_clip", functools.partial(CDPrunerReducer, relevance()))
    batch = make_batch("llava", [[("text", 3), ("image",), ("text", 9)], [("image",), ("text", 2)]])
    policies = {name: Policy.depthwise(4, visual_tokens=3, reducer=name) for name in ("cdpruner_clip", "cdpruner")}
    compiled = compile_eagerly(batch.model, policies)
    with torch.no_grad():
        logits = {name: compiled(**batch.inputs, tier=name).logits[:, -1] for name in policies}
    assert not torch.equal(*logits.values())
    compiled.generate(**batch.inputs, max_new_tokens=2)


def test_what_clip_cannot_read() -> None:
    with pytest.raises(TypeError, match="a CLIPModel is needed; Linear lacks vision_model, visual_projection"):
        ClipRelevance(torch.nn.Linear(2, 2), tokenizer(), decode)
    narrow = context()
    narrow = VisualContext(**{**vars(narrow), "features": narrow.features[:, :16]})
    with pytest.raises(ValueError, match="tower is 32 wide, but the features before the projector are 16"):
        relevance()([narrow])
    silent = ClipRelevance(clip(), tokenizer(), lambda ids: " ")
    with pytest.raises(ValueError, match="instruction of sample 0 is decoded to an empty text"):
        silent([context()])
