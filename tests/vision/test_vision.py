"""What reducers are told about the vision tower, against what the untouched model computes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dop_compile import Policy
from dop_compile.errors import UnsupportedUsageError
from dop_compile.reducers import OPTIONAL_FIELDS, Selection, VisualContext, register, registry
from tests.families import FAMILIES, IMAGE, VIDEO
from tests.support import Batch, compile_eagerly, make_batch, without

ALL = OPTIONAL_FIELDS - {"grid"}


@dataclass
class Spy:
    """A reducer that keeps what it is given."""

    requires: frozenset[str] = ALL
    whole_sample = True
    name = "spy"

    def __post_init__(self) -> None:
        self.seen: list[VisualContext] = []

    def __call__(self, context: VisualContext, count: int) -> Selection:
        self.seen.append(context)
        return Selection(torch.arange(count))


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))


@torch.no_grad()
def contexts(batch: Batch, requires: frozenset[str] = ALL, **arguments: Any) -> list[VisualContext]:
    """One context per row with visual tokens."""
    spy = Spy(requires)
    registry._factories.pop("spy", None)
    register("spy", lambda: spy)
    policy = Policy.depthwise(batch.family.num_layers, visual_tokens=2, reducer="spy")
    compile_eagerly(batch.model, policy)(**{**batch.inputs, **arguments})
    return spy.seen


def hooked(model: nn.Module, batch: Batch, path: str, *, inputs: bool = False) -> list[Any]:
    """What passes through a module of the untouched model."""
    passed: list[Any] = []
    hook = model.get_submodule(path).register_forward_hook(
        lambda _, args, out: passed.append(args[0] if inputs else out)
    )
    with torch.no_grad():
        model(**batch.inputs)
    hook.remove()
    return passed


def joined(found: list[VisualContext], name: str) -> Tensor:
    return torch.cat([getattr(context, name) for context in found])


def eager_attention(module: Any, hidden: Tensor, scale: float) -> Tensor:
    """(batch, heads, tokens, tokens) map of a module with q_proj and k_proj."""
    heads = module.num_heads
    q, k = (getattr(module, f"{n}_proj")(hidden).unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qk")
    return (q @ k.transpose(-1, -2) * scale).softmax(-1)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_llava(attn: str) -> None:
    batch = make_batch("llava", model=FAMILIES["llava"].build(attn=attn))
    model = batch.model
    found = contexts(batch)
    assert [c.tokens for c in found] == [n for n in batch.counts if n]
    given = hooked(model, batch, "model.multi_modal_projector", inputs=True)[0]
    assert torch.equal(joined(found, "features"), given.flatten(0, 1))
    layer = model.model.vision_tower.encoder.layers[0]  # of two; the last one's output is not used
    path = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    hidden = hooked(model, batch, path, inputs=True)[0]
    full = eager_attention(layer.self_attn, hidden, layer.self_attn.scale)
    torch.testing.assert_close(joined(found, "cls_attention"), full[:, :, 0, 1:].mean(1).flatten())
    keys = layer.self_attn.k_proj(hidden).unflatten(-1, (2, -1)).mean(2)[:, 1:]
    torch.testing.assert_close(joined(found, "keys"), keys.flatten(0, 1))
    torch.testing.assert_close(found[0].project(found[0].features), found[0].projected)
    assert [c.tiles.unique().tolist() for c in found] == [[0, 1], [2]]
    assert model.model.vision_tower.config._attn_implementation == attn


def test_text_and_instruction() -> None:
    batch = make_batch("llava", padding="left")
    found = contexts(batch)
    for context in found:
        row = batch.inputs["input_ids"][context.sample_index]
        mask = batch.inputs["attention_mask"][context.sample_index].bool()
        text = row[mask & (row != IMAGE)]
        assert torch.equal(context.text_ids, text)
        assert torch.equal(context.text, batch.model.get_input_embeddings()(text))
        first = (row[mask] == IMAGE).nonzero()[0, 0]
        assert context.instruction_start == first
        assert context.text[context.instruction].shape[0] == len(text) - first


def test_llava_next_tiles_and_unpadding() -> None:
    """Base tile first; the others interleave row by row, less what unpadding takes away and the newlines."""
    batch = make_batch("llava_next")
    found = contexts(batch)
    given = hooked(batch.model, batch, "model.multi_modal_projector", inputs=True)[0]
    rows = given.flatten(0, 1)
    per_tile = given.shape[1]
    assert sum(c.tokens for c in found) == sum(batch.counts)
    for context in found:
        for i in range(context.tokens):
            # each token's features are those of one row of its tile, projected to the token itself
            own = rows[context.tiles[i] * per_tile : (context.tiles[i] + 1) * per_tile]
            match = (own == context.features[i]).all(1).nonzero()
            assert len(match) == 1
            projected = batch.model.model.multi_modal_projector(context.features[i][None, None])[0, 0]
            torch.testing.assert_close(projected, context.projected[i])
        assert (context.tiles[:per_tile] == context.tiles[0]).all()
    # (30, 21) goes to four tiles of 16 x 16, and loses columns on both sides
    assert [len(c.tiles.unique()) for c in found] == [6, 5]


def test_internvl_pixel_shuffle() -> None:
    batch = make_batch("internvl")
    found = contexts(batch)
    layer = batch.model.model.vision_tower.encoder.layer[1]
    hidden = hooked(batch.model, batch, "model.vision_tower.encoder.layer.1.attention.q_proj", inputs=True)[0]
    attention = layer.attention
    full = eager_attention(attention, hidden, attention.scale)[:, :, 0, 1:].mean(1)
    side = int(full.shape[1] ** 0.5)
    pooled = nn.functional.avg_pool2d(full.view(-1, 1, side, side), 2).flatten()
    torch.testing.assert_close(joined(found, "cls_attention"), pooled)
    for context in found:
        torch.testing.assert_close(context.project(context.features), context.projected)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_qwen(name: str) -> None:
    """Windows are put back in order; four patches a token; every frame is a tile."""
    batch = make_batch(name)
    found = contexts(batch)
    for context in found:
        torch.testing.assert_close(context.project(context.features), context.projected)
    blocks = batch.model.model.visual.blocks
    path = f"model.visual.blocks.{len(blocks) - 1}.attn"
    calls: list[tuple[Any, Any]] = []
    hook = batch.model.get_submodule(path).register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        batch.model(**batch.inputs)
    hook.remove()
    maps = []
    attention = blocks[-1].attn
    for args, kwargs in calls:
        maps += _qwen_rows(attention, args[0] if args else kwargs["hidden_states"], kwargs)
    # Each frame attends to itself, so that attention sums to one over a frame
    for context in found:
        for tile in context.tiles.unique():
            own = context.cls_attention[context.tiles == tile] * 4
            assert own.sum() == pytest.approx(1, abs=1e-5)
    expected = sorted(torch.cat(maps).view(-1, 4).mean(1).tolist())
    assert sorted(joined(found, "cls_attention").tolist()) == pytest.approx(expected, rel=1e-4)


def _qwen_rows(attention: Any, hidden: Tensor, kwargs: dict[str, Any]) -> list[Tensor]:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    q, k, _ = attention.qkv(hidden).reshape(len(hidden), 3, attention.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    q, k = apply_rotary_pos_emb_vision(q, k, *kwargs["position_embeddings"])
    bounds = kwargs["cu_seqlens"].tolist()
    rows = []
    for first, last in itertools.pairwise(bounds):
        scores = torch.einsum("qhd,khd->hqk", q[first:last], k[first:last]) * q.shape[-1] ** -0.5
        rows.append(scores.softmax(-1).mean((0, 1)))
    return rows


def test_video_llava_keeps_the_class_token_of_frames() -> None:
    batch = make_batch("video_llava")
    for context in contexts(batch):
        ids = batch.inputs["input_ids"][context.sample_index]
        if (ids == VIDEO).any():
            sizes = context.tiles.unique_consecutive(return_counts=True)[1].tolist()
            assert sizes == [10, 10, 9]  # two frames, an image
            frame = context.cls_attention[:10]
            assert frame.sum() == pytest.approx(1, abs=1e-5)


def test_a_tower_without_class_token_takes_the_mean_over_queries() -> None:
    batch = make_batch("gemma3")
    found = contexts(batch, frozenset({"features", "cls_attention", "keys", "tiles"}))
    layer = batch.model.model.vision_tower.encoder.layers[1]
    hidden = hooked(batch.model, batch, "model.vision_tower.encoder.layers.1.self_attn.q_proj", inputs=True)[0]
    full = eager_attention(layer.self_attn, hidden, layer.self_attn.scale).mean((1, 2))
    side = int(full.shape[1] ** 0.5)
    pooled = nn.functional.avg_pool2d(full.view(-1, 1, side, side), side // 3).flatten()
    torch.testing.assert_close(joined(found, "cls_attention"), pooled)


def test_rows_are_the_same_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch("gemma3")
    wanted = frozenset({"cls_attention"})
    whole = joined(contexts(batch, wanted), "cls_attention")
    monkeypatch.setattr("dop_compile.vision.rows.CHUNK_NUMBERS", 500)
    torch.testing.assert_close(joined(contexts(batch, wanted), "cls_attention"), whole)


@pytest.mark.parametrize(("name", "shape"), [("llava", (1, 3, 3)), ("qwen2_5_vl", (1, 3, 3)), ("internvl", (1, 3, 3))])
def test_grid(name: str, shape: tuple[int, int, int]) -> None:
    found = contexts(make_batch(name), frozenset({"grid", "tiles"}))
    assert found[0].grid[0] == shape
    for context in found:
        sizes = torch.bincount(context.segments).tolist()
        assert [f * h * w for f, h, w in context.grid] == sizes


# The model stays as it is.


def test_nothing_is_left_on_the_model_and_nothing_is_noted_without_need() -> None:
    model = FAMILIES["llava"].build()
    batch = make_batch("llava", model=model)
    with torch.no_grad():
        model(**batch.inputs)  # Hugging Face puts its own hooks on first use
    before = {name: (dict(vars(m)), list(m._forward_hooks)) for name, m in model.named_modules()}
    seen = contexts(batch)
    (uniform,) = [contexts(batch, frozenset())]
    assert seen[0].features is not None
    assert uniform[0].features is uniform[0].tiles is uniform[0].text_ids is None
    for name, module in model.named_modules():
        variables, hooks = before[name]
        assert vars(module).keys() == variables.keys()
        assert list(module._forward_hooks) == hooks
        assert all(vars(module)[key] is value for key, value in variables.items() if key != "training")


def test_hidden_states_are_recorded_once_where_a_compiled_model_comes_first() -> None:
    """On a fresh model Hugging Face's recording hooks are put in place during the compiled model's first call."""
    model = FAMILIES["llava"].build()
    batch = make_batch("llava", model=model)
    for _ in range(3):
        contexts(batch)
    assert torch.equal(model(**batch.inputs).logits, FAMILIES["llava"].build()(**batch.inputs).logits)


def test_generated_tokens_are_no_text() -> None:
    """Without a cache, a prompt is computed again with its answer; what is kept must not change with it."""
    batch = make_batch("llava", padding="left")
    spy = Spy(frozenset({"text_ids"}))
    registry._factories["spy"] = lambda: spy
    compiled = compile_eagerly(batch.model, Policy.depthwise(4, visual_tokens=2, reducer="spy"))
    compiled.generate(**batch.inputs, max_new_tokens=3, do_sample=False, use_cache=False)
    rows = len(spy.seen) // 3
    for number, context in enumerate(spy.seen):
        first = spy.seen[number % rows]
        assert torch.equal(context.text_ids, first.text_ids)
        assert torch.equal(context.text, first.text)


# What cannot be told is refused.


def test_ready_made_features() -> None:
    batch = make_batch("llava")
    model = batch.model
    compiled = compile_eagerly(model, Policy.depthwise(4, visual_tokens=3, reducer="vispruner"))
    with torch.no_grad():
        features = torch.cat(list(model.get_image_features(batch.inputs["pixel_values"]).pooler_output))
        embeds = model.get_input_embeddings()(batch.inputs["input_ids"])
        embeds[batch.inputs["input_ids"] == IMAGE] = features
    groups = (batch.inputs["input_ids"] == IMAGE).long()
    with pytest.raises(ValueError, match="requires cls_attention, features, which this model does not supply"):
        compiled(inputs_embeds=embeds, attention_mask=batch.inputs["attention_mask"], token_groups=groups)
    encoded = model.get_image_features(batch.inputs["pixel_values"], return_dict=True)
    with pytest.raises(UnsupportedUsageError, match=r"ready-made.*Reducers that fit: divprune, random, uniform$"):
        compiled(**without(batch.inputs, "pixel_values"), mm_encoder_outputs={"image": encoded})


def test_text_ids_without_ids() -> None:
    batch = make_batch("llama")
    groups = torch.zeros_like(batch.inputs["input_ids"])
    groups[:, 1:3] = 1
    registry._factories["spy"] = lambda: Spy(frozenset({"text_ids"}))
    compiled = compile_eagerly(batch.model, Policy.depthwise(4, visual_tokens=1, reducer="spy"))
    embeds = batch.model.get_input_embeddings()(batch.inputs["input_ids"])
    with pytest.raises(UnsupportedUsageError, match=r"'spy' reads the text: pass input_ids"):
        compiled(inputs_embeds=embeds, token_groups=groups)


@pytest.mark.parametrize(
    ("name", "reducer", "message"),
    [
        ("gemma3", "visionzip", r"project, which Gemma3\w+ does not supply here: .*token by token.*vispruner$"),
        (
            "mistral3",
            "vispruner",
            r"cls_attention, features.*in a way that is not known.*fit: cdpruner, divprune, random, uniform$",
        ),
    ],
)
def test_a_projector_that_mixes_tokens(name: str, reducer: str, message: str) -> None:
    batch = make_batch(name)
    compiled = compile_eagerly(batch.model, Policy.depthwise(batch.family.num_layers, visual_tokens=3, reducer=reducer))
    with pytest.raises(UnsupportedUsageError, match=message):
        compiled(**batch.inputs)


def test_square_blocks_are_tried_before_they_are_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A projector that makes 9 tokens of 36 patches, but not of blocks: the last token sees all patches."""
    batch = make_batch("gemma3")
    kind = type(batch.model.model.multi_modal_projector)
    plain = kind.forward

    def forward(self: Any, vision_outputs: Tensor) -> Tensor:
        rows = plain(self, vision_outputs).clone()
        rows[:, -1] += vision_outputs.mean()
        return rows

    policy = Policy.depthwise(batch.family.num_layers, visual_tokens=3, reducer="vispruner")
    compiled = compile_eagerly(batch.model, policy)
    compiled(**batch.inputs)
    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(UnsupportedUsageError, match="in a way that is not known"):
        compiled(**batch.inputs)


def test_a_tower_whose_attention_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch("llava")
    attention = batch.model.model.vision_tower.encoder.layers[0].self_attn

    def forward(self: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hidden_states, None

    monkeypatch.setattr(type(attention), "forward", forward)
    compiled = compile_eagerly(batch.model, Policy.depthwise(4, visual_tokens=3, reducer="prumerge"))
    message = r"cls_attention, keys.*CLIPAttention does not use.*interface.*fit: cdpruner, divprune, random, trim, uni"
    with pytest.raises(UnsupportedUsageError, match=message):
        compiled(**batch.inputs)
