"""What is known of every family: docs/models.md says it, and parts that the fast set lacks are tried in one of each."""

from __future__ import annotations

import pytest
import transformers as hf
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.conformance.checks import check_policy, check_prepared
from tests.conformance.elsewhere import ELSEWHERE
from tests.conformance.table import EXACT, REFUSED
from tests.make_table import supported_models_table, table_in_docs

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


@pytest.mark.parametrize("name", ["gemma4", "gemma4_text", "chameleon", "phi4_multimodal"])
def test_prompts_of_decoders_that_take_more_than_embeddings(name: str) -> None:
    """Of ids, or of pictures: what they make of them is made once, for whichever layer a run begins at."""
    check_prepared(EXACT[name])


def test_readme_lists_the_families_that_are_tested() -> None:
    assert table_in_docs() == supported_models_table(), "run `python -m tests.make_table`"


def test_every_class_that_turns_images_and_text_into_text_is_known() -> None:
    """As exact, as refused for a reason, or as no model that prompts with visual tokens."""
    exact = {family.model_class.__name__ for family in EXACT.values()}
    refused = {refusal.family.model_class.__name__ for refusal in REFUSED.values()}
    names = {
        name
        for value in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
        for name in ([value] if isinstance(value, str) else value)
    }
    assert names - exact - refused == ELSEWHERE.keys(), "give each class its place in tests/conformance"
    for name in ELSEWHERE:
        assert hasattr(hf, name), name
