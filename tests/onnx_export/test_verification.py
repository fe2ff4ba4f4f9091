"""`verify` passes what was exported, and fails what was changed since."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dop_compile import Policy
from dop_compile.onnx.check import verification
from dop_compile.onnx.check.verification import verify
from dop_compile.onnx.contract.manifest import MANIFEST, WEIGHTS, Manifest
from dop_compile.onnx.contract.parts import file_sha256
from dop_compile.onnx.run import providers
from dop_compile.onnx.run.sessions import GraphSession, UnrunnableError
from tests.onnx_export.exported import example_rows, exported
from tests.onnx_export.harness import LAYERS, small_family, small_model

CUDA = "CUDAExecutionProvider"


def samples(dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    family = small_family("llava")
    model = family.build(dtype=dtype)
    return [family.make_inputs(model, example_rows(family), seed=seed) for seed in range(2)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported("llava"), tmp_path / "out"))


def test_passes_and_is_kept(folder: Path) -> None:
    result = verify(folder, small_model("llava"), samples(), new_tokens=3)
    assert result.passed
    assert [(c.tier, c.optimized, c.samples, c.same_text) for c in result.checks] == [
        (tier, on, 2, 2) for tier in ("100%", "pruned") for on in (True, False)
    ]
    assert all(0 <= c.logit_difference < 1e-4 * c.logit_scale for c in result.checks)
    assert Manifest.load(folder, hashes=True).verification == result


@pytest.mark.conformance
@pytest.mark.parametrize("name", ["mistral3", "llava_onevision", "glm4v", "cohere2_vision", "fast_vlm"])
def test_other_families_pass(name: str) -> None:
    """Towers that read sizes or grids, interpolate, pool; sliding windows, parallel blocks."""
    folder, family, model = exported(name), small_family(name), small_model(name)
    prompt = family.make_inputs(model, example_rows(family)[0:1], seed=3)
    assert verify(folder, model, [prompt], new_tokens=3).passed


def test_another_policy_fails(folder: Path) -> None:
    """The graph of a tier is not that of the policy that the manifest says it is."""
    manifest = Manifest.load(folder)
    other = Policy.depthwise(LAYERS, mha_query_depth=1, mha_key_value_depth=0, mlp_depth=0, visual_tokens=5)
    tiers = {**manifest.tiers, "pruned": replace(manifest.tiers["pruned"], policy=other)}
    replace(manifest, tiers=tiers).save(folder)
    result = verify(folder, small_model("llava"), samples(), new_tokens=3)
    assert not result.passed
    assert [c.passed for c in result.checks] == [True, True, False, False]


def test_not_a_number_passes_nothing() -> None:
    """Wherever among the samples."""
    fine, broken = (1e-6, 10.0, 1e-6, True), (math.nan, 10.0, math.nan, True)
    assert verification._summary("28%", True, [fine, fine], 1e-4).passed
    for rows in ([fine, broken], [broken, fine]):
        found = verification._summary("28%", True, rows, 1e-4)
        assert not found.passed
        assert found.logit_difference == found.kl == 1e38


def test_pixels_as_the_processor_returns_them(folder: Path) -> None:
    """In float32, whatever the graphs' dtype: here in float64, for a graph in float32."""
    double = [{n: v.double() if v.is_floating_point() else v for n, v in one.items()} for one in samples()]
    assert verify(folder, small_model("llava"), double, new_tokens=2).passed


def test_changed_weights_fail(folder: Path) -> None:
    """Where hashes do not tell, numbers do."""
    data = torch.frombuffer(bytearray((folder / WEIGHTS).read_bytes()), dtype=torch.float32)
    (folder / WEIGHTS).write_bytes((data * 1.25).numpy().tobytes())
    document = json.loads((folder / MANIFEST).read_text())
    document["weights"]["sha256"] = file_sha256(folder / WEIGHTS)
    (folder / MANIFEST).write_text(json.dumps(document))
    result = verify(folder, small_model("llava"), samples(), new_tokens=3)
    assert result.runnable
    assert not result.passed


@pytest.mark.conformance
def test_float16(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported("llava", dtype=torch.float16), tmp_path / "out"))
    result = verify(folder, small_family("llava").build(dtype=torch.float16), samples(torch.float16)[:1], new_tokens=1)
    assert result.runnable
    assert all(c.logit_difference <= 0.02 * c.logit_scale for c in result.checks)


@pytest.mark.conformance
def test_bfloat16_is_not_runnable_here(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported("llava", dtype=torch.bfloat16), tmp_path / "out"))
    result = verify(folder, small_family("llava").build(dtype=torch.bfloat16), samples(torch.bfloat16)[:1])
    assert (result.runnable, result.passed, result.checks) == (False, False, ())
    assert result.reason.startswith("not runnable here")
    assert Manifest.load(folder).verification == result


def test_a_provider_that_is_installed_but_does_not_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA without a device: ONNX Runtime goes on with the processor, which must not be recorded as CUDA."""
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(providers, "_starts", lambda path, name: name != CUDA)
    before = (folder / MANIFEST).read_text()
    with pytest.raises(ValueError, match="CUDAExecutionProvider does not start here"):
        verify(folder, small_model("llava"), samples(), provider=CUDA)
    assert (folder / MANIFEST).read_text() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there CUDA starts")
def test_a_session_does_not_run_elsewhere_than_asked(folder: Path) -> None:
    with pytest.raises(UnrunnableError, match=r"embed\.onnx: .*CUDA"):
        GraphSession(folder / "embed.onnx", CUDA, optimized=True)


def test_refused(folder: Path) -> None:
    model = small_model("llava")
    with pytest.raises(ValueError, match=r"'NoProvider' is no provider; available here are .*CPUExecutionProvider"):
        verify(folder, model, samples(), provider="NoProvider")
    with pytest.raises(ValueError, match="at least one"):
        verify(folder, model, [])
    with pytest.raises(ValueError, match="exported from another model"):
        verify(folder, small_family("llava").build(seed=1), samples())
    with pytest.raises(ValueError, match="the export is in float32, the model in float16"):
        verify(folder, small_family("llava").build(dtype=torch.float16), samples())
