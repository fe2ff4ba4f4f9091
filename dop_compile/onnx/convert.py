"""From a module to an ONNX file whose weights stand in the common data file.

    torch.export --> torch.onnx.export --> fold and fuse --> transposes into the data file --> names --> save

Numerics: exact but for the operators that replace several (opset 23: RMSNormalization, RotaryEmbedding, Attention).
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common
from onnxscript.rewriter import onnx_fusions
from torch import Tensor, nn

from dop_compile.errors import UnsupportedModelError
from dop_compile.onnx.check import check_graph
from dop_compile.onnx.manifest import WEIGHTS
from dop_compile.onnx.parts import DataFile, Graph, InputSpec, OutputSpec, file_sha256
from dop_compile.onnx.weights import WeightStore

__all__ = ["Range", "Signature", "write_graph"]

INLINE_BYTES = 256
FOLD_ELEMENTS = 8192


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
        example = _made_up(signature, shapes)
    model = _translate(module, example, shapes, signature, opset, what)
    _optimize(model)
    _name_sizes(model, shapes, what)
    permuted = _store_transposed(model)
    _strip(model)
    _externalize(model, permuted, store)
    proto = ir.serde.serialize_model(model)
    path.write_bytes(proto.SerializeToString())
    check_graph(path, opset)
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
    import inspect

    parameters = inspect.signature(module.forward).parameters.values()
    return [tuple if p.kind is p.VAR_POSITIONAL else None for p in parameters]


def _as_arguments(module: nn.Module, dims: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sizes by argument: those of `*inputs` are one tuple."""
    plain = _forward_kinds(module).index(tuple)
    return (*dims[:plain], dims[plain:])


def _optimize(model: ir.Model) -> None:
    def should_fold(node: ir.Node) -> bool | None:
        # Weights stay what they are: their transposes are stored, not computed, and shared by content
        large = any(
            value is not None
            and value.is_initializer()
            and (value.const_value is not None)
            and value.const_value.size > FOLD_ELEMENTS
            for value in node.inputs
        )
        return False if large else None

    onnxscript.optimizer.optimize_ir(model, should_fold=should_fold)
    onnx_fusions.fuse(model)
    # What fusion leaves double
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.DeduplicateInitializersPass()(model)


def _name_sizes(model: ir.Model, shapes: Sequence[tuple[int | str, ...]], what: str) -> None:
    """Give dynamic sizes their names, in inputs and outputs."""
    names: dict[str, str] = {}
    for value, shape in zip(model.graph.inputs, shapes, strict=True):
        assert value.shape is not None
        for position, wanted in enumerate(shape):
            size = value.shape[position]
            found = size.value if isinstance(size, ir.SymbolicDim) else size
            if isinstance(wanted, str) and (not isinstance(found, str) or found.isdigit()):
                raise UnsupportedModelError(
                    f"{what}: size {wanted!r} of {value.name} became the constant {found} while tracing; export with "
                    "static shapes"
                )
            if isinstance(wanted, str) and names.setdefault(str(found), wanted) != wanted:
                raise UnsupportedModelError(
                    f"{what}: sizes {wanted!r} and {names[str(found)]!r} became one while tracing; export with static "
                    "shapes"
                )
    pattern = re.compile(r"[A-Za-z_]\w*")

    def named(size: Any) -> Any:
        text = size.value if isinstance(size, ir.SymbolicDim) else size
        return pattern.sub(lambda match: names.get(match[0], match[0]), text) if isinstance(text, str) else text

    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape([named(size) for size in value.shape])


def _store_transposed(model: ir.Model) -> dict[str, Tensor]:
    """Replace Transpose nodes of weights by weights that are stored so; returns those, as views of the model's."""
    views: dict[str, Tensor] = {}
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Transpose" and node.domain == "" else None
        raw = getattr(source.const_value, "raw", None) if source is not None and source.is_initializer() else None
        if not isinstance(raw, Tensor):
            continue
        assert source is not None
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(raw.dim())[::-1]
        view = raw.permute(*order)
        name = f"{source.name}.{''.join(map(str, order))}"
        if name not in model.graph.initializers:
            assert source.const_value is not None
            value = ir.Value(name=name, shape=ir.Shape(view.shape), type=ir.TensorType(source.const_value.dtype))
            value.const_value = ir.LazyTensor(
                _never, dtype=source.const_value.dtype, shape=ir.Shape(view.shape), name=name
            )
            model.graph.register_initializer(value)
        views[name] = view
        node.outputs[0].replace_all_uses_with(model.graph.initializers[name])
        model.graph.remove(node, safe=True)
    common.RemoveUnusedNodesPass()(model)
    return views


def _never() -> Any:
    raise AssertionError("a weight was read before it was stored")


def _strip(model: ir.Model) -> None:
    """Drop what only helps to debug the exporter: it would weigh more than the graph."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        node.name = ""
        for output in node.outputs:
            output.metadata_props.clear()
            if not output.is_graph_output():
                output.shape = output.type = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None


def _externalize(model: ir.Model, views: Mapping[str, Tensor], store: WeightStore) -> None:
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes <= INLINE_BYTES and name not in views:
            continue
        raw = views.get(name, getattr(tensor, "raw", None))
        lasting = isinstance(raw, Tensor)
        if not isinstance(raw, Tensor):
            raw = torch.frombuffer(bytearray(tensor.tobytes()), dtype=torch.uint8)
        offset, length = store.add(raw, lasting=lasting)
        value.const_value = ir.ExternalTensor(
            WEIGHTS, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape), name=name, base_dir=store.path.parent
        )


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
            ir.DataType(value.type.tensor_type.elem_type).name.lower().replace("float", "float32")
            if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
            else ir.DataType(value.type.tensor_type.elem_type).name.lower(),
            tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
        )
        for value in proto.graph.output
    )
    return Graph(DataFile(path.name, path.stat().st_size, file_sha256(path)), inputs, outputs)
