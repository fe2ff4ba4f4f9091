"""The command line in-process, on a tiny LLaVA that was saved with its processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dop_compile import Policy
from dop_compile.cli import main
from dop_compile.commands import inputs as cli_inputs
from tests.command_line import refused, run
from tests.families import FAMILIES
from tests.local_llava import local_llava, local_processor, picture

LAYERS = 4
TINY: dict[str, Any] = {"layers": LAYERS, "hidden": 64, "image_size": 56}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llava")
    local_llava(**TINY).save_pretrained(folder)
    local_processor(TINY["image_size"]).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("image") / "photo.png"
    picture().save(path)
    return str(path)


@pytest.fixture
def policy(tmp_path: Path) -> str:
    path = tmp_path / "small.json"
    Policy.depthwise(LAYERS, mha_query_depth=1, mha_key_value_depth=3, mlp_depth=1, visual_tokens=5).save(path)
    return str(path)


# --- help


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--help"], "A policy says how many visual tokens"),
        (["explain", "--help"], "executed FLOPs  what is left"),
        (["run", "--help"], "chat template"),
        (["demo", "--help"], "scans that it was not trained on"),
    ],
)
def test_help_teaches(capsys: pytest.CaptureFixture[str], argv: list[str], text: str) -> None:
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert text in out
    assert "examples:" in out


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "required"),
        (["explode"], "invalid choice"),
        (["explain"], "MODEL"),
        (["explain", "x", "--mha-depth", "-1"], "expected a number >= 0, got -1"),
        (["explain", "x", "--mha-depth", "many"], "invalid whole number value"),
        (["run", "x", "--prompt", "y", "--max-new-tokens", "0"], "expected a number >= 1, got 0"),
    ],
)
def test_wrong_usage_is_code_2(capsys: pytest.CaptureFixture[str], argv: list[str], text: str) -> None:
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert text in err


# --- explain


def test_explain_needs_no_weights(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path, policy: str) -> None:
    alone = tmp_path / "config.json"
    alone.write_text((Path(model) / "config.json").read_text())
    tail = ["--policy", policy, "--system", "35", "--text", "100"]
    outputs = [run(capsys, "explain", where, *tail) for where in (model, str(tmp_path), str(alone))]
    assert [code for code, _, _ in outputs] == [0, 0, 0]
    assert outputs[0] == outputs[1] == outputs[2]
    assert "visual frozen" in outputs[0][1]


def test_explain_json_of_depths_equals_that_of_the_saved_policy(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    saved = tmp_path / "policy.json"
    options = ["--mha-depth", "3", "--mlp-depth", "2", "--visual-tokens", "7", "--positions", "compact"]
    counts = ["--system", "3", "--visual", "16", "--text", "4", "--rows", "2", "--json"]
    code, out, err = run(capsys, "explain", model, *options, *counts, "--save-policy", str(saved))
    assert (code, str(saved) in err) == (0, True)
    expected = Policy.depthwise(LAYERS, mha_depth=3, mlp_depth=2, visual_tokens=7, positions="compact")
    assert Policy.load(saved) == expected
    result = json.loads(out)
    assert [layer["mlp"] for layer in result["layers"]] == [14, 14, 7, 2]
    code, out, _ = run(capsys, "explain", model, "--policy", f"policy={saved}", *counts)
    assert json.loads(out) == result


def test_explain_without_a_policy_is_the_original(capsys: pytest.CaptureFixture[str], model: str) -> None:
    code, out, _ = run(capsys, "explain", model, "--json", "--rows", "0")
    assert code == 0
    assert json.loads(out)["tiers"][0]["executed_ratio"] == 1


def test_explain_of_several_tiers_and_another_precision(
    capsys: pytest.CaptureFixture[str], model: str, policy: str
) -> None:
    tiers = ["--policy", f"a={policy}", "--policy", f"b={policy}", "--tier", "b"]
    code, out, _ = run(capsys, "explain", model, *tiers, "--dtype", "bfloat16", "--json")
    half = json.loads(out)
    _, out, _ = run(capsys, "explain", model, *tiers, "--dtype", "float32", "--json")
    assert (code, half["tier"], [tier["tier"] for tier in half["tiers"]]) == (0, "b", ["a", "b"])
    assert json.loads(out)["tiers"][0]["kv_bytes"] == 2 * half["tiers"][0]["kv_bytes"]


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_explain_draws(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path, policy: str, suffix: str, start: bytes
) -> None:
    path = tmp_path / "new" / f"map.{suffix}"
    code, out, err = run(capsys, "explain", model, "--policy", policy, "--plot", str(path))
    assert code == 0
    assert out == run(capsys, "explain", model, "--policy", policy)[1]
    assert f"saved picture {path}" in err
    assert path.read_bytes().startswith(start)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_explain_refuses_pictures_of_other_kinds(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "ends in .svg, .png, .pdf" in refused(capsys, "explain", model, "--plot", str(tmp_path / "map.jpeg"))
    monkeypatch.setattr("dop_compile.commands.outputs.find_spec", lambda name: None)
    assert "pip install 'dop_compile[search]'" in refused(capsys, "explain", model, "--plot", "map.svg")


def test_explain_ignores_whose_weights_a_policy_was_made_for(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    from dop_compile.policy.provenance import Provenance

    path = tmp_path / "other.json"
    Policy.depthwise(LAYERS, mha_depth=2, provenance=Provenance(model_fingerprint="0" * 64)).save(path)
    assert run(capsys, "explain", model, "--policy", str(path))[0] == 0
    assert "made for another model" in refused(capsys, "run", model, "--prompt", "What?", "--policy", str(path))


# --- run


def test_run_prints_the_answer(capsys: pytest.CaptureFixture[str], model: str, image: str, policy: str) -> None:
    argv = ["run", model, "--image", image, "--prompt", "What is this?", "--policy", policy, "--max-new-tokens", "3"]
    code, out, err = run(capsys, *argv)
    assert code == 0
    assert len(out.strip().splitlines()) == 1
    assert "Traceback" not in err
    assert run(capsys, *argv)[1] == out


def test_run_under_a_full_policy_answers_as_the_original(
    capsys: pytest.CaptureFixture[str], model: str, image: str, policy: str, tmp_path: Path
) -> None:
    full = tmp_path / "full.json"
    Policy.full(LAYERS).save(full)
    tiers = ["--policy", policy, "--policy", f"100%={full}", "--tier", "100%"]
    # The prompt holds its image token already: none is added
    prompt = ["--prompt", "USER: <image> What is this? ASSISTANT:", "--image", image, "--max-new-tokens", "4"]
    code, out, _ = run(capsys, "run", model, *tiers, *prompt, "--compare")
    answer, original, times = out.strip().splitlines()
    assert code == 0
    assert original == f"original: {answer}"
    assert times.startswith("first token: ")


def test_run_makes_pictures_smaller_for_a_resize_policy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str, image: str
) -> None:
    argv = ["run", model, "--image", image, "--image", image, "--prompt", "What is this?", "--max-new-tokens", "2"]
    argv += ["--reducer", "resize", "--visual-tokens", "9"]
    assert "pictures of one size" in refused(capsys, *argv)
    asked: list[int] = []

    class Smaller:
        """Gives no tokens at all."""

        def __init__(self, processor: Any, tokens: int):
            asked.append(tokens)
            self.processor = processor

        def __getattr__(self, name: str) -> Any:
            return getattr(self.processor, name)

        def __call__(self, images: Any, text: str, **settings: Any) -> Any:
            return self.processor(images=None, text=text.replace("<image>", ""), **settings)

    monkeypatch.setattr(cli_inputs, "resize_processor", Smaller)
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert asked == [4], "of each of two pictures"
    assert len(out.strip().splitlines()) == 1


def test_run_takes_several_images_and_none(
    capsys: pytest.CaptureFixture[str], model: str, image: str, policy: str
) -> None:
    tail = ["--prompt", "What is this?", "--policy", policy, "--max-new-tokens", "2", "--dtype", "bfloat16"]
    assert run(capsys, "run", model, "--image", image, "--image", image, *tail)[0] == 0
    assert run(capsys, "run", model, *tail)[0] == 0


def test_run_uses_the_chat_template(
    capsys: pytest.CaptureFixture[str], model: str, image: str, policy: str, tmp_path: Path
) -> None:
    folder = tmp_path / "chat"
    local_llava(**TINY).save_pretrained(folder)
    processor = local_processor(TINY["image_size"])
    processor.chat_template = (
        "{% for message in messages %}USER: {% for part in message['content'] %}"
        "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %} ASSISTANT:"
    )
    processor.save_pretrained(folder)
    tail = ["--image", image, "--policy", policy, "--max-new-tokens", "4"]
    code, through_template, _ = run(capsys, "run", str(folder), "--prompt", "What is this?", *tail)
    _, by_hand, _ = run(capsys, "run", model, "--prompt", "USER: <image> What is this? ASSISTANT:", *tail)
    assert code == 0
    assert through_template == by_hand


# --- bad input


def test_bad_models(capsys: pytest.CaptureFixture[str], tmp_path: Path, policy: str) -> None:
    tail = ["--prompt", "x", "--policy", policy]
    assert "no such directory or file" in refused(capsys, "run", "/no/such/model", *tail)
    assert "no such directory or file" in refused(capsys, "explain", "./config.json")
    assert "config.json" in refused(capsys, "explain", str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "JSON" in refused(capsys, "explain", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    assert "no_such_type" in refused(capsys, "explain", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    assert "CLIPVisionConfig is not of a language" in refused(capsys, "explain", str(tmp_path))
    FAMILIES["llama"].build().save_pretrained(tmp_path)
    assert "LlamaConfig is not of a vision-language model" in refused(capsys, "run", str(tmp_path), *tail)


def test_a_model_without_processor_or_weights(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path, policy: str
) -> None:
    (tmp_path / "config.json").write_text((Path(model) / "config.json").read_text())
    tail = ["--prompt", "x", "--policy", policy]
    assert str(tmp_path) in refused(capsys, "run", str(tmp_path), *tail)
    local_processor(TINY["image_size"]).save_pretrained(tmp_path)
    assert "no file named" in refused(capsys, "run", str(tmp_path), *tail)


def test_bad_policies(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path, policy: str) -> None:
    def answer(*argv: str) -> str:
        return refused(capsys, "explain", model, *argv)

    assert "no-such.json" in answer("--policy", str(tmp_path / "no-such.json"))
    assert str(tmp_path) in answer("--policy", str(tmp_path))
    (tmp_path / "broken.json").write_text("{")
    assert "broken.json" in answer("--policy", str(tmp_path / "broken.json"))
    Policy.full(32).save(tmp_path / "deep.json")
    assert "the policy is for 32 layers, the model has 4" in answer("--policy", str(tmp_path / "deep.json"))
    assert "mha_depth: expected an integer from 0 to 4" in answer("--mha-depth", "5")
    assert "not both" in answer("--policy", policy, "--mha-depth", "2")
    assert "given twice" in answer("--policy", policy, "--policy", policy)
    assert "--tier: 'b' is not one of" in answer("--policy", policy, "--tier", "b")
    assert "unknown reducer 'best'" in answer("--visual-tokens", "3", "--reducer", "best")
    assert "reach into the visual tokens" in answer("--visual-tokens", "3", "--rows", "110", "--text", "100")
    assert "cannot write there" in answer("--save-policy", str(tmp_path / "deep.json" / "p.json"), "--json")
    before = Path(policy).read_bytes()
    assert "there already" in answer("--save-policy", policy)
    assert Path(policy).read_bytes() == before
    code, _, _ = run(capsys, "explain", model, "--save-policy", policy, "--force")
    assert (code, Policy.load(policy)) == (0, Policy.full(LAYERS))
    assert "no policy" in refused(capsys, "run", model, "--prompt", "x")


def test_bad_images_and_prompts(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path, policy: str, image: str
) -> None:
    def answer(path: Path, prompt: str = "x") -> str:
        return refused(capsys, "run", model, "--image", str(path), "--prompt", prompt, "--policy", policy)

    assert "No such file" in answer(tmp_path / "none.png")
    assert "directory" in answer(tmp_path)
    (tmp_path / "text.png").write_text("not an image")
    assert "not an image that can be decoded" in answer(tmp_path / "text.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(image).read_bytes()[:5000])
    assert "truncated" in answer(cut)
    assert "holds 2 <image> for 1 images" in answer(Path(image), "<image> and <image>")
    device = refused(capsys, "run", model, "--prompt", "x", "--policy", policy, "--device", "abacus")
    assert "--device 'abacus'" in device
    backend = refused(capsys, "run", model, "--prompt", "x", "--policy", policy, "--backend", "abacus")
    assert "--backend 'abacus'" in backend
    assert "inductor" in backend


def test_ctrl_c_is_code_130_and_says_that_nothing_was_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dop_compile.commands.explain.explain_command", stopped)
    assert run(capsys, "explain", "x") == (130, "", "dop-compile explain: stopped; nothing was kept\n")


def test_other_failures_are_code_1_and_debug_shows_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("dop_compile.commands.explain.explain_command", broken)
    assert run(capsys, "explain", "x") == (1, "", "dop-compile explain: RuntimeError: two lines\n")
    with pytest.raises(RuntimeError, match="two"):
        main(["explain", "x", "--debug"])
