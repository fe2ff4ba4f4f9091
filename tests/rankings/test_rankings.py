"""Rankings inside the decoder against full attention maps of the untouched model, run stage by stage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dop_compile import Policy, baselines
from dop_compile.ranking import Ranking, Stage
from tests.rankings.oracle import leaving
from tests.reference import reference_generate, reference_logits
from tests.support import assert_rows_match, compile_eagerly, make_batch, padded

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "internvl")
CRITERIA = ("last_token", "text_raters", "product", "pivots")


def check(name: str, policy: Policy, padding: str = "left", tokens: int = 3) -> None:
    batch = make_batch(name, padding=padding)
    gone = leaving(batch, policy)
    logits = reference_logits(batch.model, batch.inputs, policy, None, batch.groups, None, batch.towers, gone)
    expected = padded(logits, batch.mask)
    compiled = compile_eagerly(batch.model, policy)
    inputs = dict(batch.inputs)
    if not name.startswith("qwen"):  # rotated keys are ranked: rows are alike where their positions are
        inputs["position_ids"] = (batch.mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        assert_rows_match(compiled(**inputs).logits, expected, batch.mask)
        last = compiled(**inputs, logits_to_keep=1).logits
    ends = batch.mask.shape[1] - 1 - batch.mask.flip(1).int().argmax(1)
    if padding == "left":
        assert_rows_match(last, expected[torch.arange(len(ends)), ends][:, None], torch.ones(len(ends), 1).bool())
        answer = reference_generate(
            batch.model, batch.inputs, policy, tokens, None, batch.groups, None, batch.towers, gone
        )
        found = compiled.generate(**batch.inputs, max_new_tokens=tokens, do_sample=False)
        assert found[:, batch.mask.shape[1] :].tolist() == answer


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_stays_is_what_full_maps_say(name: str, criterion: str) -> None:
    check(name, Policy(4, ranking=Ranking(criterion, (Stage(0, fraction=0.7), Stage(2, tokens=2)))))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_right_padding(criterion: str) -> None:
    check("llava", Policy(4, ranking=Ranking(criterion, (Stage(1, fraction=0.5),))), padding="right")


@pytest.mark.parametrize("make", [baselines.fastv, baselines.pyramiddrop, baselines.sparsevlm, baselines.dart])
def test_published_policies(make: object) -> None:
    check("llava", make(4))  # type: ignore[operator]


@st.composite
def rankings(draw: st.DrawFn) -> Policy:
    layers = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True).map(sorted))
    fraction, tokens = st.floats(0, 1), st.integers(0, 6)
    stages = [
        Stage(layer, fraction=draw(fraction)) if draw(st.booleans()) else Stage(layer, tokens=draw(tokens))
        for layer in layers
    ]
    criterion = draw(st.sampled_from(CRITERIA))
    read = {("visual", "mha_key_value"), ("text", "mha_query"), ("visual", "mha_query")}
    operations = [
        (group, layer, module)
        for group in ("system", "visual", "text")
        for layer in range(4)
        for module in ("mha_query", "mha_key_value", "mlp")
        if not (layer in layers and (group, module) in read)
    ]
    pruned = draw(st.lists(st.sampled_from(operations), max_size=8, unique=True))
    return Policy.from_operations(4, pruned).replace(ranking=Ranking(criterion, tuple(stages)))


@settings(max_examples=15, deadline=None)
@given(rankings())
def test_any_ranking_with_any_operations(policy: Policy) -> None:
    check("llava", policy, tokens=2)


def test_one_sample_is_ranked_as_in_a_batch() -> None:
    policy = Policy(4, ranking=Ranking("product", (Stage(0, fraction=0.5), Stage(1, fraction=0.25))))
    batch = make_batch("llava")
    compiled = compile_eagerly(batch.model, policy)
    together = compiled.generate(**batch.inputs, max_new_tokens=3, do_sample=False)
    for padding in ("left", "right"):
        other = make_batch("llava", padding=padding)
        positions = (other.mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            rows = compiled(**other.inputs, position_ids=positions).logits
        ends = other.mask.shape[1] - 1 - other.mask.flip(1).int().argmax(1)
        first = rows[torch.arange(len(ends)), ends].argmax(-1)
        assert torch.equal(first, together[:, batch.mask.shape[1]])
