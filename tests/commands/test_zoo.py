"""`dop-compile zoo`, and published policies where a policy's file is expected."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers as hf

from dop_compile import Policy, dop_compile, push_policies
from dop_compile.commands import evaluate, measuring
from dop_compile.commands.policies import load_policy
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.policy.hub import HubPolicies, pushed_policies
from dop_compile.zoo import published_policies
from tests.command_line import refused, run
from tests.local_llava import local_llava, local_processor, picture


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The configuration of LLaVA-1.5-7B."""
    folder = tmp_path_factory.mktemp("llava")
    hf.LlavaConfig(dtype="float16").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("small")
    local_llava(layers=2, hidden=32, image_size=28).save_pretrained(folder)
    return str(folder)


def words(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_all_of_them_are_listed_with_costs_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "zoo")
    lines = words(out)
    assert code == 0
    for entry in published_policies():
        assert sum(line.startswith(f"{entry.name} {entry.budget} ") for line in lines) == 1
    assert "llava-1.5-7b 28% 27.6 % 28 % 97.9 % DOP + CDPruner DOP, Table 15" in lines
    assert "llava-1.5-7b shortv 59.7 % - - ShortV ShortV's code, Replaced Layers" in lines
    text = " ".join(lines)
    for said in ("Nothing was measured again here", "CLIP text model", "(compact)", "weights are the original ones"):
        assert said in text


def test_the_pages_table_is_todays(capsys: pytest.CaptureFixture[str]) -> None:
    table = run(capsys, "zoo")[1].partition("\n\n")[0]
    assert f"```text\n{table}\n```" in (Path(__file__).parents[2] / "docs" / "published.md").read_text()


def test_those_that_fit_a_configuration(capsys: pytest.CaptureFixture[str], llava: str, small: str) -> None:
    for where in (llava, f"{llava}/config.json"):
        code, out, _ = run(capsys, "zoo", "--model", where)
        assert code == 0
        budgets = [line.split()[1] for line in words(out) if line.startswith("llava-1.5-7b ")]
        assert budgets == ["37%", "28%", "23%", "shortv"]
        assert "llava-next" not in out
        assert "DOP + resize" not in out
        assert "weights were not compared" in " ".join(words(out))
    code, out, _ = run(capsys, "zoo", "--model", small)
    assert code == 0
    assert f"no published policy fits {small}. The nearest model is llava-1.5-7b" in out
    assert "num_hidden_layers 2 instead of 32" in out
    assert "no such directory" in refused(capsys, "zoo", "--model", "./none")


def test_one_is_shown_and_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    show = ["zoo", "show", "llava-1.5-7b", "28%"]
    code, out, _ = run(capsys, *show)
    assert code == 0
    assert repr(Policy.published("llava-1.5-7b", "28%")) in out
    lines = words(out)
    assert "0-18 232 232 232 94.8 GFLOPs" in lines
    assert "19-25 232 232 135 68.5 GFLOPs" in lines
    assert "26-31 135 135 135 54.9 GFLOPs" in lines
    text = " ".join(lines)
    assert "27.6 % of the original's, for 35 system + 576 visual (97 enter) + 100 text tokens" in text
    assert "FLOPs 28 %; accuracy 97.9 % of the original's (DOP, Table 8). Nothing was measured again here" in text
    assert "DOP + CDPruner (DOP, arXiv 2507.02909; DOP, Table 15)" in text
    file = tmp_path / "policy.json"
    code, _, err = run(capsys, *show, "--out", str(file))
    assert code == 0
    assert f"saved policy zoo:llava-1.5-7b/28% to {file}" in err
    assert Policy.load(file) == Policy.published("llava-1.5-7b", "28%")
    assert "--force" in refused(capsys, *show, "--out", str(file))
    assert run(capsys, *show, "--out", str(file), "--force")[0] == 0


def test_shortv_is_shown_without_numbers_that_are_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "zoo", "show", "llava-1.5-7b", "shortv")
    assert code == 0
    assert "FLOPs not known. Nothing was measured again" in " ".join(words(out))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["show", "llava", "28%"], "name: expected one of llava-1.5-7b, llava-1.5-13b"),
        (["show", "llava-1.5-7b", "29%"], "expected one of 37%, 28%, 23%, shortv"),
        (["show", "llava-next-13b", "23%"], "misprint"),
        (["show", "llava-1.5-7b", "28%", "--force"], "nothing is written without --out"),
        (["--hub", "show", "llava-1.5-7b", "28%"], "--hub: show prints the policy that is named"),
        (["--model", "x", "show", "llava-1.5-7b", "28%"], "--model: show prints the policy that is named"),
        (["--hub", "--model", "x"], "--model: repositories of the hub are not compared"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    assert said in refused(capsys, "zoo", *argv)


# --- in place of a file


def test_explain_takes_them_by_name(capsys: pytest.CaptureFixture[str], llava: str, tmp_path: Path) -> None:
    run(capsys, "zoo", "show", "llava-1.5-7b", "28%", "--out", str(tmp_path / "28%.json"))
    counts = ("--system", "35", "--text", "100")
    by_name = run(capsys, "explain", llava, "--policy", "zoo:llava-1.5-7b/28%", *counts)
    assert by_name[0] == 0
    assert by_name == run(capsys, "explain", llava, "--policy", str(tmp_path / "28%.json"), *counts)
    assert "tier '28%'" in by_name[1]
    code, out, _ = run(capsys, "explain", llava, "--policy", "fast=zoo:llava-1.5-7b/shortv", *counts)
    assert code == 0
    assert "tier 'fast'" in out


def test_names_that_do_not_fit_are_refused(capsys: pytest.CaptureFixture[str], llava: str, small: str) -> None:
    message = refused(capsys, "explain", llava, "--policy", "zoo:llava-1.5-13b/28%")
    assert "policy 'zoo:llava-1.5-13b/28%'" in message
    assert "published for llava-hf/llava-1.5-13b-hf" in message
    assert "num_hidden_layers 32 instead of 40" in message
    message = refused(capsys, "bench", small, "--policy", "zoo:llava-1.5-7b/28%")
    assert "num_hidden_layers 2 instead of 32" in message
    message = refused(capsys, "run", small, "--prompt", "x", "--policy", "zoo:llava-1.5-7b/30%")
    assert "expected one of 37%, 28%, 23%, shortv" in message
    assert "expected zoo:NAME/BUDGET" in refused(capsys, "explain", llava, "--policy", "zoo:llava-1.5-7b")


def test_eval_takes_them_by_name(capsys: pytest.CaptureFixture[str], small: str, tmp_path: Path) -> None:
    argv = ["eval", small, "--samples", "none.jsonl", "--out", str(tmp_path), "--policy", "zoo:llava-1.5-7b/28%"]
    message = refused(capsys, *argv)
    assert "--policy 'zoo:llava-1.5-7b/28%'" in message
    assert "num_hidden_layers 2 instead of 32" in message
    assert vars(evaluate)["load_policy"] is load_policy


def test_report_takes_them_for_the_decoder_that_was_measured() -> None:
    dims = DecoderDims.from_config(hf.LlavaConfig())
    measured: Any = SimpleNamespace(dims=dims)
    assert measuring._policy_of(measured, "zoo:llava-1.5-7b/28%") == Policy.published("llava-1.5-7b", "28%")
    measured.dims = dataclasses.replace(dims, hidden_size=2048)
    with pytest.raises(ValueError, match="divergences are of another decoder"):
        measuring._policy_of(measured, "zoo:llava-1.5-7b/28%")


@torch.no_grad()
def test_a_written_policy_runs_on_a_model_of_its_depth(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As any other file: nothing but the depth is compared. 97 of 100 visual tokens enter."""
    run(capsys, "zoo", "show", "llava-1.5-7b", "28%", "--out", str(tmp_path / "policy.json"))
    model = local_llava(layers=32, hidden=32, image_size=140)
    compiled = dop_compile(model, Policy.load(tmp_path / "policy.json"), backend="eager")
    inputs = local_processor(140)(images=picture(), text="<image> What is this ?", return_tensors="pt")
    output = compiled(**inputs, use_cache=True)
    first, last = (output.past_key_values.layers[layer].keys.shape[2] for layer in (0, 31))
    assert first - last == 97


# --- the hub


def listed(**fields: Any) -> Any:
    given = {"siblings": [SimpleNamespace(rfilename="dop_compile.json")], "downloads": 3, **fields}
    return SimpleNamespace(**{"last_modified": datetime(2026, 5, 4, 23, tzinfo=UTC), **given})


def test_repositories_with_the_tag_and_tiers_are_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    models = [
        listed(id="a/few"),
        listed(id="b/many", downloads=70, last_modified=None),
        listed(id="c/other", siblings=[SimpleNamespace(rfilename="config.json")]),
        listed(id="d/empty", siblings=None),
    ]

    def list_models(self: Any, **settings: Any) -> list[Any]:
        asked.append(settings)
        return models

    monkeypatch.setattr(huggingface_hub.HfApi, "list_models", list_models)
    assert pushed_policies() == (HubPolicies("b/many", 70, "-"), HubPolicies("a/few", 3, "2026-05-04"))
    assert asked == [{"filter": "dop_compile", "full": True}]
    code, out, _ = run(capsys, "zoo", "--hub")
    assert code == 0
    assert words(out)[:3] == ["repository downloads changed", "b/many 70 -", "a/few 3 2026-05-04"]
    assert "load_policies(NAME)" in out
    models.clear()
    assert "no repository of the hub has the tag dop_compile" in run(capsys, "zoo", "--hub")[1]


@pytest.mark.parametrize("error", [ConnectionError("no route"), vars(huggingface_hub.errors)["HTTPError"]("no route")])
def test_a_hub_that_cannot_be_asked_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def list_models(self: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "list_models", list_models)
    assert "--hub: the hub cannot be asked for repositories tagged dop_compile (no route)" in refused(
        capsys, "zoo", "--hub"
    )


@pytest.mark.parametrize(
    ("card", "written"),
    [
        (None, [{"tags": ["dop_compile"]}]),
        (SimpleNamespace(tags=None), [{"tags": ["dop_compile"]}]),
        (SimpleNamespace(tags=["vlm"]), [{"tags": ["vlm", "dop_compile"]}]),
        (SimpleNamespace(tags=["dop_compile", "vlm"]), []),
    ],
)
def test_pushing_adds_the_tag_when_it_is_asked_to(
    monkeypatch: pytest.MonkeyPatch, card: Any, written: list[dict[str, Any]]
) -> None:
    updates: list[dict[str, Any]] = []

    def update(repo_id: str, metadata: dict[str, Any], *, overwrite: bool, token: str) -> None:
        assert (repo_id, overwrite, token) == ("me/tiers", True, "t")
        updates.append(metadata)

    def model_info(self: Any, repo_id: str, *, token: str) -> Any:
        assert (repo_id, token) == ("me/tiers", "t")
        return SimpleNamespace(card_data=card)

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_file", lambda self, **settings: settings["token"])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "metadata_update", update)
    assert push_policies(Policy.full(2), "me/tiers", token="t") == "t"
    assert not updates
    assert push_policies(Policy.full(2), "me/tiers", tag=True, token="t") == "t"
    assert updates == written
