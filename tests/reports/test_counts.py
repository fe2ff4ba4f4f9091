"""Tokens that nobody says: what a configuration knows of a picture is what the model's prompts have."""

from __future__ import annotations

import pytest
import transformers as hf

from dop_compile import Policy, dop_compile, executed_flops, explain, prefill_flops
from dop_compile.hf.pictures import is_text_only, picture_tokens
from dop_compile.reports.counts import assumed_counts
from dop_compile.reports.picture import explain_figure
from tests.families import FAMILIES, LAYERS
from tests.support import shared_model

ANY_SIZE = ("llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "mistral3", "smolvlm", "cohere2_vision")


@pytest.mark.parametrize("name", ANY_SIZE)
def test_pictures_of_any_size_have_no_fixed_number(name: str) -> None:
    config = FAMILIES[name].config()
    assert picture_tokens(config) is None
    with pytest.raises(ValueError, match=r"depends on the picture: give visual="):
        assumed_counts(config, {"full": Policy.full(LAYERS)})
    assert assumed_counts(config, {"full": Policy.full(LAYERS)}, visual=7).visual == 7


def test_explain_counts_the_models_own_picture() -> None:
    policy = Policy.depthwise(LAYERS, mha_depth=2, visual_tokens=4)
    compiled = dop_compile(shared_model("llava"), policy, backend="eager")
    counts = {"system": 35, "visual": 9, "text": 100}
    found = explain(compiled)
    assert {name: getattr(found, name) for name in counts} == counts
    assert found.summary.eq11_flops == prefill_flops(compiled.config, policy, **counts)
    assert found.tiers == explain(compiled, **counts).tiers
    assert executed_flops(compiled) == executed_flops(compiled, **counts) == found.summary.executed_flops
    assert "by the configuration, 24 x 24 pixels in patches of 8 x 8" in str(found)
    assert "system and text tokens assumed" in found.counts
    assert explain(compiled, **counts).counts == ""
    title = explain_figure(compiled).get_suptitle()
    assert "35 system + 9 visual + 100 text tokens" in title


def test_more_tokens_kept_than_a_picture_has_are_asked_about() -> None:
    compiled = dop_compile(shared_model("llava"), Policy.depthwise(LAYERS, visual_tokens=10), backend="eager")
    for cost in (explain, executed_flops, explain_figure):
        with pytest.raises(ValueError, match=r"tier 'default' keeps 10 visual tokens, and a picture .* has 9 by"):
            cost(compiled)
    assert explain(compiled, visual=18).entering == 10
    assert explain(compiled, visual=9).entering == 9


def test_a_text_only_model_has_no_visual_tokens_of_its_own() -> None:
    config = hf.LlamaConfig()
    assert is_text_only(config)
    assert not is_text_only(hf.LlavaConfig())
    kept = {"full": Policy.full(2), "text": Policy.from_operations(2, [("text", 1, "mlp")])}
    counts = assumed_counts(config, kept, text=9)
    assert (counts.visual, counts.text) == (0, 9)
    for policy in (Policy.depthwise(2, mlp_depth=1), Policy.depthwise(2, visual_tokens=3)):
        with pytest.raises(ValueError, match=r"text-only model.*tier 'a' is about them: give visual="):
            assumed_counts(config, {**kept, "a": policy})
