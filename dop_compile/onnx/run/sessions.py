"""ONNX Runtime sessions over an exported directory, tensors in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from dop_compile.onnx.contract.manifest import Manifest

__all__ = ["GPU", "GraphSession", "UnrunnableError", "open_graph"]

GPU = ("CUDA", "Tensorrt")
"""Beginnings of the names of providers whose tensors are torch's CUDA tensors."""


class UnrunnableError(RuntimeError):
    """The provider does not run a graph; the message says why."""


class GraphSession:
    """One graph of a directory, ready to run.

    Args:
        optimized: whether ONNX Runtime may rewrite the graph.
        shared: leave weights in the mapped file, which all sessions share, instead of packing them for the processor.

    Raises:
        UnrunnableError: the provider does not start, or nothing has a kernel for the graph's dtype or operators (what a
            GPU has none for runs on the processor).
    """

    def __init__(self, path: Path, provider: str, optimized: bool, shared: bool = False):
        options = ort.SessionOptions()
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
        if shared:
            options.add_session_config_entry("session.disable_prepacking", "1")
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = ort.InferenceSession(str(path), options, providers=_with_fallback(provider))
        except Exception as error:  # ONNX Runtime's own exceptions have no common class
            raise UnrunnableError(f"{path.name}: {' '.join(str(error).split())[:300]}") from error
        if provider not in (started := self._session.get_providers()):  # ONNX Runtime goes on without it
            raise UnrunnableError(f"{path.name}: {provider} did not start, only {', '.join(started)}")
        self._types = {i.name: i.type for i in self._session.get_inputs()}
        self.outputs = [o.name for o in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name. Inputs that the graph does not use are left out."""
        given = {n: _array(t) for n, t in inputs.items() if n in self._types}
        try:
            found: Sequence[Any] = self._session.run(None, given)
        except Exception as error:
            raise UnrunnableError(" ".join(str(error).split())[:300]) from error
        return {name: torch.from_numpy(np.asarray(v)) for name, v in zip(self.outputs, found, strict=True)}


def _with_fallback(provider: str) -> list[str | tuple[str, dict[str, int]]]:
    """TensorRT leaves what its parser does not know to CUDA; ONNX Runtime adds the processor to any list."""
    names = [provider, "CUDAExecutionProvider"] if provider.startswith("Tensorrt") else [provider]
    if not provider.startswith(GPU) or not torch.cuda.is_available():
        return [*names]
    return [(name, {"device_id": torch.cuda.current_device()}) for name in names]


def _array(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        raise UnrunnableError("bfloat16 tensors cannot be handed to ONNX Runtime from Python: numpy has no such type")
    return tensor.detach().cpu().contiguous().numpy()


def open_graph(folder: Path, manifest: Manifest, name: str, provider: str, optimized: bool) -> GraphSession:
    return GraphSession(folder / manifest.graphs[name].data.file, provider, optimized)
