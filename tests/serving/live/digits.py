"""The trained models that read digits, compiled under two tiers, and questions to them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from PIL import Image

from digits_vlm import data
from dop_compile import Policy, dop_compile
from dop_compile.hf.processors import load_processor
from dop_compile.serving.live.engine import LiveEngine
from dop_compile.serving.requests import Request

CHECKPOINTS = Path(__file__).parents[3] / "examples" / "digits_vlm" / "checkpoints"
LAYERS, KEPT = 8, {"llava": 91, "qwen2_5_vl": 40}
QUESTIONS = ("Read row 1.", "Which digit is in row 1 column 3?", "Is there any 8?", "How many 6 are there?")


@functools.cache
def compiled(name: str) -> tuple[Any, Any]:
    """Model and processor."""
    model = hf.AutoModelForImageTextToText.from_pretrained(CHECKPOINTS / name).eval()
    pruned = Policy.depthwise(LAYERS, mha_depth=6, mlp_depth=2, visual_tokens=KEPT[name])
    tiers = {"100%": Policy.full(LAYERS), "34%": pruned}
    return dop_compile(model, tiers, backend="eager"), load_processor(CHECKPOINTS / name)


def engine(name: str = "llava", **settings: Any) -> LiveEngine:
    return LiveEngine(*compiled(name), **{"measure": False, **settings})


def canvas(number: int) -> Image.Image:
    return data.canvas("validation", number).image


def question(number: int, text: str = QUESTIONS[0], **settings: Any) -> Request:
    content = [{"type": "image", "image": canvas(number)}, {"type": "text", "text": text}]
    given: dict[str, Any] = {"tier": None, "max_ms": None, "max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0}
    given |= {"top_k": 0, "seed": None, "stop": ()} | settings
    return Request(messages=[{"role": "user", "content": content}], **given)


@torch.no_grad()
def generated(name: str, request: Request) -> tuple[str, str, int]:
    """Text, finish reason and number of tokens, by `generate` alone."""
    model, processor = compiled(name)
    inputs = processor.apply_chat_template(
        request.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    drawn = {}
    if request.temperature:
        torch.manual_seed(request.seed)
        drawn = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
    settings = {"do_sample": bool(drawn), "max_new_tokens": request.max_new_tokens, **drawn}
    output = model.generate(**inputs, tier=request.tier or "100%", **settings)
    ids = output[0, inputs["input_ids"].shape[1] :]
    finish = "stop" if ids[-1] == model.generation_config.eos_token_id else "length"
    return processor.decode(ids, skip_special_tokens=True), finish, len(ids)


def run(engine: Any, requests: list[Request]) -> list[tuple[str, str, int]]:
    """Text, finish reason and tokens of each, with as many at once as there is room for."""
    waiting = [engine.prepare(request) for request in requests]
    numbers: dict[int, int] = {}
    found = [["", "", 0] for _ in requests]
    while len(numbers) < len(requests) or engine.running:
        while len(numbers) < len(requests) and engine.running < engine.max_batch:
            numbers[engine.admit(waiting[len(numbers)])] = len(numbers)
        for event in engine.step():
            row: list[Any] = found[numbers[event.id]]
            row[0] += event.text
            row[1] = event.finish or ""
            row[2] += event.tokens
    return [tuple(row) for row in found]  # type: ignore[misc]
