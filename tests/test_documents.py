"""Files of every format: those of today are read and written as they are, newer ones as far as they are understood."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dop_compile import Policy
from dop_compile.documents import Format, kept
from dop_compile.evaluation import Evaluation
from dop_compile.policy.tiers import TIERS_FILE, load_policies, save_policies
from dop_compile.search import Divergences, LatencyModel, OperationOrder

FILES = Path(__file__).parent / "files"
KINDS: dict[str, Any] = {
    "policy-2": Policy,
    "policy-3": Policy,
    "order-1": OperationOrder,
    "divergences-2": Divergences,
    "latency-2": LatencyModel,
    "evaluation-3": Evaluation,
}
"""Files that the first release wrote, by what they hold."""


def document_of(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((FILES / f"{name}.json").read_text())
    return document


def newer(name: str, version: object, **fields: Any) -> dict[str, Any]:
    return document_of(name) | {"version": version} | fields


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str, dict[str, Any]], Any]:
    def read(name: str, document: dict[str, Any]) -> Any:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(document))
        return KINDS[name].load(path)

    return read


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_today_is_read_and_written_as_it_is(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = KINDS[name].load(FILES / f"{name}.json")
    found.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == document_of(name)


def test_tiers_of_today(tmp_path: Path) -> None:
    (tmp_path / TIERS_FILE).write_text((FILES / "tiers-1.json").read_text())
    tiers = load_policies(tmp_path)
    assert list(tiers) == ["100%", "28%"]
    save_policies(tiers, tmp_path / "again")
    assert json.loads((tmp_path / "again" / TIERS_FILE).read_text()) == document_of("tiers-1")


def test_fields_of_newer_tiers_are_named_and_left_out(tmp_path: Path) -> None:
    (tmp_path / TIERS_FILE).write_text(json.dumps(newer("tiers-1", "1.1", later=1)))
    with pytest.warns(UserWarning, match=r"version 1\.1: later: not known to this release, which leaves them out"):
        assert list(load_policies(tmp_path)) == ["100%", "28%"]


@pytest.mark.parametrize("name", [name for name in KINDS if name != "policy-2"])
def test_fields_of_a_newer_minor_version_are_named_and_kept(name: str, load: Any, tmp_path: Path) -> None:
    version = f"{document_of(name)['version']}.4"
    with pytest.warns(UserWarning, match=rf"version {version}: later, more: not known to this release"):
        found = load(name, newer(name, version, later=[1, {"a": None}], more="x"))
    assert found == KINDS[name].load(FILES / f"{name}.json"), "what is known is read as ever"
    found.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == newer(name, version, later=[1, {"a": None}], more="x")


def test_a_newer_policy_without_a_measured_divergence_can_be_read_again(load: Any, tmp_path: Path) -> None:
    """Of this release it would be written in an older version, which has no such field."""
    document = newer("policy-3", "3.1", later=1)
    document["provenance"]["measured_divergence"] = None
    with pytest.warns(UserWarning, match="later"):
        found = load("policy-3", document)
    found.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == document


def test_a_policy_that_was_changed_is_one_of_this_release(load: Any) -> None:
    with pytest.warns(UserWarning, match="later"):
        found = load("policy-3", newer("policy-3", "3.1", later=1))
    assert "later" in found.to_json()
    changed = found.replace(visual_tokens=5)
    assert not kept(changed)
    assert json.loads(changed.to_json())["version"] == 3


@pytest.mark.parametrize("name", KINDS)
def test_a_newer_major_version_is_refused(name: str, load: Any) -> None:
    for version in (
        document_of(name)["version"] + 7,
        f"{document_of(name)['version'] + 7}.1",
        "1.x",
        "2",
        True,
        None,
        1.5,
    ):
        with pytest.raises(ValueError, match=r"version: this release reads versions? [\d, and]+, got .*; \w+.* again"):
            load(name, newer(name, version))


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("evaluation")])
def test_an_unknown_field_of_a_version_that_is_known_is_refused(name: str, load: Any) -> None:
    with pytest.raises(ValueError, match="later"):
        load(name, newer(name, document_of(name)["version"], later=1))


@pytest.mark.parametrize("name", KINDS)
def test_another_kind_is_refused(name: str, load: Any) -> None:
    with pytest.raises(ValueError, match=r"format: expected 'dop_compile\.\w+', got 'other'; this is not (a|the) "):
        load(name, document_of(name) | {"format": "other"})


def test_minor_versions_are_those_of_the_newest_major() -> None:
    """An older release's documents are known for good: it has no later minor versions."""
    kind = Format("x", (1, 2), "an x", "make it again")
    assert kind.header() == {"format": "x", "version": 2}
    assert kind.open({"format": "x", "version": 1, "a": 0}).fields == {"a": 0}
    assert kind.open({"format": "x", "version": "2.0", "a": 0}).newer is None
    with pytest.raises(ValueError, match=r"reads versions 1 and 2, got '1\.1'; make it again"):
        kind.open({"format": "x", "version": "1.1"})
