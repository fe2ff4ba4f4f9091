"""Compiled models saved and loaded again, and tiers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dop_compile as package
from dop_compile import Policy, dop_compile, from_pretrained, load_policies, push_policies, save_policies
from tests.families import FAMILIES
from tests.support import make_batch, shared_model

TIERS = {
    "100%": Policy.full(4),
    "half": Policy.depthwise(4, mha_query_depth=2, mlp_depth=1, visual_tokens=5, reducer="random"),
}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llama"])
def test_a_compiled_model_comes_back(name: str, tmp_path: Path) -> None:
    model = shared_model(name) if name in FAMILIES and name != "llama" else FAMILIES[name].build()
    layers = model.config.get_text_config().num_hidden_layers
    tiers = {"full": Policy.full(layers), "half": Policy.depthwise(layers, mha_query_depth=1, mlp_depth=1)}
    compiled = dop_compile(model, tiers, backend="eager")
    compiled.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "plain")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), "the model is saved as it is"
    again = from_pretrained(tmp_path, backend="eager")
    assert type(again) is type(model)
    assert again.dop.tiers == tiers
    batch = make_batch(name, [[("text", 3)]]) if name == "llama" else make_batch(name, [[("text", 2), ("image", 1)]])
    given = batch.call_arguments(None)
    for tier in tiers:
        with torch.no_grad():
            expected, found = (one(**batch.inputs, **given, tier=tier).logits for one in (compiled, again))
        assert torch.equal(found, expected)


def test_a_view_saves_all_tiers_and_its_own_first(tmp_path: Path) -> None:
    dop_compile(shared_model("llava"), TIERS, backend="eager").tier("half").save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, backend="eager")
    assert again.dop.tiers == TIERS
    assert again.dop_tier == "half"


def test_other_tiers_and_settings_can_be_given(tmp_path: Path) -> None:
    shared_model("llava").save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"dop_compile\.json"):
        from_pretrained(tmp_path, backend="eager")
    again = from_pretrained(tmp_path, tiers=TIERS["half"], backend="eager", dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert again.dop.tiers == {"default": TIERS["half"]}
    with pytest.raises(ValueError, match="the policy is for 9 layers"):
        from_pretrained(tmp_path, tiers=Policy.full(9), backend="eager")


def test_policies_alone(tmp_path: Path) -> None:
    path = save_policies(TIERS, tmp_path / "new")
    assert [file.name for file in path.parent.iterdir()] == ["dop_compile.json"]
    found = load_policies(tmp_path / "new")
    assert found == TIERS
    assert list(found) == list(TIERS), "the first is the default"
    save_policies(TIERS["half"], tmp_path / "new")
    assert load_policies(tmp_path / "new") == {"default": TIERS["half"]}


def test_policies_are_pushed_as_they_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a folder in place of a repository."""
    import huggingface_hub

    def upload(self: Any, *, path_or_fileobj: Any, path_in_repo: str, repo_id: str, **settings: Any) -> str:
        (tmp_path / repo_id).mkdir(parents=True)
        (tmp_path / repo_id / path_in_repo).write_bytes(path_or_fileobj.read())
        return str(settings["commit_message"])

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_file", upload)
    assert push_policies(TIERS, "me/tiers") == "Policies of dop_compile"
    assert push_policies(TIERS, "me/more", commit_message="new") == "new"
    assert load_policies(tmp_path / "me" / "tiers") == TIERS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a file of tiers"),
        ({"version": 99}, "reads version 1, got 99"),
        ({"more": 1}, "more: unknown or missing"),
        ({"tiers": {}}, "expected policies by name"),
        ({"tiers": {"a": {}}}, r"tiers\['a'\]"),
    ],
)
def test_wrong_files_are_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = save_policies(TIERS, tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=rf"dop_compile\.json: .*{message}"):
        load_policies(tmp_path)


def test_nothing_is_written_of_wrong_tiers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one policy"):
        save_policies({}, tmp_path)
    with pytest.raises(TypeError, match=r"tiers\['a'\]: expected a Policy, got int"):
        save_policies({"a": 3}, tmp_path)  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


def test_public_names() -> None:
    assert {"from_pretrained", "load_policies", "push_policies", "save_policies"} <= set(package.__all__)
