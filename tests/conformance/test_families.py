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
from tests.support import compile_eagerly

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


@pytest.mark.parametrize(("name", "criterion"), list(zip(EXACT, itertools.cycle(known()), strict=False)))
def test_ranked_tokens_leave_as_full_maps_say(name: str, criterion: str) -> None:
    """Each family with one of the criteria."""
    layers = EXACT[name].num_layers
    stages = [Stage(0, fraction=0.7), *([Stage(1, tokens=2)] if layers > 2 else [])]
    check(EXACT[name], Policy(layers, ranking=Ranking(criterion, tuple(stages))), tokens=2)


@FAMILY
def test_the_next_layers_queries_and_keys_are_made_as_it_makes_them(name: str) -> None:
    layers = EXACT[name].num_layers
    stages = tuple(Stage(layer, tokens=5 - 2 * layer) for layer in range(min(layers - 1, 2)))
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
