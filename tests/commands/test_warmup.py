"""`dop-compile warmup`: what it warms and says, what it refuses, and that a second process finds what it compiled."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch._inductor import config as inductor

from dop_compile import Policy
from dop_compile.commands import warmup
from dop_compile.policy.tiers import save_policies
from tests.command_line import refused, run
from tests.local_llava import local_llava, local_processor, picture

LAYERS = 2
TINY = {"layers": LAYERS, "hidden": 32, "image_size": 56}
TIERS = {"full": Policy.full(LAYERS), "few": Policy.depthwise(LAYERS, mlp_depth=1, visual_tokens=5)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llava")
    local_llava(**TINY).save_pretrained(folder)
    local_processor(TINY["image_size"]).save_pretrained(folder)
    save_policies(TIERS, folder)
    return str(folder)


@pytest.fixture
def eagerly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The command without its compiler, and the folder that the environment names."""
    monkeypatch.setattr(warmup, "BACKEND", "eager")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "named"))
    return tmp_path / "named"


def kinds(text: str) -> list[list[str]]:
    """Tier, batch, tokens and padded of each line of the table."""
    return [line.split()[:4] for line in text.splitlines() if re.search(r" (yes|no) ", line)]


def test_all_tiers_of_the_model(capsys: pytest.CaptureFixture[str], model: str, eagerly: Path) -> None:
    argv = ["warmup", model, "--batch-sizes", "1", "3", "--text-lengths", "30", "--padded"]
    code, text, _ = run(capsys, *argv)
    assert code == 0
    found = kinds(text)
    assert [kind[:2] + kind[3:] for kind in found] == [
        [tier, size, pads] for tier in TIERS for size in ("1", "3") for pads in ("no", "yes")
    ]
    assert len({kind[2] for kind in found}) == 2, "with and without padding"
    assert f"TORCHINDUCTOR_CACHE_DIR={eagerly}" in text
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(eagerly)


def test_chosen_tiers_images_and_folder(
    capsys: pytest.CaptureFixture[str], model: str, eagerly: Path, tmp_path: Path
) -> None:
    path = tmp_path / "photo.png"
    picture().save(path)
    folder = tmp_path / "kept"
    argv = ["warmup", model, "--tiers", "few", "--image", str(path), "--image", str(path), "--cache", str(folder)]
    code, text, _ = run(capsys, *argv)
    _, of_one, _ = run(capsys, "warmup", model, "--tiers", "few")
    assert code == 0
    ((tier, _, tokens, _),) = kinds(text)
    assert tier == "few"
    visual = (TINY["image_size"] // 14) ** 2
    assert int(tokens) > int(kinds(of_one)[0][2]) + visual - 1
    assert f"TORCHINDUCTOR_CACHE_DIR={folder}" in text
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--tiers", "fast"], "--tiers: 'fast' is not one of the tiers (full, few)"),
        (["--text-lengths", "1"], "text_lengths: the prompt given has"),
        (["--image", "none.png"], "image 'none.png': No such file"),
        (["--device", "abacus"], "--device 'abacus'"),
    ],
)
@pytest.mark.usefixtures("eagerly")
def test_what_is_refused(capsys: pytest.CaptureFixture[str], model: str, argv: list[str], says: str) -> None:
    assert says in refused(capsys, "warmup", model, *argv)


@pytest.mark.usefixtures("eagerly")
def test_a_model_without_tiers_needs_a_policy(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    local_llava(**TINY).save_pretrained(tmp_path)
    local_processor(TINY["image_size"]).save_pretrained(tmp_path)
    assert "no policy: give --policy FILE" in refused(capsys, "warmup", str(tmp_path))
    assert run(capsys, "warmup", str(tmp_path), "--mlp-depth", "1")[0] == 0


@pytest.mark.usefixtures("eagerly")
def test_nothing_is_warmed_that_would_not_be_kept(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    message = refused(capsys, "warmup", model, "--cache", str(tmp_path / "file"))
    assert f"--cache '{tmp_path / 'file'}': cannot write there: Not a directory" in message
    for setting in ({"force_disable_caches": True}, {"fx_graph_cache": False}):
        with inductor.patch(setting):
            assert "turned off" in refused(capsys, "warmup", model)


SECOND = """
import sys
import torch
from dop_compile import from_pretrained
from torch._dynamo.utils import counters
from tests.local_llava import PROMPT, local_processor, picture

model = from_pretrained(sys.argv[1])
inputs = local_processor(56)(images=picture(), text=PROMPT, return_tensors="pt")
with torch.no_grad():
    model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, tier="few")
print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.inductor
def test_a_second_process_compiles_nothing(model: str, tmp_path: Path) -> None:
    variables: dict[str, Any] = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "other")}
    command = [sys.executable, "-m", "dop_compile.cli", "warmup", model, "--tiers", "few"]
    command += ["--cache", str(tmp_path / "kept")]
    first = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
    (compiled,) = re.findall(r"^(\d+) graphs were compiled, 0 were there already$", first, re.MULTILINE)
    assert int(compiled) > LAYERS
    variables["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "kept")
    command = [sys.executable, "-c", SECOND, model]
    second = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
    assert second.split()[-2:] == ["0", compiled]
    assert not (tmp_path / "other" / "fxgraph").exists(), "torch makes the folder itself when it is imported"
