"""Models that are compiled with a reducer, against the untouched model with the reducer's definition done by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dop_compile import Policy
from dop_compile.reducers import Selection, create, quotas, registry
from dop_compile.replay import Replay
from dop_compile.search import measure_divergences
from tests.families import FAMILIES, IMAGE, VIDEO
from tests.reducers import plain
from tests.reference import _split_tower
from tests.support import (
    Batch,
    assert_close,
    assert_forward_matches,
    assert_generates_reference,
    compile_eagerly,
    make_batch,
    mixed_rows,
    shared_model,
)

METHODS = ("vispruner", "cdpruner", "divprune", "visionzip", "prumerge", "prumerge_plus", "trim")
END_TO_END = ("llava", "llava_next", "qwen2_5_vl", "internvl", "video_llava")


@torch.no_grad()
def decoder_embeds(batch: Batch) -> Tensor:
    """(batch, tokens, hidden) what the untouched model hands to its decoder."""
    given: list[Tensor] = []
    hook = batch.model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    batch.model(**batch.inputs)
    hook.remove()
    return given[0]


def by_text_or_distance(batch: Batch, row: int, embeds: Tensor, method: str, counts: list[int]) -> list[int]:
    """Ordinals of kept visual tokens of a row, image after image, for methods that need no more than the embeddings.

    `counts`: visual tokens of each image.
    """
    mask, visual = batch.mask[row], batch.visual[row]
    placeholder = torch.isin(batch.inputs["input_ids"][row], torch.tensor([IMAGE, VIDEO])) & mask
    first = int(placeholder.nonzero()[0])
    text = (mask & ~placeholder).clone()
    text[:first] = False
    projected = embeds[row, visual].numpy()
    kept, start = [], 0
    for size, quota in zip(counts, quotas(6, counts), strict=True):
        own = projected[start : start + size]
        if method == "divprune":
            chosen = plain.divprune(own, quota)
        else:
            chosen = greedy(own, plain.scaled(plain.relevance(own, embeds[row, text].numpy())), quota)
        kept += sorted(start + i for i in chosen)
        start += size
    return kept


def greedy(projected: np.ndarray, quality: np.ndarray, count: int) -> list[int]:
    cosines = np.array([[plain.cosine(a, b) for b in projected] for a in projected], dtype=np.float64)
    kernel = quality[:, None] * cosines * quality
    chosen: list[int] = []
    for _ in range(count):
        gains = plain.determinant_gains(kernel, chosen)
        left = [i for i in range(len(projected)) if i not in chosen]
        chosen.append(plain.by_score(left, gains)[0])
    return chosen


def image_sizes(batch: Batch, row: int) -> list[int]:
    sizes, previous = [], False
    placeholder = torch.isin(batch.inputs["input_ids"][row], torch.tensor([IMAGE, VIDEO]))
    for column, here in enumerate(placeholder.tolist()):
        if here and not previous:
            sizes.append(0)
        if here:
            sizes[-1] += bool(batch.visual[row, column])
        previous = here
    return sizes


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl"])
@pytest.mark.parametrize("method", ["divprune", "cdpruner"])
def test_kept_tokens_are_those_of_the_definition(name: str, method: str) -> None:
    """Several images a row, a row of text alone, left padding; logits and answers are the oracle's."""
    rows = [row for row in mixed_rows(FAMILIES[name]) if not any(segment[0] == "video" for segment in row)]
    batch = make_batch(name, rows)
    embeds = decoder_embeds(batch)
    sizes = [image_sizes(batch, row) for row in range(len(rows))]
    kept = [by_text_or_distance(batch, row, embeds, method, own) if own else [] for row, own in enumerate(sizes)]
    policy = Policy.depthwise(4, mha_depth=3, mlp_depth=2, visual_tokens=6, reducer=method)
    compiled = compile_eagerly(batch.model, policy)
    assert_forward_matches(compiled, batch, policy, kept)
    assert_generates_reference(compiled, batch, policy, kept)


@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_vispruner_from_the_models_own_attention(count: int) -> None:
    """[CLS] attention and features as an eager tower returns them."""
    eager = shared_model("llava", attn="eager")
    batch = make_batch("llava", [[("text", 3), ("image",), ("text", 4)], [("image",), ("text", 2)]], model=eager)
    with torch.no_grad():
        seen = eager.model.vision_tower(batch.inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    attention = seen.attentions[-2][:, :, 0, 1:].mean(1).numpy()
    features = seen.hidden_states[-2][:, 1:].numpy()
    kept = [sorted(plain.vispruner(a, f, count)) for a, f in zip(attention, features, strict=True)]
    policy = Policy.depthwise(4, visual_tokens=count, reducer="vispruner")
    for attn in ("eager", "sdpa"):
        model = shared_model("llava", attn=attn)
        own = Batch(batch.family, model, batch.inputs)
        compiled = compile_eagerly(model, policy)
        assert_forward_matches(compiled, own, policy, kept)
        assert_generates_reference(compiled, own, policy, kept)


@pytest.mark.parametrize("method", ["visionzip", "prumerge", "prumerge_plus", "trim"])
@torch.no_grad()
def test_merged_tokens_enter_the_decoder(method: str) -> None:
    """The untouched decoder, given the kept and merged embeddings at their positions."""
    model = shared_model("llava")
    batch = make_batch("llava", [[("text", 3), ("image",), ("text", 4)]])
    count = 7
    seen = shared_model("llava", attn="eager").model.vision_tower(
        batch.inputs["pixel_values"], output_attentions=True, output_hidden_states=True
    )
    attention = seen.attentions[-2][0, :, 0, 1:].mean(0).numpy()
    features = seen.hidden_states[-2][0, 1:].numpy()
    layer = model.model.vision_tower.encoder.layers[0]
    keys = layer.self_attn.k_proj(layer.layer_norm1(seen.hidden_states[-3]))[0, 1:]
    keys = keys.unflatten(-1, (2, -1)).mean(1).numpy()
    embeds = decoder_embeds(batch)
    columns = batch.visual[0].nonzero()[:, 0]
    if method == "visionzip":
        kept, merged = plain.visionzip(attention, features, keys, count)
    elif method == "trim":
        scores = plain.relevance(embeds[0, columns].numpy(), embeds[0, int(columns[-1]) + 1 :].numpy())
        kept, merged = plain.trim(scores, features, count)
    else:
        kept, merged = plain.prumerge(attention, features, keys, count, spaced=3 * method.endswith("plus"))
    assert merged
    for ordinal, value in merged.items():
        embeds[0, columns[ordinal]] = model.model.multi_modal_projector(torch.tensor(value).float()[None])[0]
    keep = torch.ones(embeds.shape[1], dtype=torch.bool)
    keep[columns] = False
    keep[columns[torch.tensor(kept)]] = True
    positions = keep.nonzero()[:, 0]
    mask = torch.ones(len(positions), len(positions), dtype=torch.bool).tril()[None, None]
    hidden = model.get_decoder()(
        inputs_embeds=embeds[:, keep], position_ids=positions[None], attention_mask=mask, use_cache=False
    ).last_hidden_state
    policy = Policy.depthwise(4, visual_tokens=count, reducer=method)
    logits = compile_eagerly(model, policy)(**batch.inputs).logits
    assert_close(logits[:, positions], model.lm_head(hidden))


IMAGES = [("text", 3), ("image",), ("text", 4), ("image", 1), ("text", 3)]
VIDEOS = [("text", 2), ("video",), ("text", 3), ("video",), ("text", 2)]
BATCHES = [(name, IMAGES) for name in END_TO_END] + [("qwen2_5_vl", VIDEOS), ("video_llava", VIDEOS)]


def compiled_by_method(model: Any, **settings: Any) -> Any:
    """One tier per method; their programs are shared."""
    layers = model.config.get_text_config().num_hidden_layers
    tiers = {method: Policy.depthwise(layers, reducer=method, **settings) for method in METHODS}
    return compile_eagerly(model, tiers, debug=False)


@pytest.mark.parametrize(("name", "row"), BATCHES, ids=[f"{n} {r[1][0]}s" for n, r in BATCHES])
@torch.no_grad()
def test_a_batch_is_its_samples(name: str, row: list[Any]) -> None:
    """Two rows with images of several sizes, tiles or frames: each alone is its row of the batch."""
    model = shared_model(name)
    compiled = compiled_by_method(model, mha_depth=3, visual_tokens=5)
    pair = make_batch(name, [row, row], seed=1).inputs
    text = {n: v for n, v in pair.items() if n in ("input_ids", "attention_mask", "mm_token_type_ids")}
    tower = {n: v for n, v in pair.items() if n not in text}
    counts = ((pair["input_ids"] == IMAGE) | (pair["input_ids"] == VIDEO)).sum(1).tolist()
    split = _split_tower(model, tower, counts)
    settings = {"max_new_tokens": 2, "do_sample": False}
    for method in METHODS:
        together = compiled(**pair, logits_to_keep=1, tier=method).logits[:, -1]
        answers = compiled.generate(**pair, **settings, tier=method)
        assert torch.equal(answers[:, -2], together.argmax(-1))
        for number, own in enumerate(split):
            alone = {n: v[number : number + 1] for n, v in text.items()} | own
            assert_close(compiled(**alone, logits_to_keep=1, tier=method).logits[0, -1], together[number])


@pytest.mark.parametrize("name", END_TO_END)
@torch.no_grad()
def test_keeping_all_tokens_is_the_original(name: str) -> None:
    batch = make_batch(name)
    expected = batch.model(**batch.inputs).logits
    compiled = compiled_by_method(batch.model, visual_tokens=10**6)
    for method in METHODS:
        logits = compiled(**batch.inputs, tier=method).logits
        assert_close(logits[batch.mask], expected[batch.mask])


@torch.no_grad()
def test_beams_and_returned_sequences() -> None:
    """`generate` encodes images once, before it repeats rows."""
    batch = make_batch("llava", [[("text", 3), ("image",), ("text", 4)], [("text", 5), ("image",), ("text", 1)]])
    compiled = compile_eagerly(batch.model, Policy.depthwise(4, visual_tokens=4, reducer="vispruner"))
    kept = [sorted(row) for row in _kept(batch, "vispruner", 4)]
    given = compile_eagerly(batch.model, Policy.depthwise(4, visual_tokens=4, reducer="given"))
    for settings in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        settings |= {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(
            compiled.generate(**batch.inputs, **settings),
            given.generate(**batch.inputs, **settings, visual_indices=kept),
        )


def _kept(batch: Batch, method: str, count: int) -> list[list[int]]:
    """What a compiled model keeps, read off its reducer."""
    seen: list[list[int]] = []
    inner = create(method)

    class Recording:
        name, requires, per_tile = "recording", inner.requires, getattr(inner, "per_tile", False)

        def __call__(self, context: Any, count: int) -> Selection:
            selection = inner(context, count)
            seen.append(selection.indices.tolist())
            return selection

    registry._factories["recording"] = Recording
    try:
        policy = Policy.depthwise(batch.family.num_layers, visual_tokens=count, reducer="recording")
        compile_eagerly(batch.model, policy)(**batch.inputs)
    finally:
        del registry._factories["recording"]
    return seen


def test_options_reach_the_reducer() -> None:
    batch = make_batch("llava", [[("text", 3), ("image",), ("text", 4)]])

    def logits(**options: Any) -> Tensor:
        policy = Policy.depthwise(4, visual_tokens=4, reducer="vispruner", reducer_options=options)
        return compile_eagerly(batch.model, policy)(**batch.inputs).logits[:, -1]

    assert torch.equal(logits(), logits(ratio=0.5))
    assert not torch.equal(logits(ratio=0.0), logits(ratio=1.0))
    with pytest.raises(ValueError, match=r"tier 'default': unknown option 'share' of reducer 'vispruner'"):
        logits(share=1)


@pytest.mark.parametrize("method", ["vispruner", "cdpruner", "visionzip"])
@torch.no_grad()
def test_replay_and_search(method: str) -> None:
    """A replayed policy gives what a compiled one gives, and the search measures it."""
    batch = make_batch("llava", [[("text", 3), ("image",), ("text", 4)]])
    base = Policy.full(4).replace(reducer=method)
    policy = Policy.depthwise(4, mha_depth=3, visual_tokens=4, reducer=method)
    replay = Replay(compile_eagerly(batch.model, base), batch.inputs)
    expected = compile_eagerly(batch.model, policy)(**batch.inputs, logits_to_keep=1).logits
    assert_close(replay.logits(policy), expected)
    with pytest.raises(ValueError, match=r"features was not recorded for the reducer of this call"):
        Replay(compile_eagerly(batch.model, Policy.full(4)), batch.inputs).logits(policy.replace(reducer="trim"))
    found = measure_divergences(
        batch.model, [batch.inputs], axes=["visual_tokens"], points={"visual_tokens": [0.5]}, reducer=method
    )
    kept = round(0.5 * batch.counts[0] + 1e-9)
    half = Policy.full(4).replace(reducer=method, visual_tokens=kept)
    p, q = (
        model(**batch.inputs).logits[0, -1].double().softmax(-1)
        for model in (batch.model, compile_eagerly(batch.model, half))
    )
    top = p.topk(10).indices
    p, q = ((part[top] + 1e-8) / (part[top] + 1e-8).sum() for part in (p, q))
    assert found.array("visual_tokens")[0, 0] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-3)
