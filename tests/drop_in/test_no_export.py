"""What records a call of a compiled model is refused, with the way to export it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from dop_compile import Policy
from tests.support import ONE_IMAGE, compile_eagerly, make_batch


def _export(strict: bool) -> Callable[[Any, dict[str, Any]], Any]:
    return lambda model, inputs: torch.export.export(model, (), inputs, strict=strict)


def _jit(model: Any, inputs: dict[str, Any]) -> Any:
    return torch.jit.trace(model, (inputs["input_ids"], inputs["pixel_values"]), strict=False, check_trace=False)


def _fx(model: Any, inputs: dict[str, Any]) -> Any:
    class Outer(torch.nn.Module):
        def forward(self, input_ids: Any) -> Any:
            return model.forward(input_ids=input_ids)

    return fx.symbolic_trace(Outer())


@pytest.mark.parametrize("record", [_export(False), _export(True), _jit, _fx], ids=["export", "strict", "jit", "fx"])
@torch.no_grad()
def test_recording_is_refused(record: Callable[[Any, dict[str, Any]], Any]) -> None:
    batch = make_batch("llava", ONE_IMAGE)
    compiled = compile_eagerly(batch.model, Policy.depthwise(4, mlp_depth=2, visual_tokens=4))
    with pytest.raises(Exception, match=r"export_onnx\(compiled"):
        record(compiled, dict(batch.inputs))
    assert compiled(**batch.inputs).logits.isfinite().all()
