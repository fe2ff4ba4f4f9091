"""Every model family of the fast set: 100 % is the untouched model bit by bit, every policy the masked reference.

`make conformance` runs the same checks on all families that are known to be exact.
"""

from __future__ import annotations

import itertools

import pytest

from tests.conformance.checks import POLICIES, check_full, check_policy, check_row_alone
from tests.families import FAMILIES


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_full_policy_is_the_untouched_model_bit_by_bit(name: str, attn: str) -> None:
    check_full(FAMILIES[name], attn)


SLOW = tuple(itertools.product(("qwen2", "qwen3_vl", "mistral3", "smolvlm", "cohere2_vision"), POLICIES[2:]))
"""Left to `make conformance`."""


@pytest.mark.parametrize(
    ("name", "policy_name"),
    [
        pytest.param(*pair, marks=pytest.mark.conformance) if pair in SLOW else pair
        for pair in itertools.product(FAMILIES, POLICIES)
    ],
)
def test_pruned_model_is_the_reference(name: str, policy_name: str) -> None:
    check_policy(FAMILIES[name], policy_name)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_of_a_left_padded_batch_is_as_if_alone(name: str) -> None:
    check_row_alone(FAMILIES[name])
