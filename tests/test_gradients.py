"""Gradients of compiled models under reducers, against finite differences of the same function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dop_compile import Policy
from dop_compile.errors import UnsupportedUsageError
from dop_compile.reducers import Selection, VisualContext, registry
from tests.families import FAMILIES
from tests.support import Batch, compile_eagerly, make_batch

MERGING = ("visionzip", "prumerge", "prumerge_plus", "trim")
CHOOSING = ("uniform", "divprune", "cdpruner", "vispruner")
ROWS = [
    [("text", 5), ("image",), ("text", 4)],
    [("text", 2), ("image",), ("text", 3), ("image", 1), ("text", 6)],
]
PROJECTORS = ("multi_modal_projector", "merger", "modality_projection")
STEP = 2e-3  # norms and attention rows are computed in float32: a loss of 100 is known to 1e-5
NOISE = 2e-2


def double(family: str, rows: Any = None, padding: str = "left") -> Batch:
    batch = make_batch(family, ROWS if rows is None else rows, padding, model=FAMILIES[family].build().double())
    inputs = {n: v.double() if v.is_floating_point() else v for n, v in batch.inputs.items()}
    return Batch(batch.family, batch.model, inputs)


def loss_of(compiled: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    """A sum over every row that is no padding, weighted so that nothing cancels out."""
    weights = torch.randn(128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss() -> Tensor:
        logits = compiled(**batch.inputs).logits
        return (logits[:, -3:] * weights).sum()

    return loss


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """One of the first vision layer, whose output is attended to, one of the projector, one of the decoder."""
    named = dict(model.named_parameters())
    tower = [n for n in named if "vis" in n and named[n].dim() == 2 and not any(p in n for p in PROJECTORS)]
    early = next(n for n in tower if ".0." in n and any(part in n for part in ("fc1", "gate_proj", "mlp")))
    key = next(n for n in tower if any(part in n for part in (".0.self_attn.k_proj.weight", ".0.attn.qkv.weight")))
    projector = next(n for n in named if any(p in n for p in PROJECTORS) and named[n].dim() == 2)
    decoder = next(n for n in named if "language_model" in n and "layers.1.mlp.up_proj" in n)
    return {name: named[name] for name in dict.fromkeys((early, key, projector, decoder))}


def assert_gradients(loss: Callable[[], Tensor], values: dict[str, nn.Parameter]) -> None:
    """Along one direction of each parameter: the derivative is the slope between two near points."""
    for value in values.values():
        value.grad = None
    loss().backward()
    for number, (name, value) in enumerate(values.items()):
        direction = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(number))
        direction /= direction.norm()
        assert value.grad is not None, f"{name} has no gradient"
        found = float((value.grad * direction).sum())
        ends = []
        with torch.no_grad():
            for step in (STEP, -2 * STEP):
                value.add_(direction, alpha=step)
                ends.append(float(loss()))
            value.add_(direction, alpha=STEP)
        slope = (ends[0] - ends[1]) / (2 * STEP)
        assert found == pytest.approx(slope, rel=1e-2, abs=NOISE), name


@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_merged_tokens_carry_gradients(family: str, method: str) -> None:
    """Rows of one and of two images, padded; tiles and newlines; windows and merged patches."""
    batch = double(family)
    compiled = compile_eagerly(batch.model, Policy.full(4).replace(visual_tokens=6, reducer=method))
    assert_gradients(loss_of(compiled, batch), parameters(batch.model))


@pytest.mark.parametrize("method", ["visionzip", "prumerge", "trim"])
def test_one_row_padded_on_the_right(method: str) -> None:
    batch = double("llava", [ROWS[1], [("text", 3)]], padding="right")
    compiled = compile_eagerly(batch.model, Policy.full(4).replace(visual_tokens=5, reducer=method))
    assert_gradients(loss_of(compiled, batch), parameters(batch.model))


@pytest.mark.parametrize("method", CHOOSING)
def test_kept_tokens_carry_gradients(method: str) -> None:
    batch = double("llava")
    compiled = compile_eagerly(batch.model, Policy.depthwise(4, mlp_depth=3, visual_tokens=6, reducer=method))
    assert_gradients(loss_of(compiled, batch), parameters(batch.model))


def test_training_an_adapter_of_the_decoder() -> None:
    """Training mode, everything frozen but LoRA weights of the decoder and the projector."""
    peft = pytest.importorskip("peft")
    batch = double("llava")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=r".*language_model.*(q_proj|up_proj)", r=2, init_lora_weights=False)
    peft.inject_adapter_in_model(config, batch.model)
    batch.model.double()
    compiled = compile_eagerly(batch.model, Policy.depthwise(4, mha_depth=3, visual_tokens=6, reducer="prumerge"))
    compiled.train()
    named = {n: p for n, p in batch.model.named_parameters() if p.requires_grad and ".1." in n}
    assert any("lora_A" in n for n in named)
    assert_gradients(loss_of(compiled, batch), named)


def test_no_gradients_are_recorded_without() -> None:
    batch = double("llava")
    compiled = compile_eagerly(batch.model, Policy.full(4).replace(visual_tokens=6, reducer="prumerge"))
    with torch.no_grad():
        inference = compiled(**batch.inputs).logits
    assert torch.equal(inference, compiled(**batch.inputs).logits)
    assert not inference.requires_grad


# Reducers of other people's.


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))


@dataclass
class Merging:
    """Keeps the first tokens, each with a part of all others."""

    features: Callable[[VisualContext, int], Tensor]
    name = "merging"
    requires = frozenset({"features", "project"})

    def __call__(self, context: VisualContext, count: int) -> Selection:
        return Selection(torch.arange(count), self.features(context, count))


def _weighted(context: VisualContext, count: int) -> Tensor:
    scores = (context.projected @ context.text.mean(0)).softmax(0)
    return context.projected[:count] + scores @ context.projected + context.project(context.features[:count])


def compiled_with(batch: Batch, features: Callable[[VisualContext, int], Tensor]) -> nn.Module:
    registry._factories["merging"] = lambda: Merging(features)
    return compile_eagerly(batch.model, Policy.full(4).replace(visual_tokens=6, reducer="merging"))


def test_a_reducer_that_is_differentiable() -> None:
    """Also through the embeddings of the text."""
    batch = double("llava")
    compiled = compiled_with(batch, _weighted)
    values = parameters(batch.model) | {"embeddings": batch.model.get_input_embeddings().weight}
    assert_gradients(loss_of(compiled, batch), values)


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (lambda c, n: torch.from_numpy(c.projected.numpy()[:n] * 2), "differentiable operations.*numpy"),
        (lambda c, n: c.projected.detach()[:n] * 2, "'merging' returns features through which no gradient passes"),
    ],
    ids=["numpy", "detached"],
)
def test_features_without_gradients_are_refused_in_the_backward_pass(features: Any, said: str) -> None:
    batch = double("llava")
    compiled = compiled_with(batch, features)
    with torch.no_grad():
        expected = compiled(**batch.inputs).logits
    logits = compiled(**batch.inputs).logits
    assert torch.equal(logits, expected)
    with pytest.raises(UnsupportedUsageError, match=said):
        logits.sum().backward()


def test_a_reducer_that_only_chooses_is_given_plain_tensors() -> None:
    seen: list[VisualContext] = []

    class Numpy(Merging):
        def __call__(self, context: VisualContext, count: int) -> Selection:
            seen.append(context)
            return Selection(torch.from_numpy(context.features.numpy().argsort(0)[:count, 0]))

    batch = double("llava")
    registry._factories["merging"] = lambda: Numpy(_weighted)
    compiled = compile_eagerly(batch.model, Policy.full(4).replace(visual_tokens=6, reducer="merging"))
    compiled(**batch.inputs).logits.sum().backward()
    assert len(seen) == 3, "asked once for each image"


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_tower_that_checkpoints(reentrant: bool) -> None:
    """Attention that passed without a graph cannot weigh merged tokens in training; a choice needs none."""
    batch = double("llava")
    tower = batch.model.model.vision_tower
    tower.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tower.train()
    values = parameters(batch.model)
    for method in ("visionzip", "prumerge"):
        compiled = compile_eagerly(batch.model, Policy.full(4).replace(visual_tokens=6, reducer=method))
        if reentrant and method == "prumerge":
            with pytest.raises(UnsupportedUsageError, match=r"cls_attention.*vision tower.*'use_reentrant': False"):
                loss_of(compiled, batch)().backward()
        else:
            assert_gradients(loss_of(compiled, batch), values)
