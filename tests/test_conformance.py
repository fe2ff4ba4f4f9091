"""Every model family of the fast set: 100 % is the untouched model bit by bit, every policy the masked reference.

`make conformance` runs the same checks on all families that are known to be exact.
"""

from __future__ import annotations

import pytest

from tests.conformance.checks import POLICIES, check_full, check_policy, check_row_alone
from tests.conformance.table import EXACT
from tests.families import FAMILIES
from tests.make_table import supported_models_table, table_in_readme


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_full_policy_is_the_untouched_model_bit_by_bit(name: str, attn: str) -> None:
    check_full(FAMILIES[name], attn)


@pytest.mark.parametrize("policy_name", POLICIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_model_is_the_reference(name: str, policy_name: str) -> None:
    check_policy(FAMILIES[name], policy_name)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_of_a_left_padded_batch_is_as_if_alone(name: str) -> None:
    check_row_alone(FAMILIES[name])


PARTS = {
    "paligemma2": "masks by layer type that the outer model builds one by one",
    "gemma4": "a second embedding of each token, two token-wise branches, scaled layers",
    "ernie4_5_vl_moe": "kinds of tokens that choose experts",
    "granite4_vision": "features of visual tokens in a dictionary",
    "chameleon": "a decoder that merges images itself",
    "blip2_opt": "flattened tokens, positions from the padding mask",
}
"""What no family of the fast set has."""


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_other_families_have(name: str) -> None:
    check_policy(EXACT[name], "given_scattered")


def test_readme_lists_the_families_that_are_tested() -> None:
    assert table_in_readme() == supported_models_table(), "run `python -m tests.make_table`"
