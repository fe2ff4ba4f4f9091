"""Vision towers without their control flow: what follows from the layout is constant, what pixels decide is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from dop_compile import UnsupportedModelError
from dop_compile.onnx.export.capture import VisionCall, capture_prompt
from dop_compile.onnx.export.flat import flat
from dop_compile.onnx.export.graphs import Vision
from tests.conformance.table import EXACT

PIXELS = torch.arange(24, dtype=torch.float32).view(1, 4, 6)
SIZES = torch.tensor([[2, 3]])


def graph_of(module: nn.Module) -> fx.Graph:
    assert isinstance(module, fx.GraphModule)
    return module.graph


def functions(module: nn.Module) -> set[str]:
    return {str(node.target) for node in graph_of(module).nodes if node.op == "call_function"}


def test_what_follows_from_the_layout_is_computed_ahead() -> None:
    def tower(pixels: Tensor) -> Tensor:
        height, width = SIZES[0]
        steps = torch.arange(int(height * width)) % width
        return pixels[0, :height, :width].flatten() * steps.float()

    module = flat(tower, PIXELS)
    assert not {name for name in functions(module) if "arange" in name or "remainder" in name or "to_copy" in name}
    other = torch.randn(1, 4, 6)
    assert torch.equal(module(other), tower(other))


def test_weights_are_not_computed_with_ahead() -> None:
    """They would be stored twice."""
    weight = nn.Parameter(torch.randn(3, 6))
    module = flat(lambda pixels: pixels @ weight.t(), PIXELS)
    assert "aten.t.default" in functions(module)


def test_new_tensors_that_pixels_are_written_to() -> None:
    def tower(pixels: Tensor) -> Tensor:
        place = torch.zeros(2, 6)
        place[1] = pixels[0, 0]
        return place

    module = flat(tower, PIXELS)
    for _ in range(2):
        other = torch.randn(1, 4, 6)
        assert torch.equal(module(other), tower(other))


def test_a_squeeze_that_does_nothing_goes() -> None:
    module = flat(lambda pixels: pixels.squeeze(0).squeeze(0), PIXELS)
    assert [str(node.target) for node in graph_of(module).nodes].count("aten.squeeze.dim") == 1
    assert torch.equal(module(PIXELS), PIXELS[0])


def test_what_pixels_decide_is_refused() -> None:
    def tower(pixels: Tensor) -> Tensor:
        return pixels if bool((pixels > 0).any()) else -pixels

    with pytest.raises(UnsupportedModelError, match="decides by the values of its pixels"):
        flat(tower, PIXELS)


def vision_call(name: str) -> tuple[nn.Module, VisionCall]:
    family = EXACT[name]
    model = family.build()
    prompt = family.make_inputs(model, [[("text", 3), ("image",), ("text", 4)]])
    return model, capture_prompt(model, prompt).vision[0]


@pytest.mark.parametrize("name", ["mistral3", "qwen2_vl", "glm4v"])
def test_towers_that_read_sizes(name: str) -> None:
    model, call = vision_call(name)
    pixels: Tensor = call.kwargs[call.pixels]
    with torch.no_grad():
        module = flat(Vision(model, call), pixels)
        torch.testing.assert_close(module(pixels), call.features)
        other = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(module(other), Vision(model, call)(other))


def test_a_tower_that_looks_for_empty_images_is_refused() -> None:
    model, call = vision_call("smolvlm")
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="decides by the values of its pixels"):
        flat(Vision(model, call), call.kwargs[call.pixels])
