"""What is known of every family: the README says it, and parts that the fast set lacks are tried in one of each."""

from __future__ import annotations

import pytest

from tests.conformance.checks import check_policy
from tests.conformance.table import EXACT
from tests.make_table import supported_models_table, table_in_readme

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
