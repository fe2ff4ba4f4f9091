"""Smaller pictures: the processor around the real image processors, and the reducer that checks for it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dop_compile.reducers import VisualContext, create, resize_processor, select_tokens
from tests.drawing import examples


def picture(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width, 3), dtype=np.uint8)


def qwen_tokens(pictures: Qwen2VLImageProcessorPil, height: int, width: int) -> int:
    grid = pictures(images=[picture(height, width)], return_tensors="pt")["image_grid_thw"][0]
    return int(grid.prod()) // pictures.merge_size**2


@examples(30)
@given(st.integers(60, 900), st.integers(60, 900), st.integers(1, 300))
def test_qwen_pictures_have_at_most_as_many_tokens(height: int, width: int, tokens: int) -> None:
    pictures = Qwen2VLImageProcessorPil()
    before = qwen_tokens(pictures, height, width)
    found = qwen_tokens(resize_processor(pictures, tokens), height, width)
    longest = max(height, width) / min(height, width)
    # One row or column is kept, whatever the limit; and sides are rounded down to whole tokens
    assert found <= max(tokens, longest * tokens**0.5, 1)
    assert found <= before or before <= 4
    if tokens >= 30 and before > tokens and longest < 3:
        assert found >= 0.6 * tokens
    assert dict(pictures.size) == dict(Qwen2VLImageProcessorPil().size), "the original was changed"


def test_a_processor_keeps_its_other_parts() -> None:
    processor = SimpleNamespace(image_processor=Qwen2VLImageProcessorPil(), tokenizer=object())
    small = resize_processor(processor, 64)
    assert small.tokenizer is processor.tokenizer
    assert small.image_processor.size["longest_edge"] == 64 * 784
    assert processor.image_processor.size["longest_edge"] != 64 * 784


@pytest.mark.parametrize(
    ("tokens", "tiles", "side", "per_tile"),
    [(256, 5, 196, 49), (128, 5, 140, 25), (1280, 5, 448, 256), (10**6, None, 448, 256), (13, None, 28, 1)],
)
def test_internvl_tiles(tokens: int, tiles: int | None, side: int, per_tile: int) -> None:
    pictures = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True)
    processor = SimpleNamespace(image_processor=pictures, image_seq_length=256)
    small = resize_processor(processor, tokens, tiles=tiles)
    assert small.image_seq_length == per_tile
    pixels = small.image_processor(images=[picture(500, 900)], return_tensors="pt")["pixel_values"]
    assert tuple(pixels.shape[-2:]) == (side, side)
    assert processor.image_seq_length == 256
    assert pictures.size["height"] == 448


@pytest.mark.parametrize(
    ("processor", "tokens", "error", "message"),
    [
        (CLIPImageProcessorPil(), 64, TypeError, "CLIPImageProcessorPil makes pictures of one size"),
        (Qwen2VLImageProcessorPil(), 0, ValueError, "visual_tokens must be at least 1, not 0"),
        (Qwen2VLImageProcessorPil(), 2.5, TypeError, "visual_tokens must be an integer, not 2.5"),
        (object(), 4, TypeError, "object makes pictures of one size"),
    ],
)
def test_what_cannot_be_resized(processor: object, tokens: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resize_processor(processor, tokens)


def test_fewer_tokens_than_tiles() -> None:
    pictures = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True)
    processor = SimpleNamespace(image_processor=pictures, image_seq_length=256)
    with pytest.raises(ValueError, match="visual_tokens=12 leave nothing for some of 13 tiles"):
        resize_processor(processor, 12)


def test_the_reducer_lets_small_pictures_pass_and_refuses_others() -> None:
    context = VisualContext(torch.zeros(5, 2), torch.zeros(1, 2), torch.zeros(5, dtype=torch.long), 0)
    assert select_tokens(create("resize"), context, 9).indices.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"sample 0 has 5 visual tokens.*at most 4; make its inputs with resize_pro"):
        select_tokens(create("resize"), context, 4)
