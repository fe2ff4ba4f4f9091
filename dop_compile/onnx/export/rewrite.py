"""What is done to a translated graph before it is saved: folding, fusion, names of sizes, and where weights go."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common
from onnxscript.rewriter import onnx_fusions
from torch import Tensor

from dop_compile.errors import UnsupportedModelError
from dop_compile.onnx.contract.manifest import WEIGHTS
from dop_compile.onnx.export.weights import WeightStore

__all__ = ["externalize", "name_sizes", "optimize", "store_transposed", "strip"]

INLINE_BYTES = 256
FOLD_ELEMENTS = 8192


def optimize(model: ir.Model) -> None:
    """Fold constants but weights, fuse what the opset has operators for, and compute nothing twice."""

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


def name_sizes(model: ir.Model, shapes: Sequence[tuple[int | str, ...]], what: str) -> None:
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


def store_transposed(model: ir.Model, stored: Callable[[Tensor], bool]) -> dict[str, Tensor]:
    """Replace Transpose nodes of weights by weights that are stored so; returns those, as views of the model's.

    A weight that another graph has `stored` as it is (an embedding table that is the head, too) is not stored twice:
    `MatMul(x, Transpose(w))` becomes `Gemm(x, w, transB=1)` on x as a matrix.
    """
    views: dict[str, Tensor] = {}
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Transpose" and node.domain == "" else None
        raw = getattr(source.const_value, "raw", None) if source is not None and source.is_initializer() else None
        if not isinstance(raw, Tensor):
            continue
        assert source is not None
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(raw.dim())[::-1]
        if raw.dim() == 2 and list(order) == [1, 0] and stored(raw) and _multiplies(node.outputs[0]):
            for matmul, _ in list(node.outputs[0].uses()):
                _use_gemm(model.graph, matmul, source)
            model.graph.remove(node, safe=True)
            continue
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


def _multiplies(value: ir.Value) -> bool:
    """Whether it is the right factor of matrix products, and nothing else."""
    return all(user.op_type == "MatMul" and user.domain == "" and index == 1 for user, index in value.uses())


def _use_gemm(graph: ir.Graph, matmul: ir.Node, weight: ir.Value) -> None:
    """`matmul` (..., k) x (k, n) with the weight (n, k) as it is stored, on (..., k) as (rows, k)."""
    x = matmul.inputs[0]
    assert x is not None
    assert weight.shape is not None
    columns, depth = weight.shape.numpy()
    builder = ir.tape.Tape()
    rows = builder.op("Reshape", [x, _constant(builder, [-1, depth])])
    product = builder.op("Gemm", [rows, weight], {"transB": 1})
    leading = builder.op("Shape", [x], {"end": -1})
    shape = builder.op("Concat", [leading, _constant(builder, [columns])], {"axis": 0})
    result = builder.op("Reshape", [product, shape])
    result.shape, result.type = matmul.outputs[0].shape, matmul.outputs[0].type
    graph.insert_before(matmul, builder.nodes)
    matmul.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(matmul, safe=True)


def _constant(builder: ir.tape.Tape, numbers: list[int]) -> ir.Value:
    return builder.op("Constant", [], {"value": ir.tensor(numbers, dtype=ir.DataType.INT64)})


def _never() -> Any:
    raise AssertionError("a weight was read before it was stored")


def strip(model: ir.Model) -> None:
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


def externalize(model: ir.Model, views: Mapping[str, Tensor], store: WeightStore) -> None:
    """Move tensors to the data file, but for small ones; `views` are those that `store_transposed` replaced."""
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
            WEIGHTS, offset, length, tensor.dtype, shape=_shape(tensor), name=name, base_dir=store.path.parent
        )


def _shape(tensor: ir.TensorProtocol) -> ir.Shape:
    sizes: Any = tensor.shape
    return ir.Shape(sizes)
