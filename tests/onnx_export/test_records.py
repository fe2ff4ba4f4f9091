"""Dataclasses as strict JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from dop_compile import Policy
from dop_compile.documents import parse
from dop_compile.onnx.contract.records import decode, encode


@dataclass(frozen=True)
class Inner:
    name: str
    sizes: tuple[int | str, ...]


@dataclass(frozen=True)
class Outer:
    inner: Inner | None
    many: dict[str, tuple[Inner, ...]]
    share: float
    flag: bool
    policy: Policy


VALUE = Outer(Inner("a", (1, "batch")), {"x": (Inner("b", ()),)}, 0.5, True, Policy.full(3))


def changed(**fields: object) -> str:
    return json.dumps({**encode(VALUE), **fields})


def test_round_trip() -> None:
    assert decode(Outer, parse(json.dumps(encode(VALUE)))) == VALUE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed(share="0.5"), "share: expected a number"),
        (changed(share=True), "share: expected a number"),
        (changed(flag=1), "flag: expected true or false"),
        (changed(more=1), "more: unknown field"),
        (changed(inner={"name": "a"}), "inner.sizes: the field is missing"),
        (changed(inner={"name": "a", "sizes": [1.5]}), r"inner.sizes\[0\]: expected an integer or a string"),
        (changed(inner={"name": 1, "sizes": []}), "inner.name: expected a string"),
        (changed(many=[]), "many: expected an object"),
        (changed(many={"x": {}}), "many.x: expected a list"),
        ("[]", "document: expected an object"),
        ('{"share": NaN}', "finite"),
        ('{"flag": true, "flag": true}', "given twice"),
        ("{", "not JSON"),
    ],
)
def test_anything_else_is_refused_by_field(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(Outer, parse(text))
