"""Stages and rankings as values: counts, costs, JSON, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dop_compile import Policy, explain, prefill_flops
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.policy import baselines
from dop_compile.policy.costs import LayerTokens, layer_flops, policy_tokens
from dop_compile.policy.keep import KeepTable
from dop_compile.policy.ranking import Ranking, Stage
from dop_compile.rankings import criterion, known, register
from dop_compile.rankings.attention import LastToken
from dop_compile.tokens import Universe
from dop_compile.tracing.side_inputs import default_inputs
from tests.search.synthetic import dims_of
from tests.support import compile_eagerly, make_batch

stages = st.one_of(
    st.builds(lambda n: {"tokens": n}, st.integers(0, 50)), st.builds(lambda f: {"fraction": f}, st.floats(0, 1))
)


def ranked(
    *given: Stage, layers: int = 6, criterion: str = "last_token", options: tuple[Any, ...] = (), **changes: Any
) -> Policy:
    return Policy(layers, ranking=Ranking(criterion, given, options), **changes)


@given(st.lists(stages, min_size=1, max_size=5), st.integers(0, 60), st.integers(0, 9), st.integers(0, 9))
def test_tokens_of_each_layer(rules: list[dict[str, Any]], visual: int, system: int, text: int) -> None:
    policy = ranked(*(Stage(layer, **rule) for layer, rule in enumerate(rules)))
    left, total = visual, []
    for layer in range(6):
        count = system + left + text
        total.append(LayerTokens(count, count, count))
        if layer < len(rules):
            rule = rules[layer]
            kept = rule["tokens"] if "tokens" in rule else math.floor(rule["fraction"] * visual + 1e-9)
            left = min(left, kept)
    assert list(policy_tokens(policy, system, visual, text)) == total
    dims = dims_of(6)
    flops = sum(layer_flops(dims, tokens, layer) for layer, tokens in enumerate(total))
    assert prefill_flops(dims, policy, system, visual, text) == flops


@given(st.lists(stages, min_size=1, max_size=5), st.sampled_from(known()))
def test_json_round_trip(rules: list[dict[str, Any]], name: str) -> None:
    policy = ranked(*(Stage(layer, **rule) for layer, rule in enumerate(rules)), criterion=name)
    again = Policy.from_json(policy.to_json())
    assert again == policy
    assert hash(again) == hash(policy)
    assert not policy.is_full


def test_published_shapes() -> None:
    def of(policy: Policy) -> list[tuple[int, int]]:
        assert policy.ranking is not None
        return [(stage.layer, stage.count(576)) for stage in policy.ranking.stages]

    assert of(baselines.fastv(32)) == [(1, 288)]
    assert of(baselines.fastv(32, 0.25, layers=3)) == [(2, 144)]
    assert of(baselines.pyramiddrop(32)) == [(7, 288), (15, 144), (23, 72)]
    assert baselines.pyramiddrop(32).ranking.options == (("next_layer", True),)  # type: ignore[union-attr]
    assert of(baselines.sparsevlm(32)) == [(2, 303), (6, 110), (15, 36)]
    schedules = {64: [66, 30, 17], 128: [303, 110, 36], 192: [300, 200, 110]}
    for tokens, counts in schedules.items():
        found = of(baselines.sparsevlm(32, baselines.sparsevlm_fractions(tokens)))
        assert found == list(zip([2, 6, 15], counts, strict=True))
    assert of(baselines.dart(32, 1 / 9)) == [(1, 64)]
    assert [layer for layer, _ in of(baselines.sparsevlm(4))] == [0, 1, 2]
    assert [layer for layer, _ in of(baselines.pyramiddrop(8))] == [1, 3, 5]


def test_whole_tokens_are_rounded_down() -> None:
    """As PyramidDrop's authors do; a fraction that is meant to be whole tokens is not one fewer for its binary form."""
    odd = baselines.pyramiddrop(32).ranking
    assert odd is not None
    assert [stage.count(575) for stage in odd.stages] == [287, 143, 71]
    assert [Stage(0, fraction=n / 100).count(100) for n in range(101)] == list(range(101))
    assert Stage(0, fraction=0.5).count(1) == 0


def test_schedules_between_and_beyond_the_published() -> None:
    def of(tokens: float) -> list[float]:
        return [576 * fraction for fraction in baselines.sparsevlm_fractions(tokens)]

    assert of(96) == pytest.approx([(66 + 303) / 2, (30 + 110) / 2, (17 + 36) / 2])
    assert of(144) == pytest.approx([303 - 3 / 4, 110 + 90 / 4, 36 + 74 / 4])
    assert of(16) == pytest.approx([66 / 4, 30 / 4, 17 / 4])
    assert of(0) == [0, 0, 0]
    assert of(288) == pytest.approx([450, 300, 165])
    assert of(576) == pytest.approx([576, 576, 330])
    assert of(1280) == [576, 576, 576]


def test_fastv_costs_what_its_authors_say() -> None:
    """K=2, R=50 %: 55 % of the FLOPs of LLaVA-1.5-7B's visual tokens (FastV, table 1), which are most of them."""
    dims = DecoderDims(32, 4096, 32, 128, 32, (11008,) * 32)
    counts = {"system": 0, "visual": 576, "text": 0}
    ratio = prefill_flops(dims, baselines.fastv(32), **counts) / prefill_flops(dims, Policy.full(32), **counts)
    assert ratio == pytest.approx(0.53, abs=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stage(1), "either tokens or fraction"),
        (lambda: Stage(1, tokens=2, fraction=0.5), "either tokens or fraction"),
        (lambda: Stage(1, fraction=1.5), "expected 0 to 1"),
        (lambda: Stage(-1, tokens=2), "layer of a stage"),
        (lambda: Ranking("last_tokens", (Stage(1, tokens=2),)), "did you mean 'last_token'"),
        (
            lambda: Ranking("last_token", (Stage(1, tokens=2),), (("size", 3),)),
            "unknown option 'size' of criterion 'last_token'; accepted: next_layer",
        ),
        (lambda: Ranking("last_token", (Stage(2, tokens=2), Stage(1, tokens=1))), "increasing layers"),
        (lambda: Ranking("pivots", (Stage(2, tokens=2),), (("text", 0), ("visual", 0))), "at least one pivot"),
        (lambda: ranked(Stage(5, tokens=2)), "leaves no layer after it; expected layers 0 to 4"),
        (lambda: ranked(Stage(1, tokens=2), salient_fraction=0.5), "cannot be combined with salient_fraction"),
        (
            lambda: ranked(Stage(1, tokens=2), pruned=frozenset({("visual", 1, "mha_key_value")})),  # type: ignore[arg-type]
            "reads mha_key_value of visual tokens, which the policy prunes there",
        ),
        (
            lambda: ranked(Stage(1, tokens=2), pruned=frozenset({("text", 1, "mha_query")})),  # type: ignore[arg-type]
            "reads mha_query of text tokens",
        ),
        (
            lambda: ranked(Stage(1, tokens=2), criterion="pivots", pruned=frozenset({("text", 1, "mha_key_value")})),  # type: ignore[arg-type]
            "reads mha_key_value of text tokens",
        ),
        (
            lambda: ranked(
                Stage(1, tokens=2),
                options=(("next_layer", True),),
                pruned=frozenset({("text", 2, "mha_query")}),  # type: ignore[arg-type]
            ),
            "the stage at layer 1 reads mha_query of text tokens, which the policy prunes in layer 2",
        ),
        (lambda: Policy.from_operations(6, [("visual_until_1", 2, "mlp")]), "expected one of system, visual, text"),
        (lambda: baselines.sparsevlm(8, [0.5]), "expected 3, got 1"),
        (lambda: baselines.sparsevlm_fractions(-1), "at least 0"),
    ],
)
def test_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_no_stages_is_refused() -> None:
    with pytest.raises(TypeError, match="at least one Stage"):
        Ranking("last_token", ())


@pytest.mark.parametrize("change", [{"stages": {}}, {"criterion": "none"}, {"more": 1}, {"stages": [{"layer": 1}]}])
def test_other_documents_are_refused(change: dict[str, Any]) -> None:
    document = json.loads(ranked(Stage(1, tokens=2)).to_json())
    document["ranking"] |= change
    with pytest.raises(ValueError, match=r"^policy JSON: ranking"):
        Policy.from_json(json.dumps(document))


def test_a_criterion_of_ones_own() -> None:
    class First(LastToken):
        """Keeps the first tokens."""

        def __call__(self, view: Any, counts: Any) -> torch.Tensor:
            order = view.candidates.cumsum(1)
            return view.candidates & (order <= order.new_tensor(list(counts))[:, None])

    register("first", First)
    assert isinstance(criterion("first"), First)
    with pytest.raises(ValueError, match="registered already"):
        register("first", LastToken)
    batch = make_batch("llava")
    compiled = compile_eagerly(batch.model, ranked(Stage(0, tokens=3), layers=4, criterion="first"))
    given = compile_eagerly(batch.model, ranked(Stage(0, tokens=3), layers=4))
    with torch.no_grad():
        assert not torch.equal(compiled(**batch.inputs).logits, given(**batch.inputs).logits)


def test_explained() -> None:
    compiled = compile_eagerly(make_batch("llava").model, ranked(Stage(0, tokens=6), Stage(1, tokens=2), layers=4))
    found = explain(compiled, system=3, visual=20, text=5)
    assert [layer.key_value for layer in found.layers] == [28, 14, 10, 10]
    assert found.layers[0].note.startswith("6 of the visual tokens stay, ranked here")
    assert found.layers[1].note.startswith("2 of the visual tokens stay")
    # The MLP of the layer that ranks is spared for those that leave
    assert [layer.mlp for layer in found.layers[:3]] == [14, 10, 10]
    with pytest.raises(ValueError, match="reach into the visual tokens"):
        explain(compiled, system=3, visual=20, text=5, rows=6)


def test_explained_where_the_next_layer_ranks() -> None:
    stages = (Stage(0, tokens=6), Stage(1, tokens=2))
    model = make_batch("llava").model
    plain, ahead = (
        explain(compile_eagerly(model, ranked(*stages, layers=4, options=options)), system=3, visual=20, text=5)
        for options in ((), (("next_layer", True),))
    )
    assert [layer.key_value for layer in ahead.layers] == [28, 14, 10, 10]
    # Those that leave have the MLP of the layer behind them, and queries and keys in the next for the ranking alone
    assert [layer.mlp for layer in ahead.layers[:3]] == [28, 14, 10]
    dims = DecoderDims.from_config(model.config)
    for layer, (before, tokens) in enumerate([(28, 28), (14, 14)]):
        mlp = LayerTokens(0, 0, ahead.layers[layer].mlp - plain.layers[layer].mlp)
        heads = dims.num_heads + dims.num_key_value_heads
        more = layer_flops(dims, mlp, layer) + 2 * dims.hidden_size * tokens * heads * dims.head_dim
        assert before == ahead.layers[layer].key_value
        assert ahead.layers[layer].flops == plain.layers[layer].flops + more  # type: ignore[operator]


def test_next_layer_is_a_flag() -> None:
    with pytest.raises(TypeError, match="next_layer: expected True or False, got 1"):
        ranked(Stage(1, tokens=2), options=(("next_layer", 1),))


def test_a_stage_where_nothing_leaves() -> None:
    """Its group has no token, in the prompt that is explained."""
    policy = ranked(Stage(0, fraction=0.5), Stage(1, fraction=0.5), Stage(2, fraction=0.2), layers=4)
    found = explain(compile_eagerly(make_batch("llava").model, policy), system=3, visual=20, text=5)
    assert [layer.key_value for layer in found.layers] == [28, 18, 18, 12]


def test_a_program_without_a_stages_group() -> None:
    """Passes ask for sets of the groups that a program has."""
    for options in ((), (("next_layer", True),)):
        policy = ranked(Stage(0, fraction=0.5), Stage(1, fraction=0.2), layers=4, options=options)
        batch = make_batch("llava")
        state = compile_eagerly(batch.model, policy).dop
        keep = KeepTable.from_policy(policy, ("system", "visual", "visual_until_0", "text"))
        program = state.program(keep, Universe(keep.groups), default_inputs(state.decoder))
        assert [str(block.keys) for block in program.blocks if block.kind == "mha"][:2] == ["all", "system_visual_text"]
