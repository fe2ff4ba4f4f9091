"""Tracing a decoder: what becomes a node, what is refused, and that nobody else notices."""

from __future__ import annotations

import copy
import operator
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import DeepseekV3Config, DeepseekV3Model, LlamaConfig, LlamaModel, OPTConfig, OPTModel
from transformers.masking_utils import create_causal_mask

from dop_compile import Policy, ops
from dop_compile.compiler import build_graph
from dop_compile.errors import PassError, UnsupportedModelError
from dop_compile.hf.mixers import mixes_no_tokens
from dop_compile.hf.model_path import find_layers
from dop_compile.policy.keep import KeepTable
from dop_compile.tokens import Universe
from dop_compile.tracing.module_tracer import ModuleTracer
from dop_compile.tracing.proxies import BATCH, PACKED, TOKENS, Refused, ValueProxy
from dop_compile.tracing.trace import DecoderInputs, TracedDecoder, is_packed, trace_decoder
from tests.families import FAMILIES

LAYERS = 4
CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "vocab_size": 128,
}


def _llama(**changes: Any) -> LlamaModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaModel._from_config(LlamaConfig(**CONFIG | changes), attn_implementation="sdpa").eval()


def _modules(traced: TracedDecoder) -> list[str]:
    return [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]


# --- what becomes a node ------------------------------------------------------------------------------------------


def test_norms_projections_and_mlps_are_nodes_and_attention_is_open() -> None:
    calls = _modules(trace_decoder(_llama()))
    first = [call for call in calls if call.startswith("decoder.layers.0.")]
    assert [call.removeprefix("decoder.layers.0.") for call in first] == [
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp",
    ]
    assert calls[0] == "decoder.rotary_emb"
    assert calls[-1] == "decoder.norm"


def test_masks_kernels_and_stores_are_single_nodes() -> None:
    traced = trace_decoder(_llama())
    nodes = list(traced.graph.nodes)
    assert sum(node.target is create_causal_mask for node in nodes) == 1
    assert sum(bool(node.meta.get("attention")) for node in nodes) == LAYERS
    stores = [node for node in nodes if node.target is ops.update_cache]
    assert [traced.layer_of(node) for node in stores] == list(range(LAYERS))
    assert all(node.meta["effect"] for node in stores)
    traced.graph.lint()


def test_inputs_are_placeholders_by_name() -> None:
    names = [node.name for node in trace_decoder(_llama()).graph.nodes if node.op == "placeholder"]
    assert names == ["inputs_embeds", "position_ids", "attention_mask", "past_key_values"]
    inputs = DecoderInputs(position_rows=4, cached=False, packed=2)
    names = [n.name for n in trace_decoder(FAMILIES["qwen3_vl"].build().get_decoder(), inputs).graph.nodes
             if n.op == "placeholder"]  # fmt: skip
    assert names == ["inputs_embeds", "position_ids", "attention_mask", "visual_pos_masks", "packed_0", "packed_1"]


def test_masks_handed_over_are_one_placeholder_each() -> None:
    inputs = DecoderInputs(masks=("full_attention", "sliding_attention"))
    traced = trace_decoder(FAMILIES["gemma3"].build().get_decoder(), inputs)
    names = {node.name for node in traced.graph.nodes if node.op == "placeholder"}
    assert {"attention_mask_full_attention", "attention_mask_sliding_attention"} <= names


def test_example_values_have_prime_batch_and_token_sizes() -> None:
    traced = trace_decoder(_llama())
    (query, *_) = [node for node in traced.graph.nodes if str(node.target).endswith("q_proj")]
    assert tuple(query.meta["val"].shape) == (BATCH, TOKENS, 64)
    packed = [n for n in trace_decoder(FAMILIES["qwen3_vl"].build().get_decoder(), DecoderInputs(packed=1)).graph.nodes
              if is_packed(n.meta.get("val"))]  # fmt: skip
    assert packed
    assert {n.meta["val"].shape[0] for n in packed} == {PACKED}


def test_sizes_that_are_dynamic_are_nodes() -> None:
    traced = trace_decoder(_llama())
    views = [node for node in traced.graph.nodes if node.target == "view"]
    assert views
    assert all(isinstance(part, fx.Node) for view in views for part in view.args[1][:2])


def test_a_parameter_that_opened_code_reads_is_a_node() -> None:
    """GPT-OSS hands attention sinks, a parameter of the opened module, to its kernel."""
    from transformers import GptOssConfig, GptOssModel

    config = GptOssConfig(**CONFIG, head_dim=16, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0)
    traced = trace_decoder(GptOssModel._from_config(config, attn_implementation="eager").eval())
    names = [node.target for node in traced.graph.nodes if node.op == "get_attr"]
    assert "decoder.layers.0.self_attn.sinks" in names


def test_views_written_in_place_become_values() -> None:
    """DeepSeek V3 fills the parts of an empty tensor; without a user such a write would be dead."""
    latent = {"q_lora_rank": None, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    config = DeepseekV3Config(**CONFIG | latent | {"num_key_value_heads": 4, "first_k_dense_replace": LAYERS})
    model = DeepseekV3Model._from_config(config, attn_implementation="sdpa").eval()
    nodes = trace_decoder(model).graph.nodes
    assert sum(node.target is ops.masked_assign for node in nodes) == 2 * LAYERS
    assert not any(node.target == "copy_" for node in nodes)


def test_augmented_assignment_is_not_in_place() -> None:
    model = FAMILIES["cohere2_vision"].build().get_decoder()
    assert not any(node.target is operator.iadd for node in trace_decoder(model).graph.nodes)


def test_the_output_class_is_noted() -> None:
    assert trace_decoder(_llama()).output_class.__name__ == "BaseModelOutputWithPast"  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_models_and_dtypes(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        model = _llama().to(dtype)
    traced = trace_decoder(model)
    assert {node.meta["val"].dtype for node in traced.graph.nodes if str(node.target).endswith("q_proj")} == {dtype}


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "layers.1", "layers.1.self_attn"])
@pytest.mark.parametrize("method", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_opened_modules_are_refused(path: str, method: str) -> None:
    model = _llama()
    getattr(model.get_submodule(path), method)(lambda *args: None)
    with pytest.raises(UnsupportedModelError, match=f"{path or 'the decoder'} .*forward hook"):
        trace_decoder(model)


def test_a_replaced_forward_of_an_opened_module_is_refused() -> None:
    model = _llama()
    model.layers[2].forward = model.layers[2].forward
    with pytest.raises(UnsupportedModelError, match=r"layers\.2 .*replaced forward"):
        trace_decoder(model)


def test_hooks_inside_stay_with_their_module() -> None:
    model = _llama()
    model.layers[0].self_attn.q_proj.register_forward_hook(lambda *args: None)
    model.layers[0].mlp.register_forward_hook(lambda *args: None)
    assert trace_decoder(model).graph is not None


def test_recording_hooks_that_hugging_face_leaves_behind_are_harmless() -> None:
    model = _llama()
    with torch.no_grad():
        model(inputs_embeds=torch.randn(1, 3, 64), output_hidden_states=True, output_attentions=False)
    assert len(trace_decoder(model).graph.nodes) == len(trace_decoder(_llama()).graph.nodes)


def _with_layer_code(change: Callable[[Any, Any], Any]) -> LlamaModel:
    """A Llama whose first layer's input goes through `change` of (layer, hidden states)."""
    model = _llama()
    kind = type(model.layers[0])

    class Changed(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            return super().forward(change(self, hidden_states), **kwargs)

    model.layers[0].__class__ = Changed
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer, x: x if x.shape[1] > 1 else x * 2, "control flow depends on gt"),
        (lambda layer, x: x if x.sum() > 0 else x * 2, "control flow depends on"),
        (lambda layer, x: sum(row for row in x), "iterates over"),
        (lambda layer, x: x * len(x), "the length of"),
        (lambda layer, x: x.mul_(2), "mul_ changes .* in place"),
        (lambda layer, x: x.undefined_method(), "undefined_method cannot be evaluated"),
        (lambda layer, x: torch.zeros(range(x.shape[1])), ""),
    ],
)
def test_what_is_only_known_at_run_time_is_refused(change: Callable[[Any, Any], Any], message: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaModel cannot be traced, in decoder\.layers\.0: .*" + message
    ):
        trace_decoder(_with_layer_code(change))


def test_static_control_flow_is_followed() -> None:
    model = _with_layer_code(lambda layer, x: x * 2 if x.ndim == 3 and x.shape[-1] == 64 and x.dtype.is_floating_point
                             and x.size(-1) == 64 and x.dim() == 3 else None)  # fmt: skip
    assert sum(node.target is operator.mul for node in trace_decoder(model).graph.nodes) > 0


def test_a_decoder_without_a_list_of_layers_is_refused() -> None:
    model = _llama()
    model.config = copy.copy(model.config)
    model.config.num_hidden_layers = 9
    with pytest.raises(UnsupportedModelError, match="no list of 9 layers"):
        find_layers(model)


def test_a_layer_that_mixes_tokens_by_other_means_is_refused_by_number() -> None:
    model = _llama()
    model.layers[2].self_attn = nn.Linear(64, 64)
    with pytest.raises(UnsupportedModelError, match=r"layer 2 of LlamaModel .*instead of attention"):
        trace_decoder(model)


def test_a_layer_without_attention_is_an_mlp_only_where_its_parts_are_called_so() -> None:
    """What else it holds may mix tokens, whatever it is given."""
    model = _llama()
    del model.layers[2].self_attn
    assert mixes_no_tokens(model.layers[2])
    model.layers[2].fourier = nn.Identity()
    assert not mixes_no_tokens(model.layers[2])


def test_a_layer_that_ends_with_a_norm_is_refused_by_name() -> None:
    config = OPTConfig(hidden_size=64, num_attention_heads=4, ffn_dim=96, num_hidden_layers=2, vocab_size=128,
                       word_embed_proj_dim=64, do_layer_norm_before=False)  # fmt: skip
    decoder = OPTModel._from_config(config, attn_implementation="sdpa").eval().decoder
    keep = KeepTable.dense(2)
    with pytest.raises(PassError, match=r"can.* be pruned") as caught:
        build_graph(decoder, keep, Universe(keep.groups))
    assert caught.value.pass_name == "annotate"
    assert caught.value.layer == 1


# --- nobody else notices ------------------------------------------------------------------------------------------


def test_the_decoder_is_not_changed() -> None:
    model = _llama()
    before = {path: (type(module), dict(vars(module))) for path, module in model.named_modules()}
    namespace = dict(vars(__import__(LlamaModel.__module__, fromlist=["x"])))
    trace_decoder(model)
    assert {path: (type(module), dict(vars(module))) for path, module in model.named_modules()} == before
    assert dict(vars(__import__(LlamaModel.__module__, fromlist=["x"]))) == namespace


def test_other_threads_run_and_trace_the_same_model_meanwhile() -> None:
    """torch.fx patches nn.Module for the whole process while it traces; two such threads would crash each other."""
    model = _llama()
    embeds = torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = model(inputs_embeds=embeds).last_hidden_state
    wrong: list[str] = []
    runs = 0
    done = threading.Event()

    def run() -> None:
        nonlocal runs
        while not done.is_set():
            try:
                with torch.no_grad():
                    out = model(inputs_embeds=embeds).last_hidden_state
                if not torch.equal(out, expected):
                    wrong.append("another result")
                runs += 1
            except Exception as error:
                wrong.append(repr(error))

    sizes: list[int] = []

    def trace() -> None:
        for _ in range(4):
            sizes.append(len(trace_decoder(model).graph.nodes))

    runner = threading.Thread(target=run)
    tracers = [threading.Thread(target=trace) for _ in range(2)]
    for thread in (runner, *tracers):
        thread.start()
    for thread in tracers:
        thread.join()
    done.set()
    runner.join()
    assert wrong == []
    assert runs > 0
    assert sizes == [sizes[0]] * 8


def test_a_7b_decoder_on_meta_is_traced_and_rewritten_in_seconds() -> None:
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"):
        model = LlamaModel._from_config(config, attn_implementation="sdpa").eval()
    keep = KeepTable.from_policy(Policy.depthwise(32, mha_depth=26, mlp_depth=19), ("system", "visual", "text"))
    started = time.process_time()
    graph = build_graph(model, keep, Universe(keep.groups, frozenset({"text"})))
    assert time.process_time() - started < 20
    assert len(list(graph.blocks)) == 64


# --- proxies and the module tracer --------------------------------------------------------------------------------


def test_proxies_of_opaque_values_refuse_to_decide() -> None:
    container = nn.Module()
    tracer = ModuleTracer(container, set())
    proxy = ValueProxy(tracer.create_node("placeholder", "x", (), {}), tracer)
    with pytest.raises(Refused):
        bool(proxy)
    with pytest.raises(Refused):
        list(proxy)


def test_parts_of_an_untouched_module_tree_share_parameters() -> None:
    model = _llama()
    tracer = ModuleTracer(model, set())
    for (path, original), (other, duplicate) in zip(model.named_modules(), tracer.copy.named_modules(), strict=True):
        assert path == other
        assert duplicate is not original
        assert list(map(id, original._parameters.values())) == list(map(id, duplicate._parameters.values()))
        assert isinstance(duplicate, type(original))
