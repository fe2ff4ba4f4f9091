"""The model repository is what Triton's schema, the graphs and ONNX Runtime take."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from dop_compile.onnx.contract.manifest import WEIGHTS, Manifest
from dop_compile.onnx.deploy.triton import LAYOUTS, check_layout, triton_repository
from tests.onnx_export.exported import TIERS, batch_of, example_rows, exported, pipeline, run
from tests.onnx_export.harness import small_family

pytest.importorskip("tritonclient.grpc", reason="the schema and the client's tensors are its own")

import onnx_triton
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import triton_to_np_dtype

NAMES = ("llava", "qwen2_5_vl")
ONNX = onnx.TensorProto
TYPES = {
    ONNX.FLOAT: model_config_pb2.TYPE_FP32,
    ONNX.FLOAT16: model_config_pb2.TYPE_FP16,
    ONNX.INT64: model_config_pb2.TYPE_INT64,
}


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def repository(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy: files with several names are refused by ONNX's checker."""
    folder = Path(shutil.copytree(exported(name), tmp_path_factory.mktemp("triton") / "out"))
    return triton_repository(folder)


def config_of(model: Path) -> Any:
    return text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_configurations_are_those_of_the_graphs(repository: Path) -> None:
    models = sorted(repository.iterdir())
    assert [model.name for model in models] == sorted(Manifest.load(repository.parent).graphs)
    for model in models:
        config = config_of(model)
        graph = onnx.load(model / "1" / "model.onnx", load_external_data=False).graph
        assert (config.name, config.backend) == (model.name, "onnxruntime")
        tensors = [*graph.input, *graph.output]
        first = {value.type.tensor_type.shape.dim[0].dim_param for value in tensors}
        assert (config.max_batch_size, config.HasField("dynamic_batching")) == (
            (8, True) if first == {"batch"} else (0, False)
        )
        for found, expected in zip([*config.input, *config.output], tensors, strict=True):
            kind = expected.type.tensor_type
            sizes = [size.dim_value or -1 for size in kind.shape.dim]
            assert (found.name, found.data_type) == (expected.name, TYPES[kind.elem_type])
            assert list(found.dims) == (sizes[1:] if config.max_batch_size else sizes)
        (group,) = config.instance_group
        assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_AUTO
        assert config.parameters["share_session_between_instances"].string_value == "true"


def test_what_is_batched(name: str, repository: Path) -> None:
    batched = {model.name for model in repository.iterdir() if config_of(model).max_batch_size}
    prefills = {"prefill-100", "prefill-pruned", "decode"}
    assert batched == {"embed"} | (prefills if name == "llava" else set())
    if name == "qwen2_5_vl":
        text = (repository / "decode" / "config.pbtxt").read_text()
        assert "# No batching: the first dimension of position_ids is not a dynamic batch." in text


def test_one_copy_of_the_weights(repository: Path) -> None:
    one = (repository.parent / WEIGHTS).stat()
    assert {(model / "1" / WEIGHTS).stat().st_ino for model in repository.iterdir()} == {one.st_ino}


class Server:
    """What Triton does with a request, for a client of its own package."""

    def __init__(self, repository: Path):
        self._repository = repository
        self._sessions: dict[str, Any] = {}
        self._given: dict[str, Any] = {}

    def infer(self, model: str, inputs: list[Any]) -> Server:
        folder = self._repository / model
        config = config_of(folder)
        expected = {spec.name: spec for spec in config.input}
        assert {tensor.name() for tensor in inputs} == set(expected)
        feeds = {}
        for tensor in inputs:
            spec, shape = expected[tensor.name()], list(tensor.shape())
            assert model_config_pb2.DataType.Value(f"TYPE_{tensor.datatype()}") == spec.data_type
            if config.max_batch_size:
                assert 1 <= shape.pop(0) <= config.max_batch_size
            assert len(shape) == len(spec.dims)
            assert all(wanted in (-1, size) for size, wanted in zip(shape, spec.dims, strict=True))
            data = np.frombuffer(tensor._get_content(), triton_to_np_dtype(tensor.datatype()))
            feeds[tensor.name()] = data.reshape(tensor.shape())
        if model not in self._sessions:
            path = str(folder / "1" / "model.onnx")
            self._sessions[model] = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [spec.name for spec in config.output]
        self._given = dict(zip(names, self._sessions[model].run(names, feeds), strict=True))
        return self

    def as_numpy(self, name: str) -> Any:
        return self._given[name]


def test_client_chains_the_models(name: str, repository: Path) -> None:
    """The example's client, over a server that is made up, says what the exported directory says."""
    rows: Any = [[("text", 5)], example_rows(small_family(name))[0]]
    batch = batch_of(name, rows)
    client = onnx_triton.TritonPipeline(repository.parent, Server(repository))
    client.model = batch.model
    for tier in TIERS:
        logits, ids = run(client, tier, batch.inputs, 3)
        expected, expected_ids = run(pipeline(name, True), tier, batch.inputs, 3)
        assert ids == expected_ids
        assert np.allclose(logits, expected, atol=1e-6)


def test_existing_is_replaced_with_force(repository: Path) -> None:
    with pytest.raises(FileExistsError, match="--force"):
        triton_repository(repository.parent)
    (repository / "old").mkdir()
    triton_repository(repository.parent, force=True)
    assert not (repository / "old").exists()
    assert (repository / "decode" / "1" / "model.onnx").exists()


def test_another_file_system(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(
        OSError, match=r"no hard link to .* can be made .*; the repository has to be on its file system"
    ):
        triton_repository(repository.parent, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_layouts_that_are_refused() -> None:
    assert LAYOUTS == ("triton", "genai")
    check_layout(None, "bfloat16")
    check_layout("triton", "float16")
    with pytest.raises(ValueError, match="takes no bfloat16"):
        check_layout("triton", "bfloat16")
    with pytest.raises(ValueError, match="as many cache entries in every layer as the prompt has tokens"):
        check_layout("genai", "float32")
    with pytest.raises(ValueError, match="layout: expected one of triton, genai, got 'tgi'"):
        check_layout("tgi", "float32")
