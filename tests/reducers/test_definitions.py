"""Every method against a plain restatement of its definition, over drawn features, budgets and batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dop_compile.reducers import (
    CDPrunerReducer,
    PruMergePlusReducer,
    PruMergeReducer,
    VisionZipReducer,
    VisPrunerReducer,
    VisualContext,
    create,
    select_batch,
    select_tokens,
)
from tests.drawing import examples
from tests.reducers import plain
from tests.reducers.drawn import contexts, contexts_and_counts

METHODS = ("vispruner", "cdpruner", "divprune", "visionzip", "prumerge", "prumerge_plus", "trim")
drawn = examples(60)


def numpy(context: VisualContext, *names: str) -> list[np.ndarray]:
    return [getattr(context, name).numpy() for name in names]


def assert_merged(context, selection, kept, merged):
    """The kept tokens, features of the merged ones to float32 precision, and of the others bit by bit."""
    assert selection.indices.tolist() == kept
    if not merged:
        assert selection.features is None
        return
    for index, row in zip(kept, selection.features, strict=True):
        if index in merged:
            expected = context.project(torch.tensor(merged[index], dtype=torch.float64).float()[None])[0]
            torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(row, context.projected[index])


@drawn
@given(contexts_and_counts(), st.sampled_from([0, 0.25, 0.5, 0.9, 1]))
def test_vispruner(sample, ratio):
    context, count = sample
    attention, features = numpy(context, "cls_attention", "features")
    kept = select_tokens(VisPrunerReducer(ratio), context, count).indices.tolist()
    assert kept == plain.vispruner(attention, features, count, ratio)


@drawn
@given(contexts_and_counts())
def test_divprune(sample):
    context, count = sample
    kept = select_tokens(create("divprune"), context, count).indices.tolist()
    assert kept == plain.divprune(context.projected.numpy(), count)


@drawn
@given(contexts_and_counts())
def test_cdpruner_takes_the_largest_gain_in_the_determinant(sample):
    context, count = sample
    projected, text = numpy(context, "projected", "text")
    text = text[context.instruction_start :] if context.instruction_start < len(text) else text
    quality = plain.scaled(plain.relevance(projected, text)).astype(np.float64)
    cosines = np.array([[plain.cosine(a, b) for b in projected] for a in projected], dtype=np.float64)
    kernel = quality[:, None] * cosines * quality
    kept = select_tokens(CDPrunerReducer(), context, count).indices.tolist()
    for number, token in enumerate(kept):
        gains = plain.determinant_gains(kernel, kept[:number])
        left = [i for i in range(context.tokens) if i not in kept[:number]]
        best = max(gains[i] for i in left)
        assert gains[token] >= best * (1 - 1e-4) - 2e-6 * np.diag(kernel).max()
        twins = [i for i in left if i < token and np.array_equal(projected[i], projected[token])]
        assert not twins, "an equal token of a lower index was there"


@drawn
@given(contexts_and_counts(), st.sampled_from([0, 10 / 64, 0.5, 1]))
def test_visionzip(sample, share):
    context, count = sample
    chosen = select_tokens(VisionZipReducer(share), context, count)
    assert_merged(context, chosen, *_zipped(context, count, share))


def _zipped(context, count, share):
    kept, merged = plain.visionzip(*numpy(context, "cls_attention", "features", "keys"), count, share)
    return kept, merged


@drawn
@given(contexts_and_counts(), st.sampled_from([PruMergeReducer, PruMergePlusReducer]), st.sampled_from([0, 3, 32]))
def test_prumerge(sample, kind, neighbours):
    context, count = sample
    reducer = kind(neighbours=neighbours)
    arrays = numpy(context, "cls_attention", "features", "keys")
    kept, merged = plain.prumerge(*arrays, count, kind.spaced, neighbours)
    assert_merged(context, select_tokens(reducer, context, count), kept, merged)


@drawn
@given(contexts_and_counts(), st.sampled_from([PruMergeReducer, PruMergePlusReducer]))
def test_adaptive_prumerge_keeps_as_many_as_there_are_outliers(sample, kind):
    context, limit = sample
    arrays = numpy(context, "cls_attention", "features", "keys")
    count = min(limit, (1 + kind.spaced) * plain.outliers(arrays[0]) + 1)
    kept, merged = plain.prumerge(*arrays, count, kind.spaced)
    assert_merged(context, select_tokens(kind(adaptive=True), context, limit), kept, merged)


@drawn
@given(contexts_and_counts())
def test_trim(sample):
    context, count = sample
    projected, features, text = numpy(context, "projected", "features", "text")
    text = text[context.instruction_start :] if context.instruction_start < len(text) else text
    kept, merged = plain.trim(plain.relevance(projected, text), features, count)
    assert_merged(context, select_tokens(create("trim"), context, count), kept, merged)


# What holds for all of them.


@drawn
@given(st.sampled_from(METHODS), contexts_and_counts())
def test_any_count_of_distinct_tokens(name, sample):
    context, count = sample
    kept = select_tokens(create(name), context, count).indices.tolist()
    assert len(kept) == len(set(kept)) == count
    assert all(0 <= token < context.tokens for token in kept)


@drawn
@given(st.sampled_from(METHODS), st.data(), st.lists(st.integers(1, 25), min_size=1, max_size=4))
def test_a_batch_is_its_samples(name, data, sizes):
    samples = [data.draw(contexts(tokens=size)) for size in (*sizes, sizes[0])]
    counts = [data.draw(st.integers(0, size)) for size in (*sizes, sizes[0])]
    # One projector for all, as in a model
    weight = torch.ones(samples[0].features.shape[1], 5)
    samples = [VisualContext(**{**vars(s), "project": lambda rows: rows @ weight}) for s in samples]
    for alone, together in zip(
        [select_tokens(create(name), s, n) for s, n in zip(samples, counts, strict=True)],
        select_batch(create(name), samples, counts),
        strict=True,
    ):
        assert alone.indices.tolist() == together.indices.tolist()
        assert (alone.features is None) == (together.features is None)
        if alone.features is not None:
            torch.testing.assert_close(alone.features, together.features, rtol=1e-5, atol=1e-5)


@drawn
@given(st.sampled_from(METHODS), contexts(max_tokens=12))
def test_equal_tokens_are_taken_in_order(name, context):
    """All tokens are the same: what is kept does not skip a lower index without a rule that says so."""
    same = {k: v[:1].expand_as(v) for k, v in vars(context).items() if isinstance(v, torch.Tensor) and k != "text"}
    context = VisualContext(**{**vars(context), **same})
    count = context.tokens // 2
    kept = select_tokens(create(name), context, count).indices.tolist()
    if name in ("cdpruner", "divprune"):
        assert kept == list(range(count))
    elif name == "vispruner":
        assert kept[: count // 2] == list(range(count // 2))
    elif count:
        top = {"visionzip": count - int(count * 10 / 64 + 0.5), "prumerge_plus": -(-(count - 1) // 4)}
        top = top.get(name, count - 1)
        assert kept[:top] == list(range(top))


@drawn
@given(st.sampled_from(["cdpruner", "vispruner"]), st.data())
def test_a_permutation_permutes_the_choice(name, data):
    """Where there are no ties, the order of the tokens means nothing. (Two nearest neighbours tie in DivPrune.)"""
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    tokens = data.draw(st.integers(2, 30))
    features = torch.tensor(rng.normal(size=(tokens, 6)), dtype=torch.float32)
    attention = torch.tensor(rng.random(tokens), dtype=torch.float32)
    text = torch.tensor(rng.normal(size=(3, 6)), dtype=torch.float32)
    zeros = torch.zeros(tokens, dtype=torch.long)

    def chosen(order):
        context = VisualContext(
            features[order], text, zeros, 0, features=features[order], cls_attention=attention[order], tiles=zeros
        )
        return order[select_tokens(create(name), context, min(tokens, 6)).indices].tolist()

    order = torch.tensor(rng.permutation(tokens))
    assert chosen(order) == chosen(torch.arange(tokens))


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_and_nan_are_no_crash(name):
    torch.manual_seed(0)
    features = torch.randn(12, 6).to(torch.bfloat16)
    weight = torch.randn(6, 6).to(torch.bfloat16)
    zeros = torch.zeros(12, dtype=torch.long)
    fields = {"features": features, "cls_attention": torch.rand(12), "keys": torch.randn(12, 4), "tiles": zeros}
    context = VisualContext(features @ weight, torch.randn(2, 6), zeros, 0, project=lambda f: f @ weight, **fields)
    chosen = select_tokens(create(name), context, 5)
    assert chosen.features is None or chosen.features.dtype == torch.bfloat16
    for field in ("projected", "features"):
        getattr(context, field)[3] = float("nan")
    assert len(set(select_tokens(create(name), context, 5).indices.tolist())) == 5
