"""Divergences as a value: numbers by axis, subsets, and a strict, atomic file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from dop_compile import Policy
from dop_compile.search import Divergences
from tests.search.synthetic import dims_of, divergences_of, random_divergences

BASE = Policy.full(4).replace(reducer="random", reducer_options={"seed": 3, "share": 0.5}, positions="compact")
GIVEN = divergences_of(
    {"mha_depth": (3, 0), "visual_tokens": (0.75, 0.25)},
    {"mha_depth": [[0.1, 0.3, 0.2], [1.0, 2.0, 3.0]], "visual_tokens": [[0.5, 0.25, 1.0], [4.0, 2.0, 1.5]]},
    [(2, 8, 3), (1, 4, 2), (2, 8, 5)],
    dims_of(4, active_experts=(2,) * 4, shared_sizes=(8,) * 4),
    base=BASE,
    metric="forced_kl",
    metric_options=(("tokens", 4),),
)


# --- numbers


def test_values_by_axis() -> None:
    assert GIVEN.num_layers == 4
    assert GIVEN.visual_tokens == 8
    assert GIVEN.sample_tokens == (8, 4, 8)
    np.testing.assert_array_equal(GIVEN.array("mha_depth"), [[0.1, 0.3, 0.2], [1, 2, 3]])
    np.testing.assert_array_equal(GIVEN.coordinates("mha_depth"), [0, 3, 4])
    np.testing.assert_array_equal(GIVEN.coordinates("visual_tokens"), [2, 6, 8])
    np.testing.assert_array_equal(GIVEN.coordinates("visual_tokens", 4), [1, 3, 4])
    np.testing.assert_allclose(GIVEN.means("mha_depth"), [2, 0.2, 0])
    np.testing.assert_allclose(GIVEN.means("visual_tokens"), [2.5, 1.75 / 3, 0])


def test_coordinates_are_the_tokens_that_were_kept() -> None:
    np.testing.assert_array_equal(GIVEN.coordinates("visual_tokens", 9), [2, 7, 9])
    np.testing.assert_array_equal(GIVEN.coordinates("visual_tokens", 2), [1, 2, 2])


def test_an_axis_that_was_not_measured_is_named() -> None:
    with pytest.raises(ValueError, match=r"axis 'mlp_depth' was not measured; .* mha_depth, visual_tokens"):
        GIVEN.array("mlp_depth")


def test_a_subset_holds_the_named_samples() -> None:
    part = GIVEN.subset([2, 0, 2])
    assert part.counts == (GIVEN.counts[2], GIVEN.counts[0], GIVEN.counts[2])
    assert part.digests == (GIVEN.digests[2], GIVEN.digests[0], GIVEN.digests[2])
    for axis in GIVEN.values:
        np.testing.assert_array_equal(part.array(axis), GIVEN.array(axis)[:, [2, 0, 2]])
    assert GIVEN.subset([0, 1, 2]) == GIVEN
    part.check()


# --- JSON


@given(random_divergences())
def test_json_round_trip(divergences: Divergences) -> None:
    text = divergences.to_json()
    again = Divergences.from_json(text)
    assert again == divergences
    assert again.to_json() == text


def test_json_round_trip_of_every_field() -> None:
    again = Divergences.from_json(GIVEN.to_json())
    assert again == GIVEN
    assert again.base.options == {"seed": 3, "share": 0.5}
    for axis, points in GIVEN.points.items():
        assert [type(point) for point in again.points[axis]] == [type(point) for point in points]


def test_counts_as_points_stay_counts() -> None:
    points = {"mha_depth": (3, 0), "visual_tokens": (6, 2)}
    again = Divergences.from_json(dataclasses.replace(GIVEN, points=points).to_json())
    assert [type(point) for point in again.points["visual_tokens"]] == [int, int]


DOCUMENT = json.loads(GIVEN.to_json())
FIELDS = [name for name in DOCUMENT if name not in ("format", "version")]


def changed(name: str, value: object) -> str:
    return json.dumps(DOCUMENT | {name: value})


def test_every_field_of_the_value_is_in_the_document() -> None:
    assert {field.name for field in dataclasses.fields(Divergences)} == set(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_named(name: str) -> None:
    text = json.dumps({key: value for key, value in DOCUMENT.items() if key != name})
    with pytest.raises(ValueError, match=rf"^here: {name}: unknown or missing"):
        Divergences.from_json(text, "here")


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("wrong", [None, True, -1, "", [], {}, [[1, 2]], {"mha_depth": 3}, {"a": [["x"]]}])
def test_a_field_of_another_type_is_named(name: str, wrong: object) -> None:
    if (name, wrong) in (("metric_options", {}), ("versions", {}), ("transferred", True)) or (
        name in ("prefills", "seed") and wrong == -1
    ):
        Divergences.from_json(changed(name, wrong))
        return
    if name == "metric_options" and isinstance(wrong, dict):
        return  # names of options are the metrics' own
    with pytest.raises(ValueError, match=rf"^divergences JSON: .*\b{name}\b"):
        Divergences.from_json(changed(name, wrong))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dims", lambda d: d | {"num_heads": 3}, r"dims: num_key_value_heads: .*divisor"),
        ("dims", lambda d: d | {"heads": 3}, r"dims: .*'heads'"),
        ("base", lambda d: d | {"num_layers": 3}, r"policy is for 3 layers, the model has 4"),
        ("base", lambda d: d | {"positions": "?"}, r"base: .*positions"),
        ("counts", lambda d: [[1, 2]], r"counts: "),
        ("counts", lambda d: [[1, -2, 3]] * 3, r"counts: .*got -2"),
        ("counts", lambda d: [[1, 0, 3]] * 3, r"counts: expected visual tokens"),
        ("counts", lambda d: [], r"counts: expected at least one sample"),
        ("points", lambda d: d | {"mha_deph": [1]}, r"points: .*'mha_deph'; did you mean 'mha_depth'"),
        ("points", lambda d: d | {"mha_depth": [0, 3]}, r"points\['mha_depth'\]: expected descending values"),
        ("points", lambda d: d | {"mha_depth": [5, 0]}, r"points\['mha_depth'\]: .*from 0 to 4"),
        ("points", lambda d: d | {"visual_tokens": [1.5, 0.5]}, r"points\['visual_tokens'\]: .*from 0 to 1"),
        ("points", lambda d: {"mha_depth": [3, 0]}, r"values: measured axes .* but points of \['mha_depth'\]"),
        ("points", lambda d: d | {"mha_depth": [3, 2, 0]}, r"values\['mha_depth'\]: expected 3 points x 3 samples"),
        ("values", lambda d: d | {"mha_depth": [[1, 2], [1, 2]]}, r"values\['mha_depth'\]: expected 2 points x 3"),
        ("values", lambda d: d | {"mha_depth": [["1", 2, 3], [1, 2, 3]]}, r"values: .*expected a number, got '1'"),
        ("counts", lambda d: d[:2], r"counts: expected one entry for each of 3 samples, got 2"),
        ("digests", lambda d: [], r"digests, counts: expected at least one sample"),
        ("versions", lambda d: {"torch": 2}, r"versions: expected a text, got 2"),
    ],
)
def test_parts_that_do_not_fit_are_named(name: str, change: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Divergences.from_json(changed(name, change(DOCUMENT[name])))


def test_files_of_the_first_version_tell_a_transfer_by_its_number_of_prompts() -> None:
    old = {name: value for name, value in DOCUMENT.items() if name != "transferred"} | {"version": 1}
    assert Divergences.from_json(json.dumps(old)) == GIVEN
    for counts in (old["counts"][:2], old["counts"] * 2):
        found = Divergences.from_json(json.dumps(old | {"counts": counts}))
        assert (found.transferred, found.sample_tokens) == (True, (8, 8, 8))
        assert Divergences.from_json(found.to_json()) == found
    with pytest.raises(ValueError, match="transferred: unknown or missing"):
        Divergences.from_json(json.dumps(old | {"transferred": False}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "this is not a file of divergences"),
        ("{}", "format: "),
        (Policy.full(4).to_json(), "format: "),
        (changed("version", 3), "version: this release reads versions 1 and 2"),
        (changed("version", "2"), "version: this release reads versions 1 and 2"),
        (changed("samples", 3), "samples: unknown or missing"),
        (changed("prefills", 7.125).replace("7.125", "NaN"), "got NaN"),
        (changed("prefills", 7.125).replace("7.125", "1e999"), "prefills: expected a finite number"),
        ('{"format": 1, ' + GIVEN.to_json()[1:], "format: the field is given twice"),
        ("[" * 100_000, "divergences JSON: "),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Divergences.from_json(text)


# --- files


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    GIVEN.subset([0]).save(path)
    GIVEN.save(str(path))
    assert Divergences.load(path) == GIVEN
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_failed_save_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    path = tmp_path / "d.json"
    GIVEN.save(path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        GIVEN.subset([0]).save(path)
    assert Divergences.load(path) == GIVEN
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"{}", b"\xff\xfe", GIVEN.to_json().encode()[:-9]])
def test_a_wrong_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "wrong.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^.*wrong\.json: "):
        Divergences.load(path)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        Divergences.load(tmp_path / "none.json")
