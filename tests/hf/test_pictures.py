"""Visual tokens of a picture: what a configuration knows is what the model's prompts have."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as hf

from dop_compile.hf.pictures import picture_tokens
from tests.support import make_batch

FIXED = ("llava", "video_llava", "gemma3")


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_number_is_that_of_the_placeholders(name: str) -> None:
    batch = make_batch(name, [[("text", 2), ("image",), ("text", 3)]])
    found = picture_tokens(batch.model.config)
    assert found is not None
    assert found.count == int((batch.inputs["input_ids"] == batch.model.config.image_token_id).sum())


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (hf.LlavaConfig, 576),
        (hf.PaliGemmaConfig, 256),
        (hf.Gemma3Config, 256),
        (hf.Blip2Config, 32),
        (hf.InstructBlipVideoConfig, None),  # of a frame, and a video has several
        (hf.LlavaNextConfig, None),
        (hf.AyaVisionConfig, None),
    ],
)
def test_published_configurations(config: Any, count: int | None) -> None:
    found = picture_tokens(config())
    assert (None if found is None else found.count) == count


def test_a_tower_without_cls_loses_a_patch_to_the_default_strategy() -> None:
    tower = hf.SiglipVisionConfig(image_size=48, patch_size=16)
    for strategy, count in (("full", 9), ("default", 8)):
        found = picture_tokens(hf.LlavaConfig(vision_config=tower, vision_feature_select_strategy=strategy))
        assert found is not None
        assert found.count == count
    found = picture_tokens(hf.LlavaConfig(vision_feature_select_strategy="full"))
    assert found is not None
    assert found.count == 577
