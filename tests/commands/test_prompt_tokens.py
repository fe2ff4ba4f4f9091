"""The prompt that `explain` is asked about: its tokens are those of the processor's own output, or asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from digits_vlm import data, models
from dop_compile.commands import prompt_tokens
from dop_compile.commands.usage import UsageError
from tests.command_line import refused, run

CHECKPOINTS = Path(models.__file__).parent / "checkpoints"
LLAVA, QWEN = str(CHECKPOINTS / "llava"), str(CHECKPOINTS / "qwen2_5_vl")
POLICY = ("--mha-depth", "6", "--mlp-depth", "2", "--visual-tokens", "60")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for number, example in enumerate(data.examples("validation", 3, seed=7)):
        example.image.save(folder / f"{number}.png")
        question = example.prompt.split("<image> ")[1].removesuffix(" Answer:")
        lines.append(json.dumps({"image": f"{number}.png", "prompt": question}))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def explained(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    code, out, err = run(capsys, "explain", *argv, "--json")
    assert code == 0, err
    return dict(json.loads(out))


def counts(found: dict[str, Any]) -> tuple[int, int, int]:
    return found["system"], found["visual"], found["text"]


def of_reader(name: str, prompt: str, image: Any) -> tuple[int, int, int]:
    ids = models.Reader(Path(name))([image], [prompt])["input_ids"][0]
    (places,) = (ids == models.IMAGE).nonzero(as_tuple=True)
    return int(places[0]), len(places), len(ids) - int(places[0]) - len(places)


@pytest.mark.parametrize("name", [LLAVA, QWEN])
def test_an_image_and_a_prompt_are_counted(capsys: pytest.CaptureFixture[str], folder: Path, name: str) -> None:
    example = next(data.examples("validation", 1, seed=7))
    question = example.prompt.split("<image> ")[1].removesuffix(" Answer:")
    ask = ["--image", str(folder / "0.png"), "--prompt", question]
    found = explained(capsys, name, *POLICY, *ask)
    assert counts(found) == of_reader(name, example.prompt, example.image)
    assert found["counts"] == "system, visual, text tokens of --image and --prompt"
    partly = explained(capsys, name, *POLICY, *ask, "--text", "50")
    assert counts(partly) == (*counts(found)[:2], 50)
    assert partly["tiers"] != found["tiers"]


def test_samples_are_counted_by_their_mean(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    found = explained(capsys, QWEN, *POLICY, "--samples", str(folder / "samples.jsonl"))
    each = [of_reader(QWEN, example.prompt, example.image) for example in data.examples("validation", 3, seed=7)]
    assert counts(found) == tuple(round(sum(column) / 3) for column in zip(*each, strict=True))
    assert "the mean of 3 samples" in found["counts"]


def test_a_checkpoint_with_its_processor_explains_a_short_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    found = explained(capsys, LLAVA, *POLICY)
    blank = prompt_tokens.BLANK.resize((data.CANVAS, data.CANVAS))
    prompt = data.prompt(prompt_tokens.QUESTION)
    assert counts(found) == of_reader(LLAVA, prompt, blank)
    assert "visual tokens of one picture by the configuration, 96 x 96 pixels in patches of 8 x 8" in found["counts"]
    assert "system and text tokens of the prompt 'Describe the picture.'" in found["counts"]
    # A prompt alone is asked about a blank picture, as all pictures are alike
    assert counts(explained(capsys, LLAVA, *POLICY, "--prompt", prompt_tokens.QUESTION)) == counts(found)
    several = explained(capsys, LLAVA, *POLICY, "--visual", "288", "--system", "5")
    assert counts(several) == (5, 288, counts(found)[2])


def test_a_configuration_alone_is_explained_with_assumed_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((Path(LLAVA) / "config.json").read_text())
    for where in (tmp_path, tmp_path / "config.json"):
        found = explained(capsys, str(where), *POLICY)
        assert counts(found) == (35, 144, 100)
        assert "system and text tokens assumed" in found["counts"]
    assert counts(explained(capsys, str(Path(LLAVA) / "config.json"), *POLICY)) == counts(
        explained(capsys, LLAVA, *POLICY)
    )


def test_a_picture_smaller_than_the_policy_keeps_is_whole(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    found = explained(capsys, QWEN, "--image", str(folder / "0.png"), "--visual-tokens", "97")
    assert found["entering"] == found["visual"] == 64
    assert found["counts"].endswith("tiers that keep more than 64 visual tokens: policy")


def test_numbers_that_no_picture_has_are_refused(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    def answer(*argv: str) -> str:
        return refused(capsys, "explain", *argv)

    assert "expected 144 for each picture" in answer(LLAVA, "--visual", "500")
    message = answer(LLAVA, "--visual-tokens", "300")
    assert "keeps 300 visual tokens, and a picture of this model has 144" in message
    message = answer(QWEN, *POLICY)
    assert "depends on the picture: give --image FILE (and --prompt), --samples FILE, or --visual N" in message
    assert "depends on the picture" in answer(QWEN, *POLICY, "--prompt", "What?")
    assert "either samples or" in answer(QWEN, "--samples", "x", "--image", str(folder / "0.png"))
    assert "--samples 'none.jsonl'" in answer(QWEN, "--samples", "none.jsonl")
    assert "No such file" in answer(QWEN, "--image", "none.png")


def test_processors_tell_what_configurations_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = prompt_tokens._by_processor(LLAVA)
    assert fixed is not None
    assert fixed.count == 144
    assert prompt_tokens._by_processor(QWEN) is None

    def fail(model: str) -> None:
        raise UsageError("none")

    monkeypatch.setattr(prompt_tokens, "load_processor", fail)
    assert prompt_tokens._by_processor(LLAVA) is None
