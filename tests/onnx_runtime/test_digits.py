"""The trained model that is shipped, served: answers that mean something, and that end by themselves."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from digits_vlm import data
from dop_compile import Policy, dop_compile
from dop_compile.hf.prompts import prompt_inputs
from dop_compile.onnx.export.export import export_onnx
from dop_compile.onnx.run.pipeline import OnnxPipeline, Token
from tests.onnx_export import exported

pytest.importorskip("sklearn")  # the digits are its data
pytestmark = pytest.mark.conformance

CHECKPOINT = Path(__file__).parents[2] / "examples" / "digits_vlm" / "checkpoints" / "llava"
POLICY = Policy.depthwise(8, mha_depth=6, mlp_depth=4, visual_tokens=72)


@functools.cache
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval()


@functools.cache
def served() -> OnnxPipeline:
    def export(folder: Path) -> None:
        processor = AutoProcessor.from_pretrained(CHECKPOINT)
        examples = [prompt_inputs(processor, "Describe.", [data.canvas("validation", 0).image])]
        export_onnx(model(), {"half": POLICY}, folder, examples=examples, processor=processor)

    folder = exported.once("digits", export)
    return OnnxPipeline.load(folder, providers=["CPUExecutionProvider"], measure=False)


def questions(count: int) -> tuple[list[Any], list[str], list[str]]:
    """Of kinds with answers of one and of several tokens."""
    canvases = [data.canvas("validation", number) for number in range(count)]
    asked = [
        data.ask(canvas, ("row", "count", "read")[number % 3], np.random.default_rng(number))
        for number, canvas in enumerate(canvases)
    ]
    return [canvas.image for canvas in canvases], [q.text for q in asked], [q.answer for q in asked]


def test_answers_are_those_of_the_compiled_model() -> None:
    images, prompts, answers = questions(12)
    inputs = served().process([[image] for image in images], prompts)
    compiled = dop_compile(model(), {"half": POLICY}, backend="eager")
    with torch.no_grad():
        ids = compiled.generate(**inputs, tier="half", do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
    (end,) = served().manifest.model.eos_token_ids
    expected = [row[: row.index(end) + 1] if end in row else row for row in ids]
    seen: list[Token] = []
    found = served().generate(inputs, tier="half", stream=seen.append)
    assert found.ids == expected
    assert len({len(row) for row in expected}) > 1  # rows end at different steps
    assert ["".join(t.text for t in seen if t.row == row) for row in range(12)] == found.texts
    assert sum(text == answer for text, answer in zip(found.texts, answers, strict=True)) >= 6
    assert served()(images[0], prompts[0], tier="half") == found.texts[0]
