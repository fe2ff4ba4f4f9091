"""Which visual tokens leave, from full attention maps of the untouched model: plain loops in float64.

Stage by stage, the masked reference runs with what has left so far, in Hugging Face's eager attention; a stage reads
the map, the keys and the states of its layer from that run.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dop_compile import Policy
from tests.reference import LAYERS, Row, _run, layer_parts, named_child, split_rows, text_decoder
from tests.support import Batch


@dataclass
class Seen:
    """What a run showed of one layer, for one row: (heads, queries, keys), (keys, size), (tokens, hidden)."""

    weights: Tensor | None = None
    keys: Tensor | None = None
    states: Tensor | None = None
    embeds: Tensor | None = None
    groups: list[str] = field(default_factory=list)
    newline: Tensor | None = None


def leaving(batch: Batch, policy: Policy) -> list[dict[str, list[int]]]:
    """Per row, the ordinals of the visual tokens that leave after each stage."""
    assert policy.ranking is not None
    rows = split_rows(batch.model, batch.inputs, None, batch.groups, None, batch.towers)
    return [_row(batch, policy, row) for row in rows]


def _row(batch: Batch, policy: Policy, row: Row) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    ranking = policy.ranking
    assert ranking is not None
    for stage in ranking.stages:
        row = replace(row, leaving=dict(found))
        # Ranked by the next layer: the reference runs that for all tokens that earlier stages left
        seen = _look(batch, policy, row, stage.layer + dict(ranking.options).get("next_layer", False))
        assert seen.newline is not None
        visual = [i for i, g in enumerate(seen.groups) if g.startswith("visual") and not seen.newline[i]]
        if not visual:
            found[stage.group] = []
            continue
        gone = {ordinal for ordinals in found.values() for ordinal in ordinals}
        left = [ordinal for ordinal in range(len(visual)) if ordinal not in gone]
        count = min(stage.count(len(visual)), len(left))
        kept = KEEP[ranking.criterion](seen, visual, left, count, dict(ranking.options))
        found[stage.group] = [ordinal for ordinal in left if ordinal not in kept]
    return found


def _look(batch: Batch, policy: Policy, row: Row, number: int) -> Seen:
    """One run of the masked reference, in eager attention."""
    model, seen = batch.model, Seen()
    decoder = text_decoder(model)
    layer = named_child(decoder, LAYERS)[number]
    attention = layer_parts(layer)["attention"][0]
    source = sys.modules[type(attention).__module__]
    eager = source.eager_attention_forward

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = eager(module, query, key, value, *args, **kwargs)
        if module is attention:
            seen.weights, seen.keys = out[1][0].double(), key[0].transpose(0, 1).flatten(1).double()
        return out

    def note(_: Any, args: Any, output: Any) -> None:
        seen.states = (output[0] if isinstance(output, tuple) else output)[0].double()

    import tests.reference as reference

    names = reference._group_names

    def group_names(*arguments: Any) -> list[str]:
        seen.groups, seen.newline = names(*arguments), arguments[2].newline
        seen.embeds = arguments[2].embeds[0].double()
        return seen.groups

    config = decoder.config
    before = config._attn_implementation_internal
    handle = layer.register_forward_hook(note)
    with _replaced(source, "eager_attention_forward", spy), _replaced(reference, "_group_names", group_names):
        # Of the decoder alone: a vision tower need not give the same features in eager attention
        config._attn_implementation_internal = "eager"
        try:
            _run(model, row, policy)
        finally:
            config._attn_implementation_internal = before
            handle.remove()
    return seen


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _texts(seen: Seen) -> list[int]:
    return [index for index, group in enumerate(seen.groups) if group == "text"]


def _highest(scores: dict[int, float], count: int) -> list[int]:
    return sorted(scores, key=lambda index: (-scores[index], index))[:count]


def _received(seen: Seen, query: int, key: int) -> float:
    assert seen.weights is not None
    return sum(float(head[query, key]) for head in seen.weights) / len(seen.weights)


def _strongest(seen: Seen, query: int, key: int) -> float:
    assert seen.weights is not None
    return max(float(head[query, key]) for head in seen.weights)


def last_token(seen: Seen, visual: list[int], left: list[int], count: int, options: dict[str, Any]) -> set[int]:
    last = max(index for index, group in enumerate(seen.groups) if group != "output")
    return set(_highest({n: _received(seen, last, visual[n]) for n in left}, count))


def product(seen: Seen, visual: list[int], left: list[int], count: int, options: dict[str, Any]) -> set[int]:
    scores = {}
    for n in left:
        own = sum(_strongest(seen, visual[other], visual[n]) for other in left)
        cross = sum(_strongest(seen, text, visual[n]) for text in _texts(seen))
        scores[n] = own * cross
    return set(_highest(scores, count))


def text_raters(seen: Seen, visual: list[int], left: list[int], count: int, options: dict[str, Any]) -> set[int]:
    texts, embeds = _texts(seen), seen.embeds
    assert embeds is not None
    relevance = dict.fromkeys(texts, 0.0)
    for place in visual:
        products = torch.stack([embeds[place] @ embeds[text] for text in texts])
        for text, share in zip(texts, products.softmax(0).tolist(), strict=True):
            relevance[text] += share / len(visual)
    mean = sum(relevance.values()) / len(texts)
    raters = [text for text in texts if relevance[text] >= mean]
    return set(_highest({n: sum(_received(seen, rater, visual[n]) for rater in raters) for n in left}, count))


def pivots(seen: Seen, visual: list[int], left: list[int], count: int, options: dict[str, Any]) -> set[int]:
    assert seen.keys is not None
    assert seen.states is not None
    norms, states = seen.keys.abs().sum(1), seen.states
    own = _highest({n: float(norms[visual[n]]) for n in left}, min(options.get("visual", 4), count))
    texts = _highest({text: float(norms[text]) for text in _texts(seen)}, options.get("text", 4))
    kept, places = set(own), [visual[n] for n in own] + texts
    missing = count - len(own)
    for number, place in enumerate(places):
        share = missing // len(places) + (number < missing % len(places))
        others = [n for n in left if n not in kept]
        unlike = {n: -float(torch.cosine_similarity(states[place], states[visual[n]], dim=0)) for n in others}
        kept |= set(_highest(unlike, share))
    return kept


KEEP = {"last_token": last_token, "product": product, "text_raters": text_raters, "pivots": pivots}
