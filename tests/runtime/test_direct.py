"""Compiled pieces past their guards: taken at all, equal to torch.compile's own calls, and left where they must be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from dop_compile import Policy, dop_compile
from dop_compile.runtime import direct
from tests.families import FAMILIES
from tests.support import Batch, assert_close, make_batch

pytestmark = pytest.mark.inductor

ROWS = [[("text", 4), ("image",), ("text", 6)]]


def policy(layers: int) -> Policy:
    return Policy.depthwise(layers, mha_query_depth=1, mha_key_value_depth=layers - 1, mlp_depth=1)


@contextlib.contextmanager
def guarded_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Counts the calls of pieces that go through torch.compile."""
    calls: list[bool] = []
    original = direct.Site._all

    def counted(self: Any, values: Any) -> Any:
        calls.append(True)
        return original(self, values)

    with monkeypatch.context() as patch:
        patch.setattr(direct.Site, "_all", counted)
        yield calls


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch("llava", ROWS)


@pytest.fixture(scope="module")
def compiled(batch: Batch) -> Any:
    return dop_compile(batch.model, {"pruned": policy(batch.family.num_layers)})


@pytest.fixture(scope="module")
def eager(batch: Batch) -> Any:
    return dop_compile(batch.model, {"pruned": policy(batch.family.num_layers)}, backend="eager")


def logits(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch.inputs).logits
    return result


def test_all_pieces_go_past_their_guards(
    batch: Batch, compiled: Any, eager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with guarded_calls(monkeypatch) as calls:
        first = logits(compiled, batch)
        assert calls
        calls.clear()
        assert torch.equal(logits(compiled, batch), first)
        other = make_batch("llava", [[("text", 2), ("image",), ("text", 9)]])
        assert_close(logits(compiled, other), logits(eager, other))
        assert not calls, "other lengths hold, too"
        two_rows = make_batch("llava", ROWS * 2)
        assert_close(logits(compiled, two_rows), logits(eager, two_rows))
        assert calls, "of one row or several: two functions"
        calls.clear()
        assert torch.equal(logits(compiled, batch), first)
        assert not calls, "both stay"


def test_tokens(batch: Batch, compiled: Any, eager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    compiled.generate(**batch.inputs, **settings)
    with guarded_calls(monkeypatch) as calls:
        found = compiled.generate(**batch.inputs, **settings)
        assert not calls
    assert torch.equal(found, eager.generate(**batch.inputs, **settings))


def test_with_gradients_and_under_autocast_torch_compile_judges(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Policy.full(batch.family.num_layers)  # whose layers are all compiled as one
    compiled, eager = (dop_compile(batch.model, full, backend=backend) for backend in ("inductor", "eager"))
    logits(compiled, batch)
    with guarded_calls(monkeypatch) as calls:
        found = compiled(**batch.inputs).logits
        assert calls
        assert found.requires_grad
        assert_close(found.detach(), logits(eager, batch))
        calls.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = logits(compiled, batch)
            assert calls
            assert_close(half.float(), logits(eager, batch).float(), 3e-2)


def test_changed_weights_and_numbers_are_followed() -> None:
    own = make_batch("llava", ROWS, model=FAMILIES["llava"].build())
    compiled = dop_compile(own.model, policy(own.family.num_layers))
    plain = dop_compile(own.model, policy(own.family.num_layers), backend="eager")
    before = logits(compiled, own)
    assert torch.equal(logits(compiled, own), before)
    norm = own.model.model.language_model.layers[0].post_attention_layernorm
    with torch.no_grad():
        norm.weight.mul_(2)
    scaled = logits(compiled, own)
    assert_close(scaled, logits(plain, own))
    norm.weight = torch.nn.Parameter(norm.weight.detach() * 2)
    again = logits(compiled, own)
    assert_close(again, logits(plain, own))
    assert not torch.allclose(again, scaled)
    norm.variance_epsilon = 0.5
    last = logits(compiled, own)
    assert_close(last, logits(plain, own))
    assert not torch.allclose(last, again)


def test_adapters_are_switched() -> None:
    """What switches them changes inside of lists and tables, which no call could look through."""
    own = make_batch("llava", ROWS, model=FAMILIES["llava"].build())
    adapted = get_peft_model(own.model, LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    model = adapted.base_model.model
    compiled = dop_compile(model, policy(own.family.num_layers))
    plain = dop_compile(model, policy(own.family.num_layers), backend="eager")
    found = [logits(compiled, own) for _ in range(2)][1]
    assert_close(found, logits(plain, own))
    with adapted.disable_adapter():
        without = logits(compiled, own)
        assert_close(without, logits(plain, own))
    assert not torch.allclose(without, found)
    for module in adapted.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(3.0)
    assert_close(logits(compiled, own), logits(plain, own))


def test_hooks_that_read_what_changes_outside() -> None:
    own = make_batch("llava", ROWS, model=FAMILIES["llava"].build())
    inverted = [False]
    mlp = own.model.model.language_model.layers[0].mlp
    mlp.register_forward_hook(lambda module, inputs, output: -output if inverted[0] else output)
    compiled = dop_compile(own.model, policy(own.family.num_layers))
    plain = dop_compile(own.model, policy(own.family.num_layers), backend="eager")
    found = [logits(compiled, own) for _ in range(2)][1]
    assert_close(found, logits(plain, own))
    inverted[0] = True
    changed = logits(compiled, own)
    assert_close(changed, logits(plain, own))
    assert not torch.allclose(changed, found)
