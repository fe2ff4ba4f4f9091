"""What every exported graph must be: valid, with shapes that can be inferred, of standard operators alone."""

from __future__ import annotations

from pathlib import Path

import onnx

__all__ = ["OPERATORS", "OPSETS", "check_graph", "operators"]

OPSETS = (18, 23)

# fmt: off
_COMMON = frozenset(
    [
        "Abs", "Add", "And", "ArgMax", "ArgMin", "AveragePool", "BatchNormalization", "Cast", "Ceil", "Clip",
        "Concat", "Constant", "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "CumSum", "DepthToSpace",
        "Div", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "Flatten", "Floor", "Gather", "GatherElements",
        "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "Greater", "GreaterOrEqual", "GridSample",
        "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization", "IsInf", "IsNaN", "LayerNormalization",
        "LeakyRelu", "Less", "LessOrEqual", "Log", "MatMul", "Max", "MaxPool", "Min", "Mod", "Mul", "Neg",
        "Not", "Or", "PRelu", "Pad", "Pow", "Range", "Reciprocal", "ReduceL2", "ReduceMax", "ReduceMean",
        "ReduceMin", "ReduceSum", "Relu", "Reshape", "Resize", "ScatterElements", "ScatterND", "Shape",
        "Sigmoid", "Sign", "Sin", "Slice", "Softmax", "Softplus", "SpaceToDepth", "Split", "Sqrt", "Squeeze",
        "Sub", "Tanh", "Tile", "TopK", "Transpose", "Unsqueeze", "Where",
    ]
)
# fmt: on
OPERATORS = {
    18: _COMMON - {"Gelu"},
    23: _COMMON | {"Attention", "RMSNormalization", "RotaryEmbedding"},
}
"""Operators that an export may use, by opset: of the standard domain, with sizes that do not depend on values."""


def operators(path: Path) -> set[str]:
    """Operators of a graph, with their domain where it is not the standard one."""
    model = onnx.load(path, load_external_data=False)
    return {
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}" for node in _nodes(model)
    }


def _nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    found: list[onnx.NodeProto] = []
    stack = [model.graph, *model.functions]
    while stack:
        graph = stack.pop()
        for node in graph.node:
            found.append(node)
            for attribute in node.attribute:
                stack.extend([attribute.g] if attribute.HasField("g") else [])
                stack.extend(attribute.graphs)
    return found


def check_graph(path: Path, opset: int) -> None:
    """Check a file, with its weights in place.

    Raises:
        ValueError: it is not valid, or uses an operator that it should not.
    """
    if other := sorted(operators(path) - OPERATORS[opset]):
        raise ValueError(f"{path.name}: operators outside the list for opset {opset}: {', '.join(other)}")
    try:
        onnx.checker.check_model(str(path))
        model = onnx.load(path, load_external_data=False)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ValueError(f"{path.name} is not valid ONNX: {' '.join(str(error).split())}") from error
