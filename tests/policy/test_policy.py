"""Policies: one canonical value whatever way it was written, strict JSON, atomic files, errors that help."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dop_compile.policy.operations import MODULES, Operation
from dop_compile.policy.policy import Policy
from dop_compile.policy.provenance import Provenance
from tests.strategies import policies

PUBLISHED = Policy.depthwise(
    32,
    mha_depth=26,
    mlp_depth=19,
    visual_tokens=97,
    reducer="cdpruner",
    reducer_options={"tile": True, "ratio": 0.5},
    provenance=Provenance("f00d", 0.28, 0.125, 100, {"torch": "2.13.0", "dop_compile": "0.1.0"}),
)


# --- values


@given(policies(5, split=None, metadata=True))
def test_equal_policies_are_one_dictionary_key(policy: Policy) -> None:
    same = Policy.from_operations(
        policy.num_layers,
        sorted(policy.pruned, reverse=True) * 2,
        visual_tokens=policy.visual_tokens,
        reducer=policy.reducer,
        reducer_options=dict(reversed(policy.reducer_options)),
        positions=policy.positions,
        salient_fraction=policy.salient_fraction,
        provenance=policy.provenance,
    )
    assert same == policy
    assert len({same, policy}) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 33},
        {"pruned": []},
        {"visual_tokens": 96},
        {"reducer": "uniform"},
        {"reducer_options": {}},
        {"positions": "compact"},
        {"salient_fraction": 0.25},
        {"provenance": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_field_takes_part_in_equality(changes: dict[str, Any]) -> None:
    other = PUBLISHED.replace(**changes)
    assert other != PUBLISHED
    assert len({other, PUBLISHED}) == 2
    assert set(changes) == {f.name for f in dataclasses.fields(Policy)} & set(changes)


def test_a_policy_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PUBLISHED.num_layers = 3  # type: ignore[misc]
    PUBLISHED.options["ratio"] = 0.9
    assert PUBLISHED.options["ratio"] == 0.5


def test_full() -> None:
    full = Policy.full(3)
    assert full == Policy.from_operations(3, pruned=[]) == Policy.depthwise(3, mha_depth=3, mlp_depth=3)
    assert full.is_full
    assert not full.replace(visual_tokens=0).is_full
    assert not full.replace(pruned=[("text", 2, "mlp")]).is_full


@given(st.integers(1, 6), st.data())
def test_depths_keep_the_first_layers(layers: int, data: st.DataObject) -> None:
    def draw_depth() -> int | None:
        return data.draw(st.none() | st.integers(0, layers))

    mha, query, key_value, mlp, system_mha, system_mlp = (draw_depth() for _ in range(6))
    policy = Policy.depthwise(
        layers,
        mha_depth=mha,
        mha_query_depth=query,
        mha_key_value_depth=key_value,
        mlp_depth=mlp,
        system_mha_depth=system_mha,
        system_mlp_depth=system_mlp,
    )
    depths = {
        ("visual", "mha_query"): mha if query is None else query,
        ("visual", "mha_key_value"): mha if key_value is None else key_value,
        ("visual", "mlp"): mlp,
        ("system", "mha_query"): system_mha,
        ("system", "mha_key_value"): system_mha,
        ("system", "mlp"): system_mlp,
    }
    by_hand = [
        (group, layer, module)
        for (group, module), depth in depths.items()
        for layer in range(layers)
        if depth is not None and layer >= depth
    ]
    assert policy == Policy.from_operations(layers, by_hand)
    for group in (*policy.groups, "output"):
        for module in MODULES:
            depth = depths.get((group, module))
            kept = [layer for layer in range(layers) if policy.keeps(group, layer, module)]
            assert kept == list(range(layers if depth is None else depth))
            assert policy.pruned_layers(group, module) == tuple(range(len(kept), layers))


def test_mha_is_both_attention_parts() -> None:
    assert Policy.from_operations(4, [("visual", 1, "mha")]) == Policy.from_operations(
        4, [("visual", 1, "mha_query"), Operation("visual", 1, "mha_key_value")]
    )


def test_visual_is_both_parts_of_a_split_group() -> None:
    policy = Policy.from_operations(4, [("visual", 1, "mlp"), ("visual_rest", 2, "mlp")], salient_fraction=0.25)
    assert policy.groups == ("system", "visual_salient", "visual_rest", "text")
    assert policy.pruned_layers("visual_salient", "mlp") == (1,)
    assert policy.pruned_layers("visual_rest", "mlp") == (1, 2)
    assert Policy.full(4).groups == ("system", "visual", "text")
    split_later = Policy.depthwise(4, mlp_depth=3).replace(salient_fraction=0.25)
    assert split_later.pruned_layers("visual_salient", "mlp") == (3,)


def test_generated_tokens_are_processed_in_full() -> None:
    policy = Policy.from_operations(2, [(g, n, "mha") for g in ("system", "visual", "text") for n in (0, 1)])
    assert all(policy.keeps("output", n, module) for n in (0, 1) for module in MODULES)
    assert policy.pruned_layers("output", "mlp") == ()


# --- errors at the door


def depthwise(**changes: Any) -> Callable[[], Policy]:
    return lambda: Policy.depthwise(4, **changes)


def operation(*given: Any, **changes: Any) -> Callable[[], Policy]:
    return lambda: Policy.from_operations(4, [given], **changes)


NAN = float("nan")
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "no layers": (lambda: Policy.full(0), r"num_layers: expected an integer >= 1, got 0"),
    "layers bool": (lambda: Policy.full(True), r"num_layers: .*got True"),
    "depth too large": (depthwise(mha_depth=5), r"mha_depth: expected an integer from 0 to 4, .*got 5"),
    "overridden depth": (
        depthwise(mha_depth=5, mha_query_depth=1, mha_key_value_depth=1),
        r"mha_depth: .*got 5",
    ),
    "depth negative": (depthwise(mlp_depth=-1), r"mlp_depth: .*got -1"),
    "depth float": (depthwise(mha_query_depth=2.0), r"mha_query_depth: .*got 2\.0"),
    "depth nan": (depthwise(mha_key_value_depth=NAN), r"mha_key_value_depth: .*got nan"),
    "depth string": (depthwise(system_mha_depth="3"), r"system_mha_depth: .*got '3'"),
    "depth bool": (depthwise(system_mlp_depth=True), r"system_mlp_depth: .*got True"),
    "tokens negative": (depthwise(visual_tokens=-1), r"visual_tokens: .*or None \(keeps all\), got -1"),
    "tokens float": (depthwise(visual_tokens=9.5), r"visual_tokens: .*got 9\.5"),
    "reducer empty": (depthwise(reducer=""), r"reducer: .*got ''"),
    "reducer object": (depthwise(reducer=len), r"reducer: expected the name"),
    "options list": (depthwise(reducer_options=3), r"reducer_options: expected a mapping.*got 3"),
    "options value": (depthwise(reducer_options={"a": [1]}), r"reducer_options\['a'\]: .*got list"),
    "options nan": (depthwise(reducer_options={"a": NAN}), r"reducer_options\['a'\]: .*finite.*got nan"),
    "options key": (depthwise(reducer_options={3: 1}), r"reducer_options: .*string names"),
    "options twice": (
        depthwise(reducer_options=[("a", 1), ("a", 2)]),
        r"reducer_options: .*'a' is given twice",
    ),
    "positions": (depthwise(positions="compat"), r"positions: .*got 'compat'; did you mean 'compact'"),
    "positions object": (
        depthwise(positions=None),
        r"positions: expected one of original, compact, got None",
    ),
    "provenance": (depthwise(provenance={"budget": 1}), r"provenance: expected a Provenance.*got dict"),
    "group unknown": (operation("visal", 0, "mlp"), r"pruned: .*group: .*'visal'; did you mean 'visual'"),
    "group output": (
        operation("output", 0, "mlp"),
        r"'output' cannot be pruned, generated tokens are always",
    ),
    "group split": (operation("visual_rest", 0, "mlp"), r"'visual_rest' exists only with salient_fraction"),
    "group object": (operation(None, 0, "mlp"), r"pruned: .*group: expected one of .*got None"),
    "module unknown": (operation("text", 0, "mlpp"), r"module: .*got 'mlpp'; did you mean 'mlp'"),
    "layer too large": (operation("text", 4, "mlp"), r"pruned: .*layer: .*from 0 to 3, got 4"),
    "layer negative": (operation("text", -1, "mlp"), r"layer: .*got -1"),
    "layer bool": (operation("text", True, "mlp"), r"layer: .*got True"),
    "not a triple": (operation("text", 0), r"pruned: expected a \(group, layer, module\).*\('text', 0\)"),
    "a string": (lambda: Policy.from_operations(4, "abc"), r"pruned: expected .*got 'abc'"),
    "strings": (lambda: Policy.from_operations(4, ["abc"]), r"pruned: expected .*got 'abc'"),  # type: ignore
    "not operations": (lambda: Policy.from_operations(4, 7), r"pruned: expected .*got 7"),  # type: ignore
    "fraction zero": (operation("text", 0, "mlp", salient_fraction=0), r"salient_fraction: .*got 0"),
    "fraction one": (operation("text", 0, "mlp", salient_fraction=1.0), r"salient_fraction: .*got 1\.0"),
    "fraction nan": (operation("text", 0, "mlp", salient_fraction=NAN), r"salient_fraction: .*got nan"),
    "fraction string": (operation("text", 0, "mlp", salient_fraction="a"), r"salient_fraction: .*got 'a'"),
    "keeps group": (lambda: Policy.full(4).keeps("texts", 0, "mlp"), r"group: .*did you mean 'text'"),
    "keeps module": (lambda: Policy.full(4).keeps("text", 0, "mha"), r"module: .*got 'mha'"),
    "keeps layer": (lambda: Policy.full(4).keeps("output", 4, "mlp"), r"layer: .*from 0 to 3, got 4"),
    "pruned layers": (lambda: Policy.full(4).pruned_layers("text", "x"), r"module: .*got 'x'"),
    "keeps whole visual of a split": (
        lambda: Policy.full(4).replace(salient_fraction=0.5).keeps("visual", 0, "mlp"),
        r"'visual' is split by salient_fraction=0\.5; ask for visual_salient or visual_rest",
    ),
    "replace": (lambda: PUBLISHED.replace(mha_depth=3), r"mha_depth"),
    "other model": (
        lambda: PUBLISHED.check_layers(28),
        r"num_layers: the policy is for 32 layers, the model has 28",
    ),
    "fingerprint": (lambda: Provenance(model_fingerprint=""), r"model_fingerprint: .*got ''"),
    "budget zero": (lambda: Provenance(budget=0), r"budget: .*got 0"),
    "budget percent": (lambda: Provenance(budget=28), r"budget: expected a fraction.*got 28"),
    "budget bool": (lambda: Provenance(budget=True), r"budget: expected a number, got True"),
    "budget huge": (lambda: Provenance(budget=10**400), r"budget: expected a finite number"),
    "divergence": (lambda: Provenance(divergence=NAN), r"divergence: expected a finite number, got nan"),
    "samples": (lambda: Provenance(samples=0), r"samples: .*got 0"),
    "versions": (lambda: Provenance(versions={"torch": 2}), r"versions\['torch'\]: .*got 2"),  # type: ignore
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_name_the_field_and_what_was_given(case: str) -> None:
    attempt, message = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=message):
        attempt()


def test_the_right_depth_passes() -> None:
    PUBLISHED.check_layers(32)


# --- repr


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (
            PUBLISHED,
            "Policy(32 layers, visual keeps mha 0-25, mlp 0-18; visual_tokens=97, reducer='cdpruner', "
            "reducer_options={'ratio': 0.5, 'tile': True}, positions='original', budget=0.28)",
        ),
        (
            Policy.full(4),
            "Policy(4 layers, nothing pruned; visual_tokens=all, reducer='uniform', positions='original')",
        ),
        (
            Policy.from_operations(
                6,
                [
                    ("system", 3, "mlp"),
                    *(("visual_rest", n, "mha") for n in range(6)),
                    ("visual", 0, "mha_query"),
                ],
                visual_tokens=0,
                positions="compact",
                salient_fraction=0.25,
            ),
            "Policy(6 layers, system keeps mlp 0-2,4-5; visual_salient keeps mha_query 1-5; "
            "visual_rest keeps mha none; visual_tokens=0, reducer='uniform', positions='compact', "
            "salient_fraction=0.25)",
        ),
        (
            Policy.depthwise(4, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=2),
            "Policy(4 layers, visual keeps mha_query 0, mha_key_value 0-2, mlp 0-1; visual_tokens=all, "
            "reducer='uniform', positions='original')",
        ),
    ],
)
def test_repr_shows_the_kept_layers(policy: Policy, text: str) -> None:
    assert repr(policy) == text


# --- JSON


@given(policies(5, split=None, metadata=True))
def test_json_round_trip(policy: Policy) -> None:
    text = policy.to_json()
    again = Policy.from_json(text)
    assert again == policy
    assert again.to_json() == text
    for (name, value), (_, back) in zip(policy.reducer_options, again.reducer_options, strict=True):
        assert type(value) is type(back), name


def test_json_is_one_line_per_list_of_layers() -> None:
    assert '"mha_query": [26, 27, 28, 29, 30, 31],\n' in PUBLISHED.to_json()
    assert json.loads(PUBLISHED.to_json())["version"] == 2


def test_json_keeps_strings_that_look_like_lists() -> None:
    policy = Policy.full(2).replace(reducer_options={"a": "[\n 1,\n 2\n]", "b": "[ 1, 2 ]"})
    assert Policy.from_json(policy.to_json()) == policy


def fields_of(document: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in document.items():
        yield (*prefix, name)
        # The names in these two are the user's.
        if isinstance(value, dict) and name not in ("reducer_options", "versions"):
            yield from fields_of(value, (*prefix, name))


FIELDS = list(fields_of(json.loads(PUBLISHED.to_json())))


def mutated(path: tuple[str, ...], change: Callable[[dict[str, Any], str], None]) -> str:
    document = json.loads(PUBLISHED.to_json())
    parent = document
    for name in path[:-1]:
        parent = parent[name]
    change(parent, path[-1])
    return json.dumps(document)


def test_the_mutations_reach_every_field() -> None:
    assert len(FIELDS) == 11 + 3 + 9 + 5


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_a_missing_field_is_named(path: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^policy JSON: .*\b{path[-1]}\b"):
        Policy.from_json(mutated(path, lambda parent, name: parent.pop(name)))


@pytest.mark.parametrize("path", [p for p in FIELDS if len(p) == 1 or p[-1] == "mlp"], ids=".".join)
def test_an_unknown_field_is_named(path: tuple[str, ...]) -> None:
    def add(parent: dict[str, Any], name: str) -> None:
        parent[name + "s"] = parent[name]

    with pytest.raises(ValueError, match=rf"{path[-1]}s: unknown field.*did you mean '{path[-1]}'"):
        Policy.from_json(mutated(path, add))


LEGAL = [("reducer", "?"), ("model_fingerprint", "?"), ("divergence", 1.5), ("divergence", -1)]
RETYPED = [
    pytest.param(path, wrong, id=f"{'.'.join(path)}-{wrong!r}")
    for path in FIELDS
    for wrong in (True, 1.5, [1.0], {"a": [1]}, "?", [[]], -1)
    if (path[-1], wrong) not in LEGAL
]


@pytest.mark.parametrize(("path", "wrong"), RETYPED)
def test_a_field_of_another_type_is_named(path: tuple[str, ...], wrong: object) -> None:
    with pytest.raises(ValueError, match=rf"^policy JSON: .*\b{path[-1]}\b"):
        Policy.from_json(mutated(path, lambda parent, name: parent.update({name: wrong})))


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_null_is_refused_where_nothing_else_means_all(path: tuple[str, ...]) -> None:
    text = mutated(path, lambda parent, name: parent.update({name: None}))
    if path[-1] in {"visual_tokens", "salient_fraction", "ranking", "provenance", "budget", "samples"} | {
        "divergence",
        "model_fingerprint",
    }:
        Policy.from_json(text)
    else:
        with pytest.raises(ValueError, match=rf"\b{path[-1]}\b"):
            Policy.from_json(text)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([3, 3], "increasing order, each once"),
        ([4, 3], "increasing order"),
        ([32], "from 0 to 31, got 32"),
        ([-1], "got -1"),
        ([True], "got True"),
        ([1.0], r"got 1\.0"),
    ],
)
def test_wrong_lists_of_layers_are_named(layers: list[Any], message: str) -> None:
    text = mutated(("pruned", "visual", "mlp"), lambda parent, name: parent.update({name: layers}))
    with pytest.raises(ValueError, match=rf"pruned\.visual\.mlp: .*{message}"):
        Policy.from_json(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "format: expected 'dop_compile.policy', got None"),
        ("[" * 100_000, "policy JSON"),
        (PUBLISHED.to_json() + "x", "not JSON"),
        (PUBLISHED.to_json().replace("0.125", "NaN"), "got NaN"),
        (PUBLISHED.to_json().replace("0.125", "-Infinity"), "got -Infinity"),
        (PUBLISHED.to_json().replace("0.125", "1e999"), "divergence: expected a finite number"),
        (
            PUBLISHED.to_json().replace("0.5", "1e999"),
            r"reducer_options\['ratio'\]: expected a finite number",
        ),
        (PUBLISHED.to_json().replace("0.125", "9" * 5000), "policy JSON"),
        (
            PUBLISHED.to_json().replace('"version": 2', '"version": 4'),
            "version: this release reads versions 1, 2 and 3, got 4",
        ),
        (PUBLISHED.to_json().replace('"version": 2', '"version": 2.0'), "version: .*got 2.0"),
        (PUBLISHED.to_json().replace('"version": 2', '"version": 1'), "unknown field.*ranking"),
        (PUBLISHED.to_json().replace("policy", "polity"), "format: .*got 'dop_compile.polity'"),
        (PUBLISHED.to_json().replace('"version": 2', '"version": 2, "version": 2'), "version: .*given twice"),
        (PUBLISHED.to_json().replace('"tile"', '"ratio"'), "ratio: .*given twice"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy.from_json(text)


def test_a_measured_divergence_is_kept_beside_the_predicted_one() -> None:
    """Only then the file is one that earlier releases do not read."""
    assert PUBLISHED.provenance is not None
    policy = PUBLISHED.replace(provenance=dataclasses.replace(PUBLISHED.provenance, measured_divergence=0.5))
    document = json.loads(policy.to_json())
    assert document["version"] == 3
    assert (document["provenance"]["divergence"], document["provenance"]["measured_divergence"]) == (0.125, 0.5)
    assert Policy.from_json(policy.to_json()) == policy
    with pytest.raises(ValueError, match="measured_divergence: unknown field"):
        Policy.from_json(policy.to_json().replace('"version": 3', '"version": 2'))


def test_a_policy_knows_which_model_it_was_made_for() -> None:
    policy = Policy.full(3).replace(provenance=Provenance("a" * 64))
    policy.check_model(3, "a" * 64)
    Policy.full(3).check_model(3, "b" * 64)
    with pytest.raises(
        ValueError, match=r"made for another model \(fingerprint aaaaaaaaaaaa, this model has bbbbbbbbbbbb"
    ):
        policy.check_model(3, "b" * 64)
    with pytest.raises(ValueError, match="the policy is for 3 layers, the model has 4"):
        policy.check_model(4, "a" * 64)


def test_version_1_had_no_rankings() -> None:
    text = PUBLISHED.to_json().replace('"version": 2', '"version": 1').replace('  "ranking": null,\n', "")
    assert Policy.from_json(text) == PUBLISHED


@given(policies(3, split=None), st.data())
def test_truncated_json_is_refused(policy: Policy, data: st.DataObject) -> None:
    text = policy.to_json()
    with pytest.raises(ValueError, match=r"^policy JSON: "):
        Policy.from_json(text[: data.draw(st.integers(0, len(text) - 1))])


# --- files


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    Policy.full(3).save(path)
    PUBLISHED.save(str(path))
    assert Policy.load(path) == PUBLISHED
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_failed_save_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    path = tmp_path / "p.json"
    PUBLISHED.save(path)

    def fail(*_: object) -> None:
        # The new text must not be in place before it is known to be on the disk.
        assert Policy.load(path) == PUBLISHED
        raise OSError("disk full")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        Policy.full(3).save(path)
    assert Policy.load(path) == PUBLISHED
    assert list(tmp_path.iterdir()) == [path]


def test_saving_into_nowhere_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        PUBLISHED.save(tmp_path / "missing" / "p.json")
    assert list(tmp_path.iterdir()) == []


def test_save_follows_links_and_the_umask(tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "p.json")
    previous = os.umask(0o027)
    try:
        PUBLISHED.save(link)
    finally:
        os.umask(previous)
    assert link.is_symlink()
    assert (tmp_path / "p.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("content", [b"{}", b"\xff\xfe", PUBLISHED.to_json().replace("97", "-97").encode()])
def test_a_wrong_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "wrong.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^policy file .*wrong\.json: "):
        Policy.load(path)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        Policy.load(tmp_path / "none.json")


def test_notebooks_show_the_layers_that_are_kept() -> None:
    shown = Policy.depthwise(4, mha_query_depth=1, mlp_depth=0)._repr_html_()
    assert "<tr><th>visual</th><td>0</td><td>0-3</td><td>none</td></tr>" in shown
    assert "<tr><th>text</th><td>0-3</td><td>0-3</td><td>0-3</td></tr>" in shown
