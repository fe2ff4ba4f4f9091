"""Exported tiers under ONNX Runtime's CUDA provider, where the installed package has it."""

from __future__ import annotations

import dataclasses
import tempfile
from importlib.util import find_spec
from typing import Any

import torch

from dop_compile import export_onnx
from gpu.setting import Decoder, Setting, geometry
from gpu.timing import reason

__all__ = ["exported", "note_providers"]

PART = "ONNX Runtime"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
LAYERS = 2


def note_providers(setting: Setting) -> list[str]:
    """What the installed ONNX Runtime can run on, also for the results."""
    if find_spec("onnxruntime") is None:
        setting.store.note(PART, missing="onnxruntime is not installed")
        return []
    import onnxruntime as ort

    available: list[str] = ort.get_available_providers()
    setting.store.note(PART, version=ort.__version__, providers=available)
    if CUDA not in available:
        setting.store.note(PART, missing=f"{CUDA} is not in the installed package (onnxruntime-gpu has it)")
    return available


def exported(setting: Setting) -> None:
    """Prefill and decoding as `OnnxPipeline` measures them when it loads, by provider."""
    available = note_providers(setting)
    if CUDA not in available and not (setting.tiny and available):
        return
    from dop_compile.onnx.export.shapes import Shapes
    from dop_compile.onnx.run.pipeline import OnnxPipeline
    from dop_compile.onnx.run.sessions import UnrunnableError

    shape = geometry(setting, "small")
    config = {**shape.config, "num_hidden_layers": LAYERS}
    cpu = dataclasses.replace(setting, device=torch.device("cpu"))  # exported from there, in float32
    decoder = Decoder(cpu, dataclasses.replace(shape, config=config))
    tiers = {name: decoder.policies[name] for name in ("100%", "28%")}
    shapes = Shapes(visual_length=shape.visual, text=(2, shape.system + shape.text, 1024))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(decoder.model, tiers, folder, shapes=shapes, force=True)
        for provider in [CUDA, CPU] if CUDA in available else [CPU]:
            try:
                pipeline = OnnxPipeline.load(folder, providers=[provider], hashes=False)
            except (ValueError, UnrunnableError) as error:
                rows.append({"name": provider, "error": reason(error)})
                continue
            for tier, latency in pipeline.latencies.items():
                tokens, ms = latency.points[0]
                rows.append({"name": f"{provider}, {tier}: prefill of {tokens} tokens", "ms": ms})
                rows.append({"name": f"{provider}, {tier}: generated token", "ms": latency.decode_ms})
    setting.store.add(PART, f"{LAYERS} layers x {config['hidden_size']}, float32", rows)
