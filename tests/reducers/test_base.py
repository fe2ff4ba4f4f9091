"""The values that cross the interface of reducers."""

import dataclasses

import pytest
import torch

from dop_compile.reducers import OPTIONAL_FIELDS, Reducer, Selection, UniformReducer, VisualContext

WELL_FORMED = {
    "projected": torch.zeros(6, 4),
    "text": torch.zeros(3, 4),
    "segments": torch.zeros(6, dtype=torch.long),
    "sample_index": 0,
    "features": torch.zeros(6, 8),
    "cls_attention": torch.zeros(6),
    "grid": ((1, 2, 3),),
    "keys": torch.zeros(6, 5),
    "project": lambda features: features[:, :4],
    "tiles": torch.zeros(6, dtype=torch.long),
    "text_ids": torch.zeros(3, dtype=torch.long),
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("projected", torch.zeros(1, 6, 4)),
        ("text", torch.zeros(3, 5)),
        ("text", torch.zeros(4)),
        ("segments", torch.zeros(5, dtype=torch.long)),
        ("segments", torch.zeros(6, dtype=torch.int32)),
        ("features", torch.zeros(5, 8)),
        ("features", torch.zeros(6)),
        ("cls_attention", torch.zeros(6, 6)),
        ("keys", torch.zeros(5, 8)),
        ("tiles", torch.zeros(5, dtype=torch.long)),
        ("tiles", torch.zeros(6)),
        ("text_ids", torch.zeros(2, dtype=torch.long)),
        ("relevance", torch.zeros(6, 1)),
    ],
)
def test_a_contradicting_shape_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be"):
        VisualContext(**(WELL_FORMED | {field: value}))


def test_optional_fields_are_exactly_those_that_may_be_missing():
    absent = {
        field.name
        for field in dataclasses.fields(VisualContext)
        if field.default is None  # not MISSING, not a number
    }
    assert absent == OPTIONAL_FIELDS | {"relevance"}  # the reducer's own
    VisualContext(**{name: value for name, value in WELL_FORMED.items() if name not in OPTIONAL_FIELDS})


def test_a_sample_may_have_no_visual_and_no_text_tokens():
    empty = VisualContext(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 0)
    assert empty.tokens == 0


@pytest.mark.parametrize("value", [VisualContext(**WELL_FORMED), Selection(torch.zeros(1))])
def test_values_are_frozen(value):
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, torch.zeros(2, 4))


def test_the_protocol_tells_reducers_from_other_callables():
    assert isinstance(UniformReducer(), Reducer)
    assert not isinstance(lambda context, count: None, Reducer)
