"""Visual tokens that only supply keys and values: their normalised state is computed once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from dop_compile import Policy, ops
from dop_compile.errors import PassError
from dop_compile.passes import run_passes
from dop_compile.passes.graph import DecoderGraph
from dop_compile.passes.share_frozen import SHARE_FROZEN
from tests.passes.graphs import (
    LAYERS,
    build,
    calls_of,
    codes_of,
    kv_only_from,
    report_of,
    run_graph,
    targets,
    up_to,
)

TEXT_ONLY = frozenset({"text"})
CODES = codes_of("ssvvvvtt", "..vvtttt")


def _rsqrts(graph: DecoderGraph) -> int:
    return len(targets(graph, torch.rsqrt))


def test_frozen_tokens_cost_keys_and_values_and_nothing_else() -> None:
    """The most important case: no query or output projection, no attention row, no MLP, one normalisation."""
    graph = build(kv_only_from(1), requested=TEXT_ONLY)
    for layer in range(1, LAYERS):
        held = {
            part: str(node.meta["tokens"])
            for part in ("q_proj", "k_proj", "v_proj", "o_proj", "mlp")
            for node in calls_of(graph, part, layer)
        }
        updated = "system_text" if layer < LAYERS - 1 else "requested"
        assert held == {"q_proj": updated, "k_proj": "all", "v_proj": "all", "o_proj": updated, "mlp": updated}
        (kernel,) = [n for n in graph.graph.nodes if n.meta.get("attention") and graph.traced.layer_of(n) == layer]
        assert str(kernel.meta["tokens"]) == updated
    assert _rsqrts(graph) == 1
    frozen = next(node for node in graph.graph.nodes if node.name == "frozen_visual")
    norms = [user for node in frozen.users for user in node.users if node.op == "call_module"]
    assert norms == [], "no layer's norm runs on the frozen tokens"
    assert report_of(graph, SHARE_FROZEN).rewritten == LAYERS - 1


def test_a_query_reads_its_own_norm_and_not_the_merge() -> None:
    graph = build(kv_only_from(1), requested=TEXT_ONLY)
    (query,) = calls_of(graph, "q_proj", layer=1)
    assert query.args[0].op == "call_module"  # type: ignore[union-attr]
    (key,) = calls_of(graph, "k_proj", layer=1)
    assert key.args[0].target is ops.token_merge  # type: ignore[union-attr]


@pytest.mark.parametrize("policy", [Policy.full(LAYERS), Policy.depthwise(LAYERS, mha_depth=1, mlp_depth=1)])
def test_without_frozen_tokens_nothing_happens(policy: Policy) -> None:
    graph = build(policy, requested=TEXT_ONLY, diff=True)
    assert report_of(graph, SHARE_FROZEN).rewritten == 0
    assert graph.diffs["share_frozen"] == "unchanged"


@pytest.mark.parametrize("requested", [None, TEXT_ONLY])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_bits_are_equal(first: int, requested: frozenset[str] | None) -> None:
    last = 2 if requested else None
    arguments = {"requested": requested}
    expected, old = run_graph(build(kv_only_from(first), disable=["share_frozen"], **arguments), CODES, last)
    shared, new = run_graph(build(kv_only_from(first), **arguments), CODES, last)
    valid = (CODES >= 0)[:, -shared.shape[1] :]
    assert torch.equal(shared[valid], expected[valid])
    for before, after in zip(old.layers, new.layers, strict=True):
        held = (CODES >= 0)[:, None, :, None].expand_as(after.keys)
        assert torch.equal(after.keys[held], before.keys[held])


def _with_norms(change: object) -> nn.Module:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=LAYERS, intermediate_size=96,
                         vocab_size=128)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaModel._from_config(config, attn_implementation="sdpa").eval()
    for layer in model.layers:
        change(layer)  # type: ignore[operator]
    return model


def _hook(layer: nn.Module) -> None:
    layer.input_layernorm.register_forward_hook(lambda module, args, out: out * 2)


def _untraceable(layer: nn.Module) -> None:
    class OddNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight if bool((x >= 0).any()) else x

    layer.input_layernorm = OddNorm()


def _torch_norm(layer: nn.Module) -> None:
    layer.input_layernorm = nn.LayerNorm(64)


@pytest.mark.parametrize("change", [_hook, _untraceable, _torch_norm])
def test_a_norm_that_cannot_be_opened_runs_per_layer(change: object) -> None:
    model = _with_norms(change)
    graph = build(kv_only_from(1), model=model, requested=TEXT_ONLY)
    assert _rsqrts(graph) == 0
    assert sum("cannot be opened" in reason for reason in report_of(graph, SHARE_FROZEN).kept) == LAYERS - 1
    plain, _ = run_graph(build(kv_only_from(1), model=model, requested=TEXT_ONLY, disable=["share_frozen"]), CODES, 2)
    shared, _ = run_graph(graph, CODES, 2)
    torch.testing.assert_close(shared, plain, rtol=1e-6, atol=1e-6)


def test_the_users_modules_are_left_as_they_were() -> None:
    model = _with_norms(lambda layer: None)
    before = [dict(vars(module)) for module in model.modules()]
    build(kv_only_from(1), model=model, requested=TEXT_ONLY)
    assert [dict(vars(module)) for module in model.modules()] == before


def test_twice_is_refused() -> None:
    with pytest.raises(PassError, match="already run"):
        run_passes(build(kv_only_from(1), up_to(SHARE_FROZEN)), [SHARE_FROZEN])
