"""The verifier finds every way in which these tests break a legal graph, and says where."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
from torch import fx

from dop_compile import Policy, ops
from dop_compile.errors import PassError
from dop_compile.passes import PIPELINE, check_graph, run_passes
from dop_compile.passes.graph import DecoderGraph
from dop_compile.passes.infra import Pass
from dop_compile.passes.remove_dead import REMOVE_DEAD
from dop_compile.passes.share_frozen import SHARE_FROZEN
from dop_compile.passes.slice_operations import SLICE_OPERATIONS
from dop_compile.passes.verify import VERIFY
from tests.passes.graphs import LAYERS, build, calls_of, kv_only_from, targets, up_to

TEXT_ONLY = frozenset({"text"})


def _graph(policy: Policy | None = None, last: Pass = VERIFY) -> DecoderGraph:
    return build(policy or kv_only_from(1), up_to(last), requested=TEXT_ONLY)


def _named(graph: DecoderGraph, name: str) -> fx.Node:
    return next(node for node in graph.graph.nodes if node.name == name)


def test_legal_graphs_pass_any_number_of_times() -> None:
    for policy in (Policy.full(LAYERS), kv_only_from(0), kv_only_from(1), Policy.depthwise(LAYERS, mha_depth=0)):
        graph = _graph(policy)
        run_passes(graph, [VERIFY])
        check_graph(graph)


def test_before_slicing_it_is_refused() -> None:
    with pytest.raises(PassError, match="needs slice_operations"):
        run_passes(_graph(last=REMOVE_DEAD), [VERIFY])


# Each takes a legal graph, breaks it, and is found by the check that the message tells of.


def _order_of_nodes(graph: DecoderGraph) -> None:
    calls_of(graph, "decoder.norm")[0].append(_named(graph, "L01_mha_out"))


def _query_of_all_tokens(graph: DecoderGraph) -> None:
    (query,) = calls_of(graph, "q_proj", layer=1)
    (key,) = calls_of(graph, "k_proj", layer=1)
    query.args = key.args


def _keys_of_the_queries_only(graph: DecoderGraph) -> None:
    (query,) = calls_of(graph, "q_proj", layer=1)
    for key in (*calls_of(graph, "k_proj", layer=1), *calls_of(graph, "v_proj", layer=1)):
        key.args = query.args


def _mlp_of_other_tokens(graph: DecoderGraph) -> None:
    (mlp,) = calls_of(graph, ".mlp", layer=1)
    mlp.args = (calls_of(graph, "k_proj", layer=1)[0].args[0],)


def _another_layers_mask(graph: DecoderGraph) -> None:
    selected = _named(graph, "L02_mha_select_mask")
    selected.args = (*selected.args[:2], 1, *selected.args[3:])


def _mask_of_other_queries(graph: DecoderGraph) -> None:
    selected = _named(graph, "L01_mha_select_mask")
    selected.args = (*selected.args[:3], graph.universe.all, selected.args[4])


def _the_models_own_mask(graph: DecoderGraph) -> None:
    kernel = _named(graph, "L01_mha_attention")
    kernel.args = (*kernel.args[:4], _named(graph, "create_causal_mask"))


def _stored_twice(graph: DecoderGraph) -> None:
    store = targets(graph, ops.update_cache)[1]
    with graph.graph.inserting_after(store):
        copy = graph.graph.node_copy(store)
    copy.meta = dict(store.meta)


def _not_stored(graph: DecoderGraph) -> None:
    store = targets(graph, ops.update_cache)[1]
    for user in list(store.users):
        user.replace_all_uses_with(store.args[1 + user.args[1]])  # type: ignore[operator, arg-type]
        graph.graph.erase_node(user)
    graph.graph.erase_node(store)


def _keys_of_another_layer(graph: DecoderGraph) -> None:
    other = _named(graph, "L01_mha_attention")
    kernel = _named(graph, "L02_mha_attention")
    kernel.args = (*kernel.args[:2], *other.args[2:4], kernel.args[4])


def _no_attention(graph: DecoderGraph) -> None:
    del _named(graph, "L01_mha_attention").meta["attention"]


def _wrong_index(graph: DecoderGraph) -> None:
    sliced = _named(graph, "frozen_visual")
    sliced.args = (sliced.args[0], graph.index("gather", graph.universe.requested, graph.universe.all))


def _wrong_kind_of_index(graph: DecoderGraph) -> None:
    sliced = _named(graph, "frozen_visual")
    sliced.args = (sliced.args[0], graph.index("scatter", graph.universe.groups_set(["visual"]), graph.universe.all))


def _merge_the_other_way_round(graph: DecoderGraph) -> None:
    merge = targets(graph, ops.token_merge)[0]
    merge.args = (merge.args[0], *reversed(merge.args[1:]))


def _pruned_more(graph: DecoderGraph) -> None:
    block = next(block for block in graph.blocks if block.name == "L01_mlp")
    block.tokens = graph.universe.groups_set(["text"])


def _lost_write(graph: DecoderGraph) -> None:
    out = _named(graph, "L01_mlp_out")
    out.replace_all_uses_with(out.args[0])  # type: ignore[arg-type]


def _written_twice(graph: DecoderGraph) -> None:
    out = _named(graph, "L01_mlp_out")
    with graph.graph.inserting_after(out):
        again = graph.graph.call_function(operator.add, (out, out.args[1]))
    again.meta = dict(out.meta)
    out.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)


def _stale_read(graph: DecoderGraph) -> None:
    (norm,) = calls_of(graph, "post_attention_layernorm", layer=1)
    norm.args = (_named(graph, "L01_mha_out").args[0],)


def _frozen_written(graph: DecoderGraph) -> None:
    """Something is added to tokens that no longer change."""
    frozen = _named(graph, "frozen_visual")
    users = list(frozen.users)
    with graph.graph.inserting_after(frozen):
        doubled = graph.graph.call_function(operator.add, (frozen, frozen))
    doubled.meta = {**frozen.meta, "written": frozen.meta["tokens"]}
    for user in users:
        user.replace_input_with(frozen, doubled)


def _output_of_other_rows(graph: DecoderGraph) -> None:
    (norm,) = calls_of(graph, "decoder.norm")
    norm.args = (_named(graph, "L02_mlp_out"),)


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (_order_of_nodes, "malformed"),
        (_query_of_all_tokens, "combines values of the tokens all and system_text"),
        (_keys_of_the_queries_only, "combines values of the tokens all and system_text"),
        (_mlp_of_other_tokens, "computes the tokens all instead of system_text|holds the tokens all|combines"),
        (_another_layers_mask, r"its mask is that of \(1,"),
        (_mask_of_other_queries, "its mask is that of"),
        (_the_models_own_mask, "its mask is not selected"),
        (_stored_twice, "stores its keys and values 2 times"),
        (_not_stored, "stores its keys and values 0 times"),
        (_keys_of_another_layer, "not what the layer stores"),
        (_no_attention, "combines|has 0 attention kernels"),
        (_wrong_index, "holds the tokens"),
        (_wrong_kind_of_index, "needs a gather index"),
        (_merge_the_other_way_round, "holds the tokens visual; expected system_text"),
        (_pruned_more, "the policy asks for"),
        (_lost_write, "not after L01_mlp"),
        (_written_twice, "not after L01_mlp"),
        (_stale_read, "not after L01_mha"),
        (_frozen_written, "reads visual tokens as they are not after"),
        (_output_of_other_rows, "not after L03_mlp|combines|reads only"),
    ],
)
def test_a_broken_graph_is_found(corrupt: Callable[[DecoderGraph], None], message: str) -> None:
    graph = _graph()
    corrupt(graph)
    with pytest.raises(PassError, match=message) as caught:
        check_graph(graph)
    assert str(caught.value).count("pass '") == 1


def test_the_error_names_pass_layer_node_and_what_ran_before() -> None:
    graph = _graph(last=SHARE_FROZEN)
    _stale_read(graph)
    with pytest.raises(PassError) as caught:
        run_passes(graph, [VERIFY])
    error = caught.value
    assert error.pass_name == "verify"
    assert error.layer is not None
    assert error.node in {node.name for node in graph.graph.nodes}
    assert error.finished == tuple(item.name for item in PIPELINE[:-1])
    assert str(error).startswith(f"pass 'verify', layer {error.layer}, node {error.node!r} (after annotate")


def test_debug_mode_blames_the_pass_that_broke_the_graph() -> None:
    graph = _graph(last=SLICE_OPERATIONS)

    def check(g: DecoderGraph) -> None:
        _pruned_more(g)
        check_graph(g)

    with pytest.raises(PassError, match=r"pass 'narrow_residual'.*the policy asks for"):
        run_passes(graph, PIPELINE[len(up_to(SLICE_OPERATIONS)) :], check=check)
