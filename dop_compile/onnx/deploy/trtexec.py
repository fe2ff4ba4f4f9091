"""The `trtexec` commands that build a TensorRT engine of each exported graph, from the manifest's profiles."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from dop_compile.onnx.contract.manifest import Manifest
from dop_compile.onnx.contract.parts import Graph

__all__ = ["trtexec_commands"]

PROFILES = ("min", "opt", "max")


def trtexec_commands(manifest: Manifest) -> Iterator[str]:
    """One shell command per graph, to be run in the exported directory (docs/tensorrt.md)."""
    for name, graph in manifest.graphs.items():
        yield shlex.join(_command(name, graph))


def _command(name: str, graph: Graph) -> list[str]:
    words = [
        "trtexec",
        f"--onnx={graph.data.file}",
        f"--saveEngine={name}.engine",
        "--stronglyTyped",
        "--skipInference",
    ]
    dynamic = [spec for spec in graph.inputs if any(isinstance(size, str) for size in spec.shape)]
    for which in PROFILES if dynamic else ():
        shapes = ",".join(f"{spec.name}:{'x'.join(map(str, getattr(spec, which)))}" for spec in dynamic)
        words.append(f"--{which}Shapes={shapes}")
    return words
