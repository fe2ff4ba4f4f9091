"""The printed commands name every dynamic input of a graph, with sizes that the graph takes."""

from __future__ import annotations

import shlex

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from dop_compile.onnx.contract.manifest import Manifest
from dop_compile.onnx.deploy.trtexec import trtexec_commands
from tests.onnx_export.exported import exported, static_export

TYPES = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.INT64: np.int64}
Shapes = dict[str, tuple[int, ...]]


def options(command: str) -> tuple[dict[str, str], set[str]]:
    """A command's options with values, and its flags."""
    program, *words = shlex.split(command)
    assert program == "trtexec"
    pairs = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
    return pairs, {word for word in words if "=" not in word}


def shapes(text: str) -> Shapes:
    pairs = (part.rsplit(":", 1) for part in text.split(","))
    return {name: tuple(map(int, sizes.split("x"))) for name, sizes in pairs}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_profiles_are_what_the_graphs_take(name: str) -> None:
    folder = exported(name)
    commands = list(trtexec_commands(Manifest.load(folder)))
    assert len(commands) == len(list(folder.glob("*.onnx")))
    for command in commands:
        pairs, flags = options(command)
        graph = onnx.load(folder / pairs["onnx"], load_external_data=False).graph
        assert pairs["saveEngine"] == pairs["onnx"].replace(".onnx", ".engine")
        assert flags == {"--stronglyTyped", "--skipInference"}
        types = {value.name: value.type.tensor_type for value in graph.input}
        dynamic = {n for n, kind in types.items() if any(size.dim_param for size in kind.shape.dim)}
        profiles = {which: shapes(pairs[f"{which}Shapes"]) for which in ("min", "opt", "max") if dynamic}
        assert all(set(profile) == dynamic for profile in profiles.values())
        fixed = {n: tuple(d.dim_value for d in kind.shape.dim) for n, kind in types.items() if n not in dynamic}
        session = ort.InferenceSession(str(folder / pairs["onnx"]), providers=["CPUExecutionProvider"])
        for which in ("min", "opt") if dynamic else ("opt",):
            sizes = {**fixed, **profiles.get(which, {})}
            session.run(None, {n: np.zeros(sizes[n], TYPES[kind.elem_type]) for n, kind in types.items()})
        for n in dynamic:
            low, common, high = (profiles[which][n] for which in ("min", "opt", "max"))
            assert all(a <= b <= c for a, b, c in zip(low, common, high, strict=True))
            assert low != high


def test_static_graphs_need_no_profiles() -> None:
    for command in trtexec_commands(Manifest.load(static_export())):
        pairs, _ = options(command)
        assert "minShapes" not in pairs or pairs["onnx"] == "embed.onnx"
