"""Flattened tokens are shaped back where every row is worked on alone, and left where that is not known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTModel

from dop_compile import Policy
from dop_compile.tracing.flat_tokens import unflatten_tokens
from dop_compile.tracing.module_tracer import ModuleTracer
from dop_compile.tracing.proxies import BATCH, TOKENS
from dop_compile.tracing.trace import trace_decoder
from dop_compile.tracing.tracer import DecoderTracer
from tests.conformance.text_only import TEXT_ONLY
from tests.support import assert_rows_match, compile_eagerly, make_batch


def _opt(**settings: object) -> nn.Module:
    config = OPTConfig(
        hidden_size=64, num_attention_heads=4, ffn_dim=96, num_hidden_layers=2, vocab_size=128, word_embed_proj_dim=64,
        **settings,  # type: ignore[arg-type]
    )  # fmt: skip
    decoder: nn.Module = OPTModel._from_config(config, attn_implementation="sdpa").eval().decoder
    return decoder


def _flat_nodes(graph: torch.fx.Graph) -> list[str]:
    values = ((node.name, node.meta.get("val")) for node in graph.nodes)
    return [name for name, value in values if isinstance(value, Tensor) and BATCH * TOKENS in value.shape]


def test_a_row_wise_mlp_works_on_tokens_again() -> None:
    graph = trace_decoder(_opt()).graph
    assert not _flat_nodes(graph)
    names = [node.name for node in graph.nodes]
    assert any("fc1" in name for name in names)  # it was there to be rewritten
    assert unflatten_tokens(graph, nn.Module()) == 0  # twice is the same as once


def test_what_is_not_row_wise_stays_flat() -> None:
    class Sorting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(-1, 64).sort(dim=0).values.view(x.shape)

    graph = _traced(Sorting())
    before = [node.name for node in graph.nodes]
    assert unflatten_tokens(graph, nn.Module()) == 0
    assert [node.name for node in graph.nodes] == before


def _traced(module: nn.Module) -> torch.fx.Graph:
    """A module's graph with example values, for (batch, tokens, 64)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    tracer = object.__new__(DecoderTracer)
    tracer._fake, tracer._memo, tracer._without_hooks = FakeTensorMode(allow_non_fake_inputs=True), {}, {}
    root = nn.Module()
    root.part = module
    ModuleTracer.__init__(tracer, root, {id(module)})
    with tracer._fake:
        example = torch.empty(BATCH, TOKENS, 64)
    x = tracer._placeholder("x", example)
    return tracer.record(lambda copy: copy.part(x))  # type: ignore[operator]


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_positions_that_a_decoder_takes_from_the_mask(padding: str) -> None:
    batch = make_batch(TEXT_ONLY["opt"], padding=padding)
    assert "position_ids" not in batch.inputs
    compiled = compile_eagerly(batch.model, Policy.full(batch.family.num_layers))
    expected = batch.model(**batch.inputs).logits
    assert torch.equal(compiled(**batch.inputs, **batch.call_arguments()).logits, expected)
    assert_rows_match(compiled(**batch.inputs, logits_to_keep=2).logits, expected, batch.mask)
