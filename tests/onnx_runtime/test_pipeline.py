"""`OnnxPipeline` says what the compiled PyTorch model says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from dop_compile import dop_compile
from dop_compile.onnx.run import decode as runtime_decode
from dop_compile.onnx.run.pipeline import OnnxPipeline, Sampling, Token
from tests.onnx_export.exported import TIERS as FAMILY_TIERS
from tests.onnx_export.exported import batch_of, exported
from tests.onnx_runtime import served
from tests.onnx_runtime.served import PROMPTS, batch, in_pytorch, picture, pipeline, processor

TOKENS = 6


@pytest.mark.parametrize("memory", ["fast", "shared"])
@pytest.mark.parametrize("tier", ["100%", "pruned"])
def test_image_and_prompt_to_text(tier: str, memory: str) -> None:
    inputs = processor()(images=[picture(3)], text=f"<image>\n{PROMPTS[0]}", return_tensors="pt")
    expected = in_pytorch(inputs, TOKENS, tier=tier)[0]
    assert len(set(expected)) > 1  # a model that repeats one word would hide errors in decoding
    assert pipeline(memory)(picture(3), PROMPTS[0], tier=tier, max_new_tokens=TOKENS) == processor().decode(
        expected, skip_special_tokens=True
    )


def test_first_tier_is_the_default() -> None:
    inputs = batch()
    found = pipeline().generate(inputs, max_new_tokens=2)
    assert (found.tier, found.ids) == ("100%", in_pytorch(inputs, 2, tier="100%"))
    assert 0 < found.first_token_ms < found.total_ms


@pytest.mark.parametrize("tier", ["100%", "pruned"])
def test_left_padded_batch(tier: str) -> None:
    inputs = batch()
    assert not inputs["attention_mask"].all(1).all()
    found = pipeline().generate(inputs, tier=tier, max_new_tokens=TOKENS)
    assert found.ids == in_pytorch(inputs, TOKENS, tier=tier)
    assert found.texts == processor().batch_decode(found.ids, skip_special_tokens=True)


def test_a_batch_from_images_and_prompts() -> None:
    prompts = ["What is this?", PROMPTS[1], "a"]
    images = [picture(0), picture(1), None]
    together = pipeline()(images, prompts, tier="pruned", max_new_tokens=TOKENS)
    alone = [pipeline()(i, p, tier="pruned", max_new_tokens=TOKENS) for i, p in zip(images, prompts, strict=True)]
    assert together == alone


def test_the_reducers_graph_serves_prompts_with_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """And Python the others: two images in a prompt are reduced as one sample."""
    found = pipeline()
    session = found._stages.session(found.manifest.tiers["pruned"].reducer.graph)
    kept: list[list[int]] = []

    def noted(inputs: Any) -> Any:
        outputs = run(inputs)
        kept.append(outputs["indices"].tolist())
        return outputs

    run = session.run
    monkeypatch.setattr(session, "run", noted)
    inputs = batch()
    assert found.generate(inputs, tier="pruned", max_new_tokens=2).ids == in_pytorch(inputs, 2, tier="pruned")
    assert kept == [[1, 4, 6, 9, 12, 14]] * 2, "one image of 16 tokens in each of two rows"
    two = found.process([[picture(0), picture(1)]], ["<image> or <image> ?"])
    assert found.generate(two, tier="pruned", max_new_tokens=2).ids == in_pytorch(two, 2, tier="pruned")
    assert len(kept) == 2
    altered = iter([[0, 1, 2, 3, 4, 5]])

    def other(inputs: Any) -> Any:
        indices = torch.tensor(next(altered))
        return {"indices": indices, "kept": inputs["features"][indices]}

    monkeypatch.setattr(session, "run", other)
    one = found.process([[picture(0)]], [PROMPTS[0]])
    assert found.generate(one, tier="pruned", max_new_tokens=TOKENS).ids != in_pytorch(one, TOKENS, tier="pruned")


def test_images_without_text_between_them() -> None:
    """Four images share 6 tokens as 2, 2, 1 and 1; a stride through their 64 tokens as one would keep others."""
    found = pipeline()
    inputs = found.process([[picture(n) for n in range(4)], [picture(4)]], ["a <image><image><image><image> b ?", "c"])
    prepared = found._stages.prepare("pruned", inputs)
    first = (inputs["input_ids"] == 4).long().argmax(1) - inputs["attention_mask"].argmax(1)
    kept = prepared.inputs["position_ids.visual"] - first[:, None]
    assert kept.tolist() == [[4, 12, 20, 28, 40, 56], [1, 4, 6, 9, 12, 14]]
    expected = in_pytorch(inputs, TOKENS, tier="pruned")
    assert found.generate(inputs, tier="pruned", max_new_tokens=TOKENS).ids == expected


def test_numpy_arrays() -> None:
    inputs = batch()
    arrays = {name: value.numpy() for name, value in inputs.items()}
    assert pipeline().generate(arrays, max_new_tokens=3).ids == pipeline().generate(inputs, max_new_tokens=3).ids


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_buffers_grow(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Over several blocks, and with capacities that are just enough."""
    monkeypatch.setattr(runtime_decode, "BLOCK", 3)
    inputs = batch()
    for tier in ("100%", "pruned"):
        assert pipeline().generate(inputs, tier=tier, max_new_tokens=tokens).ids == in_pytorch(
            inputs, tokens, tier=tier
        )


def test_named_visual_tokens() -> None:
    inputs = batch()
    kept = [[0, 2, 3], [15], []]
    expected = in_pytorch(inputs, TOKENS, tier="given", visual_indices=kept)
    found = pipeline().generate(inputs, tier="given", visual_indices=kept, max_new_tokens=TOKENS)
    assert found.ids == expected
    with pytest.raises(ValueError, match="visual_indices"):
        pipeline().generate(inputs, tier="given")


def test_stop_tokens_end_rows_one_by_one() -> None:
    inputs = batch()
    free = in_pytorch(inputs, TOKENS, tier="100%")
    stop = free[0][2]
    found = pipeline().generate(inputs, max_new_tokens=TOKENS, stop_token_ids=[stop]).ids
    assert found == [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert len(found[0]) < TOKENS


def test_streaming() -> None:
    """Step by step, in each step row by row, without rows that have ended; texts add up."""
    inputs = batch()
    stop = in_pytorch(inputs, TOKENS, tier="100%")[0][2]
    seen: list[Token] = []
    found = pipeline().generate(inputs, max_new_tokens=TOKENS, stop_token_ids=[stop], stream=seen.append)
    steps = [
        (step, row, ids[step], step == len(ids) - 1)
        for step in range(TOKENS)
        for row, ids in enumerate(found.ids)
        if step < len(ids)
    ]
    assert [(token.row, token.id, token.last) for token in seen] == [step[1:] for step in steps]
    assert ["".join(token.text for token in seen if token.row == row) for row in range(3)] == found.texts


def test_errors_of_the_callback_come_out() -> None:
    def stop(_: Token) -> None:
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        pipeline().generate(batch(), stream=stop)


def test_repetition_penalty_is_transformers() -> None:
    inputs = batch()
    free = in_pytorch(inputs, TOKENS, tier="pruned")
    expected = in_pytorch(inputs, TOKENS, tier="pruned", repetition_penalty=3.0)
    assert free != expected
    sampling = Sampling(repetition_penalty=3.0)
    assert pipeline().generate(inputs, tier="pruned", max_new_tokens=TOKENS, sampling=sampling).ids == expected


def test_draws_follow_the_model() -> None:
    """First tokens of many seeds against PyTorch's probabilities."""
    inputs = batch()
    with torch.no_grad():
        logits = served.compiled()(**inputs, tier="pruned").logits[:, -1]
    top = logits.topk(4).indices
    expected = torch.zeros_like(logits).scatter(1, top, (logits.gather(1, top) / 1.5).softmax(-1))
    seen = torch.zeros_like(expected)
    for seed in range(150):
        sampling = Sampling(temperature=1.5, top_k=4, seed=seed)
        chosen = pipeline().generate(inputs, tier="pruned", max_new_tokens=1, sampling=sampling).ids
        seen[range(3), [row[0] for row in chosen]] += 1 / 150
    # Of 4 classes and 150 draws the total variation is below 0.15 in all but one of some thousand runs
    assert ((seen - expected).abs().sum(1) / 2 < 0.15).all()
    assert (seen.gt(0).sum(1) == 4).all()


def test_seeds() -> None:
    inputs = batch()

    def drawn(seed: int | None) -> list[list[int]]:
        return pipeline().generate(inputs, max_new_tokens=8, sampling=Sampling(temperature=2.0, seed=seed)).ids

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(None) != drawn(None)


def test_several_threads() -> None:
    inputs = batch()
    jobs = ["100%", "pruned"] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda tier: pipeline().generate(inputs, tier=tier, max_new_tokens=4).ids, jobs))
    expected = {tier: in_pytorch(inputs, 4, tier=tier) for tier in ("100%", "pruned")}
    assert found == [expected[tier] for tier in jobs]


def test_positions_by_the_models_own_rule_and_no_processor() -> None:
    """Qwen2.5-VL: M-RoPE; inputs from outside, since the directory holds no processor."""
    rows: Any = [[("text", 5)], [("text", 3), ("image", 0), ("text", 4)], [("text", 1), ("image", 0), ("text", 7)]]
    given = batch_of("qwen2_5_vl", rows)
    compiled = dop_compile(given.model, FAMILY_TIERS, backend="eager")
    found = OnnxPipeline.load(exported("qwen2_5_vl"), providers=["CPUExecutionProvider"], measure=False)
    for tier in FAMILY_TIERS:
        with torch.no_grad():
            ids = compiled.generate(**given.inputs, tier=tier, max_new_tokens=4, do_sample=False)
        result = found.generate(given.inputs, tier=tier, max_new_tokens=4)
        assert result.ids == ids[:, given.inputs["input_ids"].shape[1] :].tolist()
        assert result.texts == ["", "", ""]
    with pytest.raises(ValueError, match="holds no tokenizer"):
        found(picture(), "What?")
