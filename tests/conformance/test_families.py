"""The conformance suite: every family of docs/models.md passes every check, every refusal has its reason."""

from __future__ import annotations

import itertools

import pytest

from dop_compile import Policy
from dop_compile.errors import UnsupportedModelError
from dop_compile.policy.ranking import Ranking, Stage
from dop_compile.rankings import known
from tests.conformance.checks import POLICIES, check_full, check_policy, check_prepared, check_row_alone
from tests.conformance.table import EXACT, REFUSED
from tests.families import FAMILIES
from tests.rankings.check import check
from tests.reference import LAYERS, layer_parts, named_child, text_decoder
from tests.support import compile_eagerly, shared_model

pytestmark = pytest.mark.conformance

FAMILY = pytest.mark.parametrize("name", EXACT)


@pytest.mark.parametrize(("name", "attn"), [(n, attn) for n, family in EXACT.items() for attn in family.attentions])
def test_full_policy_is_the_untouched_model_bit_by_bit(name: str, attn: str) -> None:
    check_full(EXACT[name], attn)


@pytest.mark.parametrize("policy_name", POLICIES)
@FAMILY
def test_pruned_model_is_the_reference(name: str, policy_name: str) -> None:
    check_policy(EXACT[name], policy_name)


@FAMILY
def test_a_row_of_a_left_padded_batch_is_as_if_alone(name: str) -> None:
    check_row_alone(EXACT[name])


@FAMILY
def test_a_prompt_prepared_once_is_the_reference_under_every_policy(name: str) -> None:
    check_prepared(EXACT[name])


def _attending(name: str) -> list[int]:
    """Layers with an attention, whose queries and keys a ranking can read."""
    layers = named_child(text_decoder(shared_model(EXACT[name])), LAYERS)
    return [number for number, layer in enumerate(layers) if layer_parts(layer)["attention"]]


@pytest.mark.parametrize(("name", "criterion"), list(zip(EXACT, itertools.cycle(known()), strict=False)))
def test_ranked_tokens_leave_as_full_maps_say(name: str, criterion: str) -> None:
    """Each family with one of the criteria."""
    layers = EXACT[name].num_layers
    places = [layer for layer in _attending(name) if layer < layers - 1]
    if not places:
        pytest.skip("its only attention is the last layer's, behind which nothing is left to prune")
    stages = [Stage(places[0], fraction=0.7), *(Stage(layer, tokens=2) for layer in places[1:2])]
    check(EXACT[name], Policy(layers, ranking=Ranking(criterion, tuple(stages))), tokens=2)


@FAMILY
def test_the_next_layers_queries_and_keys_are_made_as_it_makes_them(name: str) -> None:
    layers = EXACT[name].num_layers
    before = [layer - 1 for layer in _attending(name) if layer][:2]
    stages = tuple(Stage(layer, tokens=5 - 2 * number) for number, layer in enumerate(before))
    check(EXACT[name], Policy(layers, ranking=Ranking("last_token", stages, (("next_layer", True),))), tokens=2)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_family_is_refused_for_its_reason(name: str) -> None:
    refusal = REFUSED[name]
    model = refusal.family.build()
    groups = {"token_groups": lambda ids: ids * 0} if refusal.with_groups else {}
    with pytest.raises(UnsupportedModelError, match=refusal.message) as caught:
        compile_eagerly(model, Policy.full(refusal.family.num_layers), **groups)
    assert type(model).__name__ in str(caught.value)


def test_no_family_is_left_out() -> None:
    assert FAMILIES.keys() <= EXACT.keys()
    assert not EXACT.keys() & REFUSED.keys()
