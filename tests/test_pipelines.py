"""A compiled model where production code has a plain one: pipelines, streams, many threads."""

from __future__ import annotations

import functools
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, TextIteratorStreamer, pipeline

from digits_vlm import data, models
from dop_compile import Policy, UnsupportedUsageError, dop_compile

CHECKPOINT = Path(models.__file__).parent / "checkpoints" / "llava"
LAYERS = 8
TIERS = {
    "100%": Policy.full(LAYERS),
    "split": Policy.depthwise(LAYERS, mha_query_depth=3, mha_key_value_depth=7, mlp_depth=1),
    "few": Policy.depthwise(LAYERS, mha_depth=6, mlp_depth=2, visual_tokens=20),
    "none": Policy.depthwise(LAYERS, mha_depth=0, visual_tokens=4),
}


@functools.cache
def compiled() -> tuple[Any, Any, models.Reader]:
    model, reader = models.load(CHECKPOINT)
    return model, dop_compile(model, TIERS, backend="eager"), reader


def chat(example: data.Example) -> list[dict[str, Any]]:
    question = example.prompt.split("<image> ")[1].removesuffix(" Answer:")
    return [
        {"role": "user", "content": [{"type": "image", "image": example.image}, {"type": "text", "text": question}]}
    ]


def test_a_pipeline_answers_by_tier() -> None:
    """By `generate_kwargs`, of the pipeline or of one call, or by a view. `tier` alone goes to the processor."""
    model, pruned, reader = compiled()
    examples = list(data.examples("validation", 4, seed=7))
    processor = AutoProcessor.from_pretrained(CHECKPOINT)

    def said(own: Any, of_pipeline: dict[str, Any] | None = None, **settings: Any) -> list[str]:
        ask = pipeline("image-text-to-text", model=own, processor=processor, **(of_pipeline or {}))
        settings = {"generate_kwargs": settings} if settings else {}
        found = ask(text=[chat(e) for e in examples], return_full_text=False, **settings)
        return [(one[0] if isinstance(one, list) else one)["generated_text"].strip() for one in found]

    def alone(tier: str) -> list[str]:
        texts = []
        for example in examples:
            inputs = reader([example.image], [example.prompt])
            output = pruned.generate(**inputs, tier=tier)
            texts.append(reader.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        return texts

    assert said(model) == said(pruned) == alone("100%")
    assert said(pruned.tier("none")) == said(pruned, tier="none") == alone("none") != alone("100%")
    assert said(pruned, {"generate_kwargs": {"tier": "none"}}) == alone("none")


def test_a_stream_from_a_thread() -> None:
    _, pruned, reader = compiled()
    example = next(e for e in data.examples("validation", 20, seed=7) if e.kind == "row")
    inputs = reader([example.image], [example.prompt])
    streamer = TextIteratorStreamer(reader.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(target=pruned.generate, kwargs={**inputs, "streamer": streamer, "tier": "split"})
    thread.start()
    pieces = list(streamer)
    thread.join()
    output = pruned.generate(**inputs, tier="split")
    expected = reader.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(pieces) > 2
    assert "".join(pieces).split() == expected.split() == example.answer.split()


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused_before_it_changes_anything(name: str) -> None:
    model, pruned, _ = compiled()
    before = model.config._attn_implementation, pruned.config._attn_implementation
    with pytest.raises(UnsupportedUsageError, match="continuous batching"):
        getattr(pruned, name)([[1, 2, 3]])
    assert (model.config._attn_implementation, pruned.config._attn_implementation) == before


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of a process as Linux tells it")
@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.conformance)])
def test_eight_threads_of_mixed_requests(count: int) -> None:
    """Requests of all tiers, one to three pictures, different lengths: answers as one by one, no memory kept."""
    _, pruned, reader = compiled()
    draw = random.Random(0)
    examples = list(data.examples("validation", 40, seed=8))
    kinds = []
    for _ in range(25):
        chosen = draw.sample(examples, draw.randint(1, 3))
        inputs = reader([e.image for e in chosen], [e.prompt for e in chosen])
        kinds.append((inputs, draw.choice(list(TIERS)), draw.randint(1, 5)))

    @torch.no_grad()
    def answer(number: int) -> list[list[int]]:
        inputs, tier, tokens = kinds[number]
        rows: list[list[int]] = pruned.generate(**inputs, tier=tier, max_new_tokens=tokens).tolist()
        return rows

    expected = [answer(number) for number in range(len(kinds))]
    requests = [draw.randrange(len(kinds)) for _ in range(count)]
    with ThreadPoolExecutor(8) as pool:
        first = list(pool.map(answer, requests[: count // 3]))
        between = resident()
        rest = list(pool.map(answer, requests[count // 3 :]))
    assert [*first, *rest] == [expected[number] for number in requests]
    assert resident() - between < 64 << 20
