"""`export_onnx`: a model and its tiers as a directory of ONNX graphs over one file of weights.

examples --capture--> what the decoder is given --sections--> one prefill graph per tier, one decode graph
                 \\--> embedding graph, vision graph per layout of pixels
all graphs --convert--> weights.bin (each weight once), *.onnx, manifest.json
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dop_compile.compiler import dop_compile
from dop_compile.drop_in.wrapped_forward import check_unwrapped
from dop_compile.errors import UnsupportedModelError
from dop_compile.hf.mixers import is_mixer
from dop_compile.hf.model_path import decoder_path
from dop_compile.hf.prompts import prompt_inputs
from dop_compile.onnx.check.graphs import OPSETS
from dop_compile.onnx.contract.manifest import MANIFEST, Manifest
from dop_compile.onnx.contract.workspace import new_directory
from dop_compile.onnx.deploy.triton import TRITON, check_layout, write_repository
from dop_compile.onnx.export.capture import capture_prompt
from dop_compile.onnx.export.exporter import Exporter
from dop_compile.onnx.export.shapes import Shapes
from dop_compile.policy.policy import Policy

__all__ = ["export_onnx"]

ATTENTION = ("sdpa", "eager")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def export_onnx(
    model: Any,
    tiers: Mapping[str, Policy] | Policy,
    directory: str | os.PathLike[str],
    *,
    examples: Sequence[Mapping[str, Any]] | None = None,
    processor: Any = None,
    opset: int = 23,
    shapes: Shapes | None = None,
    layout: str | None = None,
    force: bool = False,
    progress: bool = False,
) -> Manifest:
    """Write a model and its tiers as ONNX graphs; the directory is as `dop_compile.onnx.contract.manifest` says.

    Args:
        model: a Hugging Face vision-language or causal language model in eval mode, not compiled; the graphs are in its
            dtype (float32, float16 or bfloat16).
        tiers: policies by name, the first is the default; or one policy.
        directory: must not exist, unless `force`.
        examples: prompts of one row as a processor returns them. A vision graph is made for each layout of pixels among
            them; their largest number of visual tokens is the static length before reduction. None: one prompt with an
            image of the processor's own size, by `processor`.
        processor: saved with the graphs, if given.
        opset: 23, or 18 for runtimes without Attention, RMSNormalization and RotaryEmbedding.
        shapes: sizes to serve.
        layout: "triton": also a model repository, in the folder `triton` (`dop_compile.onnx.deploy.triton`).
        force: replace an existing directory.
        progress: show a bar on stderr.

    Raises:
        FileExistsError: the directory exists.
        ValueError, TypeError: policies that are not for this model, a model in training mode, an unknown opset, a
            layout that cannot serve the graphs.
        UnsupportedModelError: the model cannot be pruned or exported; the message says why.
        OSError: the directory cannot be written.
    """
    tiers = {"default": tiers} if isinstance(tiers, Policy) else dict(tiers)
    compiled = dop_compile(model, tiers, backend="eager")  # checks model and policies
    _check(model, opset)
    _check_sources(model, compiled)
    check_layout(layout, str(model.dtype).removeprefix("torch."))
    examples = _examples(model, examples, processor)
    captures = [capture_prompt(model, example) for example in examples]
    needed = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    with new_directory(directory, force=force, mark=MANIFEST, needed_bytes=needed) as scratch:
        exporter = Exporter(model, tiers, captures, shapes or Shapes(), opset, scratch, progress)
        manifest = exporter.run(compiled, examples, processor)
        manifest.save(scratch)
        if layout == TRITON:
            write_repository(scratch, manifest, scratch / TRITON)
    return manifest


def _check(model: Any, opset: int) -> None:
    if opset not in OPSETS:
        raise ValueError(f"opset: expected one of {', '.join(map(str, OPSETS))}, got {opset!r}")
    check_unwrapped(model, "the export")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before the export")
    if model.dtype not in DTYPES:
        raise ValueError(f"the model is in {model.dtype}; expected float32, float16 or bfloat16")
    attention = model.get_submodule(decoder_path(model)).config._attn_implementation
    if attention not in ATTENTION:
        raise UnsupportedModelError(
            f"attention implementation {attention!r} cannot be exported to ONNX; load the model with "
            f"attn_implementation={' or '.join(map(repr, ATTENTION))}"
        )
    mixers = sorted({type(m).__name__ for m in model.get_submodule(decoder_path(model)).modules() if is_mixer(m)})
    if mixers:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be exported to ONNX: its layers with {', '.join(mixers)} keep a state, and "
            "the exported cache holds keys and values alone; run the compiled model in PyTorch"
        )
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ValueError("the model has no weights (meta device); load it with its weights before the export")


def _check_sources(model: Any, compiled: Any) -> None:
    if readers := sorted(compiled.dop.sources()):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be exported to ONNX: its layers {readers} read the keys and values of "
            "earlier layers, and an exported layer attends to what it stores itself; run the compiled model in PyTorch"
        )


def _examples(model: Any, examples: Sequence[Mapping[str, Any]] | None, processor: Any) -> Sequence[Mapping[str, Any]]:
    multimodal = model.config.get_text_config(decoder=True) is not model.config
    if examples is None and multimodal:
        if processor is None:
            raise ValueError("examples: give prompts with images, as the processor returns them, or the processor")
        examples = [prompt_inputs(processor, "Describe.", [Image.new("RGB", (336, 336))])]
    elif examples is None:
        examples = [{"input_ids": torch.arange(3)[None], "attention_mask": torch.ones(1, 3, dtype=torch.long)}]
    if not examples:
        raise ValueError("examples: expected at least one prompt, got none")
    found = []
    for number, example in enumerate(examples):
        if example["input_ids"].shape[0] != 1:
            raise ValueError(f"examples[{number}]: expected one row, got {example['input_ids'].shape[0]}")
        moved = {n: v.to(model.device) if isinstance(v, Tensor) else v for n, v in example.items()}
        found.append({n: v.to(model.dtype) if _is_float(v) else v for n, v in moved.items()})
    return found


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
