"""From a module to an ONNX file whose weights stand in the common data file.

    torch.export --> torch.onnx.export --> fold and fuse --> transposes into the data file --> names --> save

Numerics: exact but for the operators that replace several (opset 23: RMSNormalization, RotaryEmbedding, Attention).
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from dop_compile.errors import UnsupportedModelError
from dop_compile.onnx.check.graphs import check_graph
from dop_compile.onnx.contract.parts import DataFile, Graph, InputSpec, OutputSpec, file_sha256
from dop_compile.onnx.export.rewrite import externalize, name_sizes, optimize, store_transposed, strip
from dop_compile.onnx.export.weights import WeightStore

__all__ = ["Range", "Signature", "write_graph"]

_TYPES = onnx.TensorProto
DTYPES = {
    _TYPES.FLOAT: "float32",
    _TYPES.FLOAT16: "float16",
    _TYPES.BFLOAT16: "bfloat16",
    _TYPES.INT64: "int64",
}


@dataclass(frozen=True)
class Range:
    """A size: what TensorRT calls min, opt and max. A static one has three equal numbers."""

    min: int
    opt: int
    max: int

    @property
    def is_static(self) -> bool:
        return self.min == self.max


@dataclass(frozen=True)
class Signature:
    """A graph's inputs: name, dtype and sizes, each a number or the name of a range; and the names of its outputs."""

    inputs: tuple[tuple[str, torch.dtype, tuple[int | str, ...]], ...]
    outputs: tuple[str, ...]


def write_graph(
    module: nn.Module,
    signature: Signature,
    ranges: Mapping[str, Range],
    path: Path,
    store: WeightStore,
    opset: int,
    example: Sequence[Tensor] | None = None,
) -> Graph:
    """Export a module to `path`.

    Args:
        ranges: of the sizes that the signature names.
        store: where weights go; the graph refers to its file by name.
        example: inputs to trace with; made up if None.

    Raises:
        UnsupportedModelError: the module cannot be traced or translated, or a size that should be dynamic is not.
    """
    what = path.stem
    static = {name: r.opt for name, r in ranges.items() if r.is_static}
    shapes = [tuple(static.get(s, s) if isinstance(s, str) else s for s in shape) for _, _, shape in signature.inputs]
    if example is None:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        example = [tensor.to(device) for tensor in _made_up(signature, shapes)]
    model = _translate(module, example, shapes, signature, opset, what)
    optimize(model)
    name_sizes(model, shapes, what)
    views = store_transposed(model, store.holds)
    strip(model)
    externalize(model, views, store)
    proto = ir.serde.serialize_model(model)
    path.write_bytes(proto.SerializeToString())
    try:
        check_graph(path, opset)
    except ValueError as error:
        raise UnsupportedModelError(f"{what} cannot be exported to ONNX: {error}") from error
    return _record(proto, signature, shapes, ranges, path)


def _made_up(signature: Signature, shapes: Sequence[tuple[int | str, ...]]) -> list[Tensor]:
    """Inputs whose dynamic sizes differ from each other, so that none are taken for the same."""
    names = dict.fromkeys(size for shape in shapes for size in shape if isinstance(size, str))
    sizes = {name: 2 * number + 5 for number, name in enumerate(sorted(names))} | {"batch": 2}
    return [
        torch.zeros([sizes[s] if isinstance(s, str) else s for s in shape], dtype=dtype)
        for (_, dtype, _), shape in zip(signature.inputs, shapes, strict=True)
    ]


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter reports what it skips and deprecations of its own on every call."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


def _translate(
    module: nn.Module,
    example: Sequence[Tensor],
    shapes: Sequence[tuple[int | str, ...]],
    signature: Signature,
    opset: int,
    what: str,
) -> ir.Model:
    dynamic, fixed = torch.export.Dim.AUTO, torch.export.Dim.STATIC
    dims = tuple({i: dynamic if isinstance(s, str) else fixed for i, s in enumerate(shape)} for shape in shapes)
    varargs = any(kind is tuple for kind in _forward_kinds(module))
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(
                module, tuple(example), dynamic_shapes=_as_arguments(module, dims) if varargs else dims, strict=False
            )
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                optimize=False,
                verbose=False,
                input_names=[name for name, _, _ in signature.inputs],
                output_names=list(signature.outputs),
            )
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a tracer, or a translator, does not know
        raise UnsupportedModelError(f"{what} cannot be exported to ONNX: {_summary(error)}") from error
    assert converted is not None
    return converted.model


def _summary(error: BaseException) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:600]}"


def _forward_kinds(module: nn.Module) -> list[type | None]:
    parameters = inspect.signature(module.forward).parameters.values()
    return [tuple if p.kind is p.VAR_POSITIONAL else None for p in parameters]


def _as_arguments(module: nn.Module, dims: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sizes by argument: those of `*inputs` are one tuple."""
    plain = _forward_kinds(module).index(tuple)
    return (*dims[:plain], dims[plain:])


def _record(
    proto: onnx.ModelProto,
    signature: Signature,
    shapes: Sequence[tuple[int | str, ...]],
    ranges: Mapping[str, Range],
    path: Path,
) -> Graph:
    def profile(shape: tuple[int | str, ...], which: Callable[[Range], int]) -> tuple[int, ...]:
        return tuple(which(ranges[size]) if isinstance(size, str) else size for size in shape)

    used = {value.name for value in proto.graph.input}
    inputs = tuple(
        InputSpec(
            name,
            str(dtype).removeprefix("torch."),
            shape,
            profile(shape, lambda r: r.min),
            profile(shape, lambda r: r.opt),
            profile(shape, lambda r: r.max),
        )
        for (name, dtype, _), shape in zip(signature.inputs, shapes, strict=True)
        if name in used
    )
    outputs = tuple(
        OutputSpec(
            value.name,
            DTYPES[value.type.tensor_type.elem_type],
            tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim),
        )
        for value in proto.graph.output
    )
    return Graph(DataFile(path.name, path.stat().st_size, file_sha256(path)), inputs, outputs)
