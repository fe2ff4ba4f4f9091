"""Captured prefills: replayed at all, equal to calls without, nobody's tensors written twice, and left where they must.

On the processor a stand-in records operations; `tests/test_cuda.py` does the same with CUDA graphs.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dop_compile import Policy, UnsupportedUsageError, dop_compile
from dop_compile.runtime.graphs import PrefillGraphs
from tests.families import FAMILIES
from tests.graph_stand_in import StandInRecorder
from tests.support import ONE_IMAGE, Rows, make_batch, shared_model

PADDED: Rows = [[("text", 4), ("image",), ("text", 3)], [("text", 2), ("image",), ("text", 9)]]


def tiers(layers: int) -> dict[str, Policy]:
    split = {"mha_query_depth": 1, "mha_key_value_depth": layers - 1, "mlp_depth": 2}
    return {
        "100%": Policy.full(layers),
        "split": Policy.depthwise(layers, **split),
        "uniform": Policy.depthwise(layers, **split, reducer="uniform", visual_tokens=3),
        "given": Policy.depthwise(layers, **split, reducer="given"),
    }


def both(model: Any, backend: str = "eager") -> tuple[Any, Any]:
    """The compiled model with captured prefills, and without."""
    policies = tiers(model.config.get_text_config().num_hidden_layers)
    with_graphs = dop_compile(model, policies, backend=backend, cuda_graphs=True)
    with_graphs.dop.graphs.recorder = StandInRecorder()
    return with_graphs, dop_compile(model, policies, backend=backend)


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    result: Tensor = model(**inputs, **settings).logits
    return result


@pytest.mark.parametrize("rows", [ONE_IMAGE, PADDED], ids=["one row", "padded"])
@pytest.mark.parametrize("tier", ["100%", "split", "uniform"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_replayed_prefills_are_bitwise_those_without(name: str, tier: str, rows: Rows) -> None:
    model = shared_model(name)
    with_graphs, without = both(model)
    for number in range(3):
        inputs = make_batch(name, rows, seed=number).inputs
        assert torch.equal(logits(with_graphs, inputs, tier=tier), logits(without, inputs, tier=tier))
    assert (len(with_graphs.dop.graphs), with_graphs.dop.graphs.replayed) == (1, 2)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generates_from_a_replayed_prefill(settings: dict[str, Any]) -> None:
    with_graphs, without = both(shared_model("llava"))
    for number in range(3):
        inputs = make_batch("llava", PADDED, seed=number).inputs
        found, expected = (
            model.generate(**inputs, tier="uniform", max_new_tokens=4, do_sample=False, **settings)
            for model in (with_graphs, without)
        )
        assert torch.equal(found, expected)
    assert with_graphs.dop.graphs.replayed == 2


def test_inference_mode_has_a_graph_of_its_own() -> None:
    with_graphs, without = both(shared_model("llava"))
    for number in range(3):
        inputs = make_batch("llava", ONE_IMAGE, seed=number).inputs
        expected = logits(without, inputs, tier="split")
        assert torch.equal(logits(with_graphs, inputs, tier="split"), expected)
        with torch.inference_mode():
            assert torch.equal(with_graphs(**inputs, tier="split").logits, expected)
    assert (len(with_graphs.dop.graphs), with_graphs.dop.graphs.replayed) == (2, 4)


def test_the_same_numbers_in_another_order_are_another_graph() -> None:
    with_graphs, without = both(shared_model("llava"))
    for _ in range(3):
        for before in (4, 3, 2):
            inputs = make_batch("llava", [[("text", before), ("image",), ("text", 7 - before)]]).inputs
            assert torch.equal(logits(with_graphs, inputs, tier="split"), logits(without, inputs, tier="split"))
    assert len(with_graphs.dop.graphs) == 3


def test_what_a_caller_holds_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with_graphs, _ = both(shared_model("llava"))
    graphs, hidden = with_graphs.dop.graphs, []
    run = graphs.run
    monkeypatch.setattr(graphs, "run", lambda *args: hidden.append(run(*args)) or hidden[-1])
    held = []
    for number in range(4):
        with torch.no_grad():
            output = with_graphs(**make_batch("llava", ONE_IMAGE, seed=number).inputs, tier="split")
        tensors = [
            hidden[-1],
            output.logits,
            *(part for layer in output.past_key_values.layers for part in (layer.keys, layer.values)),
        ]
        held.append((tensors, [tensor.clone() for tensor in tensors]))
    assert with_graphs.dop.graphs.replayed == 3
    for tensors, copies in held:
        assert all(torch.equal(*pair) for pair in zip(tensors, copies, strict=True))


def test_other_kept_tokens_share_a_graph_and_other_numbers_do_not() -> None:
    with_graphs, without = both(shared_model("llava"))
    inputs = make_batch("llava", ONE_IMAGE).inputs
    for kept in ([[0, 1, 2]], [[0, 1, 2]], [[3, 4, 5]], [[0, 5, 2]], [[3, 4, 5]]):
        settings = {"tier": "given", "visual_indices": kept}
        assert torch.equal(logits(with_graphs, inputs, **settings), logits(without, inputs, **settings))
    assert len(with_graphs.dop.graphs) == 1
    text = make_batch("llava", [[("text", 5), ("image",), ("text", 3)]]).inputs
    for _ in range(2):
        assert torch.equal(
            logits(with_graphs, text, tier="given", visual_indices=[[0, 1, 2]]),
            logits(without, text, tier="given", visual_indices=[[0, 1, 2]]),
        )
    assert len(with_graphs.dop.graphs) == 2


def test_weights_are_followed() -> None:
    model = FAMILIES["llava"].build()
    with_graphs, without = both(model)
    inputs = make_batch("llava", ONE_IMAGE, model=model).inputs

    def check() -> Tensor:
        found = [logits(with_graphs, inputs, tier="split") for _ in range(3)]
        expected = logits(without, inputs, tier="split")
        assert all(torch.equal(each, expected) for each in found)
        return expected

    seen = [check()]
    linear = model.model.language_model.layers[0].mlp.down_proj
    with torch.no_grad():
        linear.weight.mul_(2)
    seen.append(check())
    linear.weight = nn.Parameter(linear.weight.detach() * 2)
    seen.append(check())
    linear.weight.data = linear.weight.data * 2
    seen.append(check())
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))


def test_hooks_gradients_and_adapters_are_not_captured() -> None:
    model = FAMILIES["llava"].build()
    inputs = make_batch("llava", ONE_IMAGE, model=model).inputs
    with_graphs, without = both(model)
    for _ in range(3):
        assert with_graphs(**inputs, tier="split").logits.requires_grad
    decoder = model.model.language_model
    assert with_graphs.dop.graphs.replayed == 0
    for _ in range(2):
        logits(with_graphs, inputs, tier="split")
    assert (len(with_graphs.dop.graphs), with_graphs.dop.graphs.replayed) == (1, 1)
    hook = decoder.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 2)
    for _ in range(3):
        assert torch.equal(logits(with_graphs, inputs, tier="split"), logits(without, inputs, tier="split"))
    assert (len(with_graphs.dop.graphs), with_graphs.dop.graphs.replayed) == (0, 1)
    hook.remove()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).get_base_model()
    with_graphs, without = both(adapted)
    for scale in (1.0, 3.0, 5.0):
        for layer in decoder.layers:
            layer.self_attn.q_proj.scaling["default"] = scale
        assert torch.equal(logits(with_graphs, inputs, tier="split"), logits(without, inputs, tier="split"))
    assert with_graphs.dop.graphs.replayed == 0


def test_settings_in_tables_are_followed() -> None:
    model = FAMILIES["qwen2_5_vl"].build()
    with_graphs, _ = both(model)
    inputs = make_batch("qwen2_5_vl", ONE_IMAGE, model=model).inputs
    for _ in range(3):
        logits(with_graphs, inputs, tier="split")
    assert (len(with_graphs.dop.graphs), with_graphs.dop.graphs.replayed) == (1, 2)
    (before,) = with_graphs.dop.graphs._captured.values()
    logits(with_graphs, inputs, tier="split")
    assert list(with_graphs.dop.graphs._captured.values()) == [before]
    model.model.language_model.layers[0].self_attn.rope_parameters["rope_theta"] = 1.0
    logits(with_graphs, inputs, tier="split")
    (after,) = with_graphs.dop.graphs._captured.values()
    assert after is not before
    assert after.holds()


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_decoders_that_take_more_are_not_captured(name: str) -> None:
    with_graphs, without = both(shared_model(name))
    inputs = make_batch(name, ONE_IMAGE).inputs
    for _ in range(3):
        assert torch.equal(logits(with_graphs, inputs, tier="split"), logits(without, inputs, tier="split"))
    assert with_graphs.dop.graphs.replayed == 0


def test_later_turns_and_calls_without_cache_run_as_ever() -> None:
    with_graphs, without = both(shared_model("llava"))
    inputs = make_batch("llava", ONE_IMAGE).inputs
    more = torch.tensor([[5, 6, 7]])
    for _ in range(3):
        results = []
        for model in (with_graphs, without):
            with torch.no_grad():
                first = model(**inputs, tier="split")
                second = model(input_ids=more, past_key_values=first.past_key_values, tier="split")
            results.append(second.logits)
            results.append(logits(model, inputs, tier="split", use_cache=False))
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[3])
    assert with_graphs.dop.graphs._told == {"a later turn of a conversation", "no cache is used"}
    assert with_graphs.dop.graphs.replayed == 2


def test_what_cannot_be_captured_runs_without() -> None:
    class Refusing(StandInRecorder):
        def record(self, run: Any, device: torch.device) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    with_graphs, without = both(shared_model("llava"))
    with_graphs.dop.graphs.recorder = Refusing()
    inputs = make_batch("llava", ONE_IMAGE).inputs
    for _ in range(3):
        assert torch.equal(logits(with_graphs, inputs, tier="split"), logits(without, inputs, tier="split"))
    assert len(with_graphs.dop.graphs) == 0


def test_few_are_kept() -> None:
    with_graphs, without = both(shared_model("llava"))
    with_graphs.dop.graphs = PrefillGraphs(StandInRecorder(), limit=2)
    for _ in range(3):
        for words in (3, 4, 5):
            inputs = make_batch("llava", [[("text", words), ("image",), ("text", 3)]]).inputs
            assert torch.equal(logits(with_graphs, inputs, tier="split"), logits(without, inputs, tier="split"))
            assert len(with_graphs.dop.graphs) <= 2


def test_a_processor_is_refused() -> None:
    model = dop_compile(shared_model("llava"), Policy.full(4), backend="eager", cuda_graphs=True)
    with pytest.raises(UnsupportedUsageError, match="move it to an NVIDIA GPU"):
        logits(model, make_batch("llava", ONE_IMAGE).inputs)
