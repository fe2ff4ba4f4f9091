"""Each image and each video is reduced by itself, whatever stands in a prompt inside it or before the next one."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dop_compile import Policy
from dop_compile.reducers import Selection, VisualContext, register, registry
from dop_compile.runtime.prompt import _segments
from dop_compile.vision.items import feature_parts, has_items, item_sizes
from tests.families import END, IMAGE, START
from tests.support import Batch, Rows, compile_eagerly, make_batch, without

T = ("text", 3)


class Probe:
    """A reducer that notes what it is asked for: per row of the batch, (tokens, count) of each image or video."""

    name = "probe"
    requires: frozenset[str] = frozenset()
    seen: ClassVar[list[tuple[int, int, int]]] = []

    def __call__(self, context: VisualContext, count: int) -> Selection:
        assert not context.segments.any()
        self.seen.append((context.sample_index, context.tokens, count))
        return Selection(torch.arange(count))


@pytest.fixture(autouse=True)
def _probe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))
    register("probe", Probe)
    Probe.seen.clear()
    yield
    Probe.seen.clear()


def seen() -> dict[int, list[tuple[int, int]]]:
    found: dict[int, list[tuple[int, int]]] = {}
    for row, tokens, count in Probe.seen:
        found.setdefault(row, []).append((tokens, count))
    Probe.seen.clear()
    return found


def compiled(batch: Batch, count: int, **arguments: Any) -> Any:
    policy = Policy.depthwise(batch.family.num_layers, visual_tokens=count, reducer="probe")
    return compile_eagerly(batch.model, policy, **arguments)


@torch.no_grad()
def parts(name: str, rows: Rows, count: int, padding: str = "left") -> dict[int, list[tuple[int, int]]]:
    batch = make_batch(name, rows, padding=padding)
    compiled(batch, count)(**batch.inputs)
    return seen()


def test_rows_of_patches_with_ids_between_them_are_one_image() -> None:
    assert parts("mistral3", [[T, ("image",), T]], 5) == {0: [(9, 5)]}
    assert parts("mistral3", [[T, ("image", 1), ("image", 2), T]], 10) == {0: [(8, 4), (12, 6)]}


def test_images_without_text_between_them_have_their_shares() -> None:
    assert parts("llava", [[T, ("image",), ("image",), T]], 6) == {0: [(9, 3), (9, 3)]}


def test_newlines_do_not_count() -> None:
    """A base image of 4 tokens and tiles of 8, packed with newlines; then the same again."""
    assert parts("llava_next", [[T, ("image",), ("image", 1), T]], 6) == {0: [(12, 3), (12, 3)]}


@pytest.mark.parametrize("padding", ["left", "right"])
def test_rows_of_a_batch(padding: str) -> None:
    rows: Rows = [[T, ("image",), ("image",), T], [T, T], [T, ("image",), T, ("image",), ("image",), T]]
    assert parts("llava", rows, 6, padding) == {0: [(9, 3), (9, 3)], 2: [(9, 2), (9, 2), (9, 2)]}
    rows = [[T, ("image", 1), T], [T, ("image", 2), ("image",), T]]
    assert parts("mistral3", rows, 7, padding) == {0: [(8, 7)], 1: [(12, 4), (9, 3)]}


def unmarked(batch: Batch) -> Batch:
    """The batch without the ids that a processor puts around images."""
    ids = batch.inputs["input_ids"]
    keep = ((ids != START) & (ids != END))[0]
    cut = {n: v[:, keep] if v.shape == ids.shape else v for n, v in batch.inputs.items()}
    return Batch(batch.family, batch.model, cut)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_images_of_a_patch_grid(name: str) -> None:
    batch = unmarked(make_batch(name, [[T, ("image",), ("image", 1), T]]))
    assert bool((batch.inputs["input_ids"][0, 3:20] == IMAGE).all())
    places = torch.arange(23).expand(3, 1, -1)  # the model's own rule takes a run of placeholders for an image
    compiled(batch, 8)(**batch.inputs, position_ids=places)
    assert seen() == {0: [(9, 4), (8, 4)]}


def test_a_video_is_one_whether_or_not_its_frames_stand_apart() -> None:
    rows: Rows = [[T, ("image", 1), T, ("video",), T], [("video", 1), ("image", 2), T]]
    for name in ("qwen2_5_vl", "qwen3_vl"):  # the latter writes a timestamp before each frame
        assert parts(name, rows, 8) == {0: [(8, 4), (8, 4)], 1: [(18, 7), (4, 1)]}


def test_videos_and_images_without_text_between_them() -> None:
    """Two videos of two frames, whose features come frame by frame, and an image."""
    rows: Rows = [[T, ("video",), ("video",), ("image",), T], [T, ("image",), ("image",), ("video",), T]]
    assert parts("video_llava", rows, 10) == {0: [(20, 4), (20, 4), (9, 2)], 1: [(9, 3), (9, 2), (20, 5)]}


@torch.no_grad()
def test_later_turns() -> None:
    batch = make_batch("llava", [[T, ("image",), ("image",), T]])
    model = compiled(batch, 6)
    first = model(**batch.inputs, use_cache=True)
    assert seen() == {0: [(9, 3), (9, 3)]}
    more = make_batch("llava", [[T, ("image",), ("image",), ("image",), T]], seed=1).inputs
    mask = torch.cat([batch.inputs["attention_mask"], more["attention_mask"]], 1)
    model(**{**more, "attention_mask": mask}, past_key_values=first.past_key_values, use_cache=True)
    assert seen() == {0: [(9, 2), (9, 2), (9, 2)]}


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_generation(options: dict[str, Any]) -> None:
    """Images are encoded before rows are repeated for beams."""
    rows: Rows = [[T, ("image",), ("image",), T], [T, ("image",), T]]
    batch = make_batch("llava", rows)
    compiled(batch, 6).generate(**batch.inputs, max_new_tokens=2, do_sample=False, **options)
    beams = options.get("num_beams", 1)
    found = seen()
    calls = len(found[0]) // 2
    assert found == {n: ([(9, 3), (9, 3)] if n < beams else [(9, 6)]) * calls for n in range(2 * beams)}


# Where nothing is known, runs of visual tokens are taken for images.


@torch.no_grad()
def test_ready_made_features_and_groups() -> None:
    batch = make_batch("llava", [[T, ("image",), ("image",), T, ("image",), T]])
    model, ids = batch.model, batch.inputs["input_ids"]
    features = model.get_image_features(batch.inputs["pixel_values"], return_dict=True)
    compiled(batch, 9)(**without(batch.inputs, "pixel_values"), mm_encoder_outputs={"image": features})
    assert seen() == {0: [(18, 6), (9, 3)]}
    compiled(batch, 9)(**batch.inputs, token_groups=(ids == IMAGE).long())
    assert seen() == {0: [(18, 6), (9, 3)]}


def test_tiles_are_no_images() -> None:
    """InternVL writes all tiles of an image one after the other, and nothing it is given says how many these are."""
    assert parts("internvl", [[T, ("image",), T, ("image",), T]], 6) == {0: [(9, 3), (9, 3)]}
    batch = unmarked(make_batch("internvl", [[T, ("image",), ("image",), T]]))
    compiled(batch, 6)(**batch.inputs)
    assert seen() == {0: [(18, 6)]}


def test_images_of_a_row_in_one_tensor() -> None:
    """SmolVLM's feature method returns one entry per row of the batch."""
    rows: Rows = [[T, ("image",), T, ("image",), T], [T, ("image",), T]]
    assert parts("smolvlm", rows, 6) == {0: [(9, 3), (9, 3)], 1: [(9, 6)]}


def test_partly_known() -> None:
    """The images' sizes are known, the videos' are not: a run of what is not known stays one."""
    visual = torch.tensor([0, 1, 1, 1, 1, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    items = torch.tensor([-1, 7, 7, -1, -1, 3, -1, 3, -1, -1, -1])
    known, columns = visual.numpy(), visual.nonzero().squeeze(1).numpy()
    assert _segments(columns, known, items.numpy()).tolist() == [0, 0, 1, 1, 2, 2, 3, 4]
    assert _segments(columns, known, None).tolist() == [0, 0, 0, 0, 0, 1, 1, 2]
    assert _segments(columns[2:], known, items.numpy()).tolist() == [0, 0, 1, 1, 2, 3]


# What feature methods return.

ROWS = torch.zeros(12, 8)


@pytest.mark.parametrize(
    ("output", "named", "sizes"),
    [
        ([ROWS[:5], ROWS[5:]], {}, (5, 7)),
        ((ROWS,), {}, (12,)),
        ([ROWS.view(3, 4, 8)], {}, (12,)),
        (ROWS.view(3, 4, 8), {"pixel_values": torch.zeros(3, 3, 6, 6)}, (4, 4, 4)),
        (ROWS.view(3, 4, 8), {"pixel_values": torch.zeros(3, 9, 7)}, (4, 4, 4)),
        (ROWS, {"pixel_values": torch.zeros(2, 3, 6, 6)}, (6, 6)),
        (ROWS, {"pixel_values": torch.zeros(5, 3, 6, 6)}, ()),
        (ROWS.view(6, 2, 8), {"pixel_values_videos": torch.zeros(2, 3, 3, 6, 6)}, (6, 6)),
        (ROWS, {"pixel_values_videos": torch.zeros(3, 3, 6, 6)}, ()),
        (ROWS, {"image_grid_thw": torch.tensor([[1, 4, 4], [2, 4, 4]])}, (4, 8)),
        (ROWS, {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 3, 3]])}, ()),
        (ROWS, {}, ()),
        (None, {}, ()),
    ],
)
def test_sizes(output: Any, named: dict[str, Tensor], sizes: tuple[int, ...]) -> None:
    assert item_sizes(SimpleNamespace(pooler_output=output), named) == sizes


def test_what_is_no_features() -> None:
    for output in (
        None,
        [],
        [None],
        [ROWS, ROWS[0]],
        [ROWS, torch.zeros(3, 7)],
        SimpleNamespace(last_hidden_state=ROWS),
    ):
        assert feature_parts(output) is None


def test_models_of_tiles() -> None:
    assert has_items("LlavaForConditionalGeneration")
    assert has_items("Mistral3Model", "PreTrainedModel")
    assert not has_items("InternVLForConditionalGeneration")
    assert not has_items("Mine", "SmolVLMModel")
