"""A small LLaVA with its processor, exported once per test run, and the PyTorch model that it has to agree with."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dop_compile import Policy, dop_compile
from dop_compile.hf.prompts import prompt_inputs
from dop_compile.onnx.export.export import export_onnx
from dop_compile.onnx.run.pipeline import OnnxPipeline
from tests.local_llava import local_llava, local_processor
from tests.onnx_export import exported

LAYERS, SIDE = 2, 56
TIERS = {
    "100%": Policy.full(LAYERS),
    "pruned": Policy.depthwise(LAYERS, mha_depth=1, mlp_depth=1, visual_tokens=6),
    "given": Policy.depthwise(LAYERS, mlp_depth=1, reducer="given"),
}
PROMPTS = ("What is on the table?", "USER: <image> which colour is this picture? ASSISTANT:", "a human asks")


@functools.cache
def processor() -> Any:
    return local_processor(SIDE)


@functools.cache
def model() -> Any:
    """Weights drawn at random; it ends no text by itself."""
    made = local_llava(layers=LAYERS, hidden=64, image_size=SIDE)
    made.generation_config.eos_token_id = None
    made.generation_config.suppress_tokens = None
    return made


@functools.cache
def compiled() -> Any:
    return dop_compile(model(), TIERS, backend="eager")


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


@functools.cache
def served() -> Path:
    example = prompt_inputs(processor(), "a", [picture()])
    return exported.once(
        "served",
        lambda folder: export_onnx(model(), TIERS, folder, examples=[example], processor=processor()),
    )


@functools.cache
def pipeline(memory: Any = "fast") -> OnnxPipeline:
    return OnnxPipeline.load(served(), memory=memory, measure=False, providers=["CPUExecutionProvider"])


def batch(rows: int = 3) -> dict[str, torch.Tensor]:
    """Rows of unlike lengths, the last without a picture, padded on the left."""
    images = [[picture(n)] for n in range(rows - 1)] + [[]]
    return pipeline().process(images, [PROMPTS[n % len(PROMPTS)] for n in range(rows)])


def in_pytorch(inputs: Any, tokens: int, **options: Any) -> list[list[int]]:
    """Greedy ids of the compiled PyTorch model."""
    with torch.no_grad():
        found = compiled().generate(**inputs, max_new_tokens=tokens, do_sample=False, **options)
    ids: list[list[int]] = found[:, inputs["input_ids"].shape[1] :].tolist()
    return ids
