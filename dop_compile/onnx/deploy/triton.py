"""An exported directory as a model repository of NVIDIA's Triton Inference Server, one model per graph.

    triton/prefill-28/config.pbtxt      written from the manifest
    triton/prefill-28/1/model.onnx      a hard link of prefill-28.onnx
    triton/prefill-28/1/weights.bin     a hard link of weights.bin

Hard links, so that all models share one copy on the disk and, mapped, in memory. ONNX Runtime from 1.24 on refuses
weights outside of the graph's own directory, by a path or a symbolic link.

Triton batches requests where the first dimension of every input and output is the batch; a graph that has another
first dimension (the axes of M-RoPE positions, pixels of one image) gets `max_batch_size: 0`, and a comment says why.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dop_compile.onnx.contract.manifest import WEIGHTS, Manifest
from dop_compile.onnx.contract.parts import Graph, InputSpec, OutputSpec
from dop_compile.onnx.contract.workspace import new_directory

__all__ = ["LAYOUTS", "TRITON", "check_layout", "triton_repository", "write_repository"]

TRITON = "triton"
LAYOUTS = (TRITON, "genai")
_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64"}
_NO_GENAI = (
    "layout 'genai': ONNX Runtime GenAI runs prompt and tokens through one graph, with as many cache entries in every "
    "layer as the prompt has tokens; pruned tiers have fewer, and a prefill graph of their own (docs/serving.md). "
    "Serve the export with OnnxPipeline or Triton"
)


def check_layout(layout: str | None, dtype: str) -> None:
    """ValueError for a layout that is unknown, or cannot serve graphs of a dtype."""
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout == "genai":
        raise ValueError(_NO_GENAI)
    if layout == TRITON and dtype == "bfloat16":
        raise ValueError("layout 'triton': its ONNX Runtime backend takes no bfloat16; export in float16 or float32")


def triton_repository(
    directory: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, force: bool = False
) -> Path:
    """Write the repository of an exported directory, and return where it is.

    Args:
        directory: what `export_onnx` wrote.
        out: on the same file system; None: `triton` in the directory.
        force: replace an existing one.

    Raises:
        FileNotFoundError, ValueError: no export, a damaged one, or one in bfloat16.
        FileExistsError: `out` exists.
        OSError: it cannot be written, or hard links cannot be made there.
    """
    folder = Path(directory)
    manifest = Manifest.load(folder)
    check_layout(TRITON, manifest.model.dtype)
    target = folder / TRITON if out is None else Path(out)
    with new_directory(target, force=force, mark="*/config.pbtxt") as scratch:
        write_repository(folder, manifest, scratch)
    return target


def write_repository(folder: Path, manifest: Manifest, out: Path) -> None:
    """Fill the empty directory `out`."""
    for name, graph in manifest.graphs.items():
        version = out / name / "1"
        version.mkdir(parents=True)
        _link(folder / graph.data.file, version / "model.onnx")
        _link(folder / WEIGHTS, version / WEIGHTS)
        (out / name / "config.pbtxt").write_text(_config(name, graph), encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        reason = f"no hard link to {source} can be made ({error.strerror}); the repository has to be on its file system"
        raise OSError(error.errno, reason, str(target)) from error


def _config(name: str, graph: Graph) -> str:
    """The text of config.pbtxt."""
    tensors: list[InputSpec | OutputSpec] = [*graph.inputs, *graph.outputs]
    other = next((spec.name for spec in tensors if spec.shape[0] != "batch"), None)
    lines = [f'name: "{name}"', 'backend: "onnxruntime"']
    if other is None:
        lines += [f"max_batch_size: {graph.inputs[0].max[0]}", "dynamic_batching { }"]
    else:
        lines += [f"# No batching: the first dimension of {other} is not a dynamic batch.", "max_batch_size: 0"]
    for kind, specs in (("input", tensors[: len(graph.inputs)]), ("output", tensors[len(graph.inputs) :])):
        lines += [f"{kind} [", ",\n".join(_tensor(spec, other is None) for spec in specs), "]"]
    lines += [
        "# Instances of this model share one session, and with it one copy of its weights.",
        "instance_group [ { count: 1 kind: KIND_AUTO } ]",
        'parameters { key: "share_session_between_instances" value: { string_value: "true" } }',
    ]
    return "\n".join(lines) + "\n"


def _tensor(spec: InputSpec | OutputSpec, batched: bool) -> str:
    sizes: Sequence[Any] = spec.shape[1:] if batched else spec.shape
    dims = ", ".join(str(size if isinstance(size, int) else -1) for size in sizes)
    return f'  {{ name: "{spec.name}" data_type: {_TYPES[spec.dtype]} dims: [ {dims} ] }}'
