"""Small exports, made once per test run and kept in a temporary directory, and ways to run them."""

from __future__ import annotations

import fcntl
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dop_compile import Policy
from dop_compile.onnx.contract.manifest import Manifest
from dop_compile.onnx.export.export import export_onnx
from dop_compile.onnx.export.shapes import Shapes
from dop_compile.onnx.run.plain import PlainPipeline
from tests.families import Family, Segment
from tests.onnx_export.harness import LAYERS, small_batch, small_family, small_model

PRUNED = Policy.depthwise(LAYERS, mha_query_depth=1, mha_key_value_depth=1, mlp_depth=0, visual_tokens=5)
TIERS = {"100%": Policy.full(LAYERS), "pruned": PRUNED}
PROVIDER = "CPUExecutionProvider"


ROOT: list[Path] = []
"""Where exports are kept for this test run, which several processes may share; set by conftest."""


def example_rows(family: Family) -> list[list[Segment]]:
    """Per row one image (of each layout that has a vision graph) or video."""
    rows: list[list[Segment]] = [[("text", 3), ("image", 0), ("text", 4)]]
    if family.has_video:
        rows.append([("text", 2), ("video",), ("text", 4)])
    return rows


def once(name: str, export: Callable[[Path], object]) -> Path:
    """The folder of that name, made by `export` in the first process that asks for it."""
    folder = ROOT[0] / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            export(folder)
    return folder


@functools.cache
def exported(name: str, opset: int = 23, dtype: torch.dtype = torch.float32) -> Path:
    """A family with `TIERS`; in another opset or dtype only with the pruned one."""
    family = small_family(name)
    model = small_model(name) if dtype == torch.float32 else family.build(dtype=dtype)
    examples = [family.make_inputs(model, [row], seed=n) for n, row in enumerate(example_rows(family))]
    tiers = TIERS if opset == 23 and dtype == torch.float32 else {"pruned": PRUNED}
    return once(
        f"{name}-{opset}-{str(dtype)[6:]}",
        lambda folder: export_onnx(model, tiers, folder, examples=examples, opset=opset),
    )


STATIC_TIERS = {"full": Policy.full(1)} | {
    str(n): Policy.depthwise(1, mlp_depth=n % 2, visual_tokens=3 + n) for n in range(2)
}


@functools.cache
def static_model() -> Any:
    """LLaVA of one layer, whose weights are most of what its export takes."""
    family = small_family("llava", 1)
    config = family.config()
    config.text_config.intermediate_size = 8192
    config.text_config.vocab_size = 8192
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family.model_class._from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def static_export() -> Path:
    """`static_model` for prompts of 12 text tokens with one image, and 4 tokens after the first."""
    shapes = Shapes(batch=(1, 1, 1), text=(2, 12, 12), new_tokens=4, static=True)
    example = small_family("llava", 1).make_inputs(static_model(), [[("text", 3), ("image",), ("text", 3)]])
    return once(
        "static",
        lambda folder: export_onnx(static_model(), STATIC_TIERS, folder, examples=[example], shapes=shapes),
    )


@functools.cache
def pipeline(name: str, optimized: bool, opset: int = 23, dtype: torch.dtype = torch.float32) -> PlainPipeline:
    folder = exported(name, opset, dtype)
    return PlainPipeline(folder, Manifest.load(folder), small_model(name), PROVIDER, optimized)


def run(found: PlainPipeline, tier: str, inputs: dict[str, Tensor], tokens: int) -> tuple[Tensor, list[list[int]]]:
    logits, ids = found.generate(tier, found.prepare(tier, inputs), tokens)
    return logits, ids.tolist()


def batch_of(name: str, rows: Any, seed: int = 0) -> Any:
    return small_batch(name, rows, seed=seed)
