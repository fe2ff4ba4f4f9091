"""ONNX Runtime sessions whose inputs and outputs are tensors of ours, bound by address: nothing is copied in or out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dop_compile.onnx.contract.manifest import Manifest
from dop_compile.onnx.contract.parts import Graph
from dop_compile.onnx.run.plain import PlainPipeline
from dop_compile.onnx.run.sessions import GPU, GraphSession, UnrunnableError

__all__ = ["Binding", "BoundSession", "BoundStages"]

_ELEMENTS = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}
"""ONNX's numbers of element types."""


def buffer_device(provider: str) -> torch.device:
    """Where tensors are kept for a provider: on the GPU if torch can allocate there, else ONNX Runtime copies."""
    on_gpu = provider.startswith(GPU) and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


class BoundSession(GraphSession):
    """A graph that runs on tensors where they are.

    Args:
        graph: its description in the manifest, which says how large outputs are.
        shared: see `GraphSession`.
    """

    def __init__(self, path: Path, graph: Graph, provider: str, shared: bool):
        super().__init__(path, provider, optimized=True, shared=shared)
        self.device = buffer_device(provider)
        self.graph = graph
        dtypes = {spec.name: spec.dtype for spec in graph.inputs} | {spec.name: spec.dtype for spec in graph.outputs}
        self._dtypes = {name: getattr(torch, dtype) for name, dtype in dtypes.items()}

    def bind(self, inputs: Mapping[str, Tensor]) -> Binding:
        """Inputs and fresh outputs, bound. Floating point inputs are converted to what the graph takes."""
        moved = {n: self._fitting(n, t) for n, t in inputs.items() if n in self._types}
        sizes = self._sizes(moved)
        outputs = {}
        for spec in self.graph.outputs:
            shape = [_size(size, sizes) for size in spec.shape]
            outputs[spec.name] = torch.empty(shape, dtype=self._dtypes[spec.name], device=self.device)
        return Binding(self._session, moved, outputs)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, on the CPU."""
        return {name: tensor.cpu() for name, tensor in self.run_in_place(inputs).items()}

    def run_in_place(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, on the session's device."""
        binding = self.bind(inputs)
        binding.run()
        return binding.outputs

    def _fitting(self, name: str, tensor: Tensor) -> Tensor:
        wanted = self._dtypes[name]
        if tensor.is_floating_point() != wanted.is_floating_point:
            raise TypeError(f"{name}: expected {wanted}, got {tensor.dtype}")
        return tensor.detach().to(self.device, wanted).contiguous()

    def _sizes(self, inputs: Mapping[str, Tensor]) -> dict[str, int]:
        """Dynamic sizes by name, from the inputs' shapes."""
        sizes: dict[str, int] = {}
        for spec in self.graph.inputs:
            if spec.name not in inputs:
                raise ValueError(f"{spec.name}: the graph's input is missing; expected shape {spec.shape}")
            found = tuple(inputs[spec.name].shape)
            if len(found) != len(spec.shape):
                raise ValueError(f"{spec.name}: expected shape {spec.shape}, got {found}")
            for size, number in zip(spec.shape, found, strict=True):
                expected = sizes.setdefault(size, number) if isinstance(size, str) else size
                if expected != number:
                    raise ValueError(
                        f"{spec.name}: the graph was exported for shape {spec.shape}, got {found}; export with other "
                        "sizes, or give inputs of these"
                    )
        return sizes


def _size(size: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    return sum(int(term) if term.isdecimal() else sizes[term] for term in size.split(" + "))


class Binding:
    """Tensors bound to one run of a session after another; their contents may change in between.

    Attributes:
        inputs, outputs: by name. `rebind` puts another tensor in an input's place.
    """

    def __init__(self, session: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor]):
        self._session = session
        self._binding = session.io_binding()
        self.inputs: dict[str, Tensor] = {}
        self.outputs = outputs
        for name, tensor in inputs.items():
            self.rebind(name, tensor)
        for name, tensor in outputs.items():
            self._binding.bind_output(name, *_address(tensor))

    def rebind(self, name: str, tensor: Tensor) -> None:
        self._binding.bind_input(name, *_address(tensor))
        self.inputs[name] = tensor

    def run(self) -> None:
        if any(tensor.is_cuda for tensor in self.inputs.values()):
            device = next(iter(self.outputs.values())).device
            torch.cuda.synchronize(device)  # what torch has written must be there: ONNX Runtime has its own stream
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise UnrunnableError(" ".join(str(error).split())[:300]) from error


def _address(tensor: Tensor) -> tuple[str, int, int, tuple[int, ...], int]:
    device = tensor.device
    return device.type, device.index or 0, _ELEMENTS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()


class BoundStages(PlainPipeline):
    """The graphs of a directory as bound sessions; the way from a processor's output to prefill is the plain one."""

    def __init__(self, folder: Path, manifest: Manifest, model: Any, provider: str, shared: bool):
        super().__init__(folder, manifest, model, provider, optimized=True)
        self._shared = shared

    def session(self, name: str) -> BoundSession:
        found = self._sessions.get(name)
        if found is None:
            graph = self.manifest.graphs[name]
            path = self.folder / graph.data.file
            found = self._sessions[name] = BoundSession(path, graph, self._provider, self._shared)
        assert isinstance(found, BoundSession)
        return found
