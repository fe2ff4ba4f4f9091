"""Models that accelerate prepared for mixed precision, before and after compiling, and forwards that users wrap."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import extract_model_from_parallel
from torch import Tensor

from dop_compile import Policy, dop_compile
from dop_compile.errors import UnsupportedModelError, UnsupportedUsageError
from dop_compile.onnx import export_onnx
from dop_compile.replay import Replay
from tests.families import FAMILIES
from tests.support import Batch, assert_close, make_batch, reference

FULL = Policy.full(4)
PRUNED = Policy.depthwise(4, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2)
TIERS = {"100%": FULL, "pruned": PRUNED}
ORDERS = ["before", "after", "original after", "both"]


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    yield Accelerator(mixed_precision="bf16", cpu=True)
    for state in states:
        state._reset_state()


def own_batch() -> Batch:
    return make_batch("llava", [[("text", 3), ("image",), ("text", 4)]], model=FAMILIES["llava"].build())


def compile_eagerly(model: Any) -> Any:
    return dop_compile(model, TIERS, backend="eager")


def prepared(accelerator: Accelerator, batch: Batch, order: str) -> Any:
    """The compiled model, where accelerate is given the original or the compiled model, before or after compiling."""
    if order in ("before", "both"):
        assert accelerator.prepare(batch.model) is batch.model
    compiled = compile_eagerly(batch.model)
    if order == "original after":
        accelerator.prepare(batch.model)
    if order in ("after", "both"):
        assert accelerator.prepare(compiled) is compiled
    return compiled


@torch.no_grad()
def check(compiled: Any, batch: Batch, *, mixed: bool) -> None:
    """Calls and generated scores are those of the original model in the same precision."""
    plain = FAMILIES["llava"].build()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        expected = plain(**batch.inputs).logits.float()
        pruned = reference(replace(batch, model=plain), PRUNED)
    unrounded = reference(replace(batch, model=plain), PRUNED)
    full = compiled(**batch.inputs, tier="100%").logits
    assert full.dtype == torch.float32
    assert torch.equal(full, expected)
    tolerance = 5e-2 if mixed else 1e-5
    assert_close(compiled(**batch.inputs, tier="pruned").logits, pruned.float(), tolerance)
    for call, options in ((compiled, {"tier": "pruned"}), (compiled.tier("pruned"), {})):
        assert_close(call(**batch.inputs, **options).logits, pruned.float(), tolerance)
        scores = generate(call, batch, **options)
        assert scores[0].dtype == torch.float32
        assert_close(scores[0], pruned[:, -1].float(), tolerance)
        assert torch.allclose(scores[0], unrounded[:, -1], rtol=1e-4, atol=1e-4) is not mixed
    rounded = plain(**batch.inputs).logits
    assert torch.equal(full, rounded) is not mixed


def generate(model: Any, batch: Batch, **options: Any) -> Any:
    settings = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**batch.inputs, **settings, **options).logits


@pytest.mark.parametrize("order", ORDERS)
def test_mixed_precision(order: str, accelerator: Accelerator) -> None:
    batch = own_batch()
    compiled = prepared(accelerator, batch, order)
    check(compiled, batch, mixed=True)
    assert accelerator.unwrap_model(compiled) is compiled
    assert extract_model_from_parallel(compiled) is compiled
    check(compiled, batch, mixed=True)
    for model in (compiled, batch.model):
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    check(compiled, batch, mixed=False)


def test_a_tier_view_follows_what_comes_later(accelerator: Accelerator) -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model)
    view = compiled.tier("pruned")
    accelerator.prepare(compiled)
    for one in (view, compiled.tier("pruned").tier("pruned")):
        with torch.no_grad():
            assert torch.equal(one(**batch.inputs).logits, compiled(**batch.inputs, tier="pruned").logits)
            assert all(map(torch.equal, generate(one, batch), generate(compiled, batch, tier="pruned")))


@pytest.mark.parametrize("order", ORDERS)
def test_training_steps(order: str, accelerator: Accelerator) -> None:
    """At 100 % the weights are those that the original is trained to."""
    batch = own_batch()
    trained = []
    for model in (accelerator.prepare(FAMILIES["llava"].build()), prepared(accelerator, batch, order).tier("100%")):
        model.train()
        optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.01))
        for _ in range(2):
            output = model(**batch.inputs, labels=batch.inputs["input_ids"])
            accelerator.backward(output.loss)
            optimizer.step()
            optimizer.zero_grad()
        trained.append(model.state_dict())
    for name, weight in trained[0].items():
        assert torch.equal(weight, trained[1][name]), name
    assert not torch.equal(trained[0]["lm_head.weight"], FAMILIES["llava"].build().lm_head.weight)


def test_what_a_user_puts_around_the_compiled_model() -> None:
    """Every step of a `generate` runs it, with the arguments of the call."""
    batch = own_batch()
    compiled = compile_eagerly(batch.model)
    plain = compiled.generate(**batch.inputs, max_new_tokens=3, do_sample=False, tier="pruned")
    forward, seen = compiled.forward, []

    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].shape[1])
        output = forward(*args, **kwargs)
        output.logits = -output.logits
        return output

    compiled.forward = noting
    with torch.no_grad():
        negated = compiled(**batch.inputs, tier="pruned").logits
        assert_close(-negated, reference(batch, PRUNED))
    seen.clear()
    found = generate(compiled, batch, tier="pruned")
    assert_close(found[0], negated[:, -1])
    assert seen == [batch.inputs["input_ids"].shape[1], 1]
    compiled.forward = forward
    assert torch.equal(compiled.generate(**batch.inputs, max_new_tokens=3, do_sample=False, tier="pruned"), plain)


def test_a_forward_that_does_not_come_to_the_compiled_model_is_refused() -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model)
    compiled.forward = batch.model.forward
    with pytest.raises(UnsupportedUsageError, match="replaced by one that does not call it"):
        compiled.generate(**batch.inputs, max_new_tokens=2)


def closed_over(model: Any) -> Any:
    original = model.forward
    return lambda *args, **kwargs: original(*args, **kwargs)


def bound_to_it(model: Any) -> Any:
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return MethodType(forward, model)


@pytest.mark.parametrize("replaced", [closed_over, bound_to_it])
@pytest.mark.parametrize("order", ["before", "after"])
def test_other_forwards_on_the_original_are_refused(replaced: Any, order: str) -> None:
    batch = own_batch()
    compiled = compile_eagerly(batch.model) if order == "after" else None
    batch.model.forward = replaced(batch.model)
    if compiled is None:
        with pytest.raises(UnsupportedModelError, match=r"forward of the model .* was replaced.*accelerate"):
            compile_eagerly(batch.model)
    else:
        with pytest.raises(UnsupportedUsageError, match="was replaced on the original model after dop_compile"):
            compiled(**batch.inputs)


def test_parts_of_a_prepared_model_are_not_run_alone(accelerator: Accelerator, tmp_path: Any) -> None:
    batch = own_batch()
    compiled = prepared(accelerator, batch, "before")
    with pytest.raises(UnsupportedUsageError, match=r"unwrap_model\(model, keep_fp32_wrapper=False\)"):
        Replay(compiled, batch.inputs)
    with pytest.raises(UnsupportedUsageError, match=r"unwrap_model\(model, keep_fp32_wrapper=False\)"):
        export_onnx(batch.model, TIERS, tmp_path / "graphs", examples=[batch.inputs])
    accelerator.unwrap_model(batch.model, keep_fp32_wrapper=False)
    replay = Replay(compiled, batch.inputs)
    assert isinstance(replay.logits(PRUNED), Tensor)
