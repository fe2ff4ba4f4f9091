"""`dop-compile serve`, as a process that clients of OpenAI's API ask."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from dop_compile import Policy
from tests.command_line import refused
from tests.serving.live.digits import CHECKPOINTS, LAYERS, QUESTIONS, canvas, generated, question
from tests.serving.served import ask, data_url

ROOT = Path(__file__).parents[2]
LLAVA = str(CHECKPOINTS / "llava")
TORCH = ("serve", LLAVA, "--port", "0")


def started(*argv: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """The process, and the line that says where it listens."""
    command = [sys.executable, "-m", "dop_compile.cli", "serve", *argv, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **environment})
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line.startswith("serving "), (line, process.wait(20))
    return process, line


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("policies")
    Policy.full(LAYERS).save(folder / "full.json")
    Policy.depthwise(LAYERS, mha_depth=6, mlp_depth=2, visual_tokens=91).save(folder / "34.json")
    return ["--policy", f"100%={folder / 'full.json'}", "--policy", f"34%={folder / '34.json'}"]


@pytest.fixture(scope="module")
def served(policies: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text("open sesame\n")
    process, line = started(LLAVA, *policies, "--name", "digits", "--no-measure", "--api-key-file", str(key))
    assert line.startswith("serving digits (100%, 34%) at http://127.0.0.1:"), line
    yield line.rpartition(" ")[2]
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM


def test_a_live_model_answers_as_generate_does(served: str) -> None:
    client = openai.OpenAI(base_url=f"{served}/v1", api_key="open sesame", max_retries=0)
    assert [model.id for model in client.models.list()] == ["digits", "digits@100%", "digits@34%"]
    for number, tier in enumerate(("100%", "34%")):
        text, finish, tokens = generated("llava", question(number, tier=tier))
        messages: Any = ask(QUESTIONS[0], data_url(canvas(number)))
        found = client.chat.completions.create(model=f"digits@{tier}", messages=messages, max_tokens=8)
        assert (found.choices[0].message.content, found.choices[0].finish_reason) == (text, finish)
        assert found.usage is not None
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (157, tokens)
        stream = client.chat.completions.create(model=f"digits@{tier}", messages=messages, max_tokens=8, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text


def test_wrong_requests_are_answered_by_the_engine(served: str) -> None:
    client = openai.OpenAI(base_url=f"{served}/v1", api_key="open sesame", max_retries=0)
    for messages, message in (
        (ask("<image>"), "stands for a picture"),
        (ask("digit " * 1100), "more than the model's context of 1024"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(model="digits", messages=messages)  # type: ignore[arg-type]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served}/v1", api_key="other").models.list()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*TORCH, "--port", "0"], "no policy: give --policy FILE"),
        ([*TORCH, "--mha-depth", "4", "--host", "0.0.0.0"], "--host 0.0.0.0: others could use the server"),
        ([*TORCH, "--mha-depth", "4", "--private-images"], "--private-images: nothing is fetched"),
        ([*TORCH, "--mha-depth", "4", "--image-origin", "example.org"], "expected an address such as https://"),
        ([*TORCH, "--mha-depth", "4", "--api-key-file", "/nowhere"], "--api-key-file '/nowhere'"),
        ([*TORCH, "--mha-depth", "4", "--new-tokens", "2000"], "--new-tokens: more than --max-new-tokens"),
        ([*TORCH, "--mha-depth", "4", "--port", "70000"], "--host 127.0.0.1 --port 70000"),
        ([*TORCH, "--mha-depth", "4", "--host", "192.0.2.1", "--no-api-key"], "--host 192.0.2.1 --port 0: "),
        ([*TORCH, "--mha-depth", "4", "--no-measure", "--max-ms", "5"], "--max-ms: --no-measure leaves out"),
    ],
)
def test_wrong_use_is_said_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in refused(capsys, *argv)


def test_a_key_of_the_environment_counts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DOP_COMPILE_API_KEY", "open sesame")
    assert "--no-api-key: there is a key" in refused(capsys, *TORCH, "--mha-depth", "4", "--no-api-key")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from dop_compile.commands import serve

    monkeypatch.setattr(serve, "PACKAGES", {"no_such_module": "no-such-package"})
    assert "no-such-package: not installed; pip install dop_compile[serve]" in refused(capsys, *TORCH)


def test_what_is_served_is_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert refused(capsys, "serve", str(tmp_path / "nothing"), "--port", "0")
    (tmp_path / "manifest.json").write_text("{}")
    assert "an exported directory, which runs in ONNX Runtime" in refused(capsys, "serve", str(tmp_path), "--port", "0")


def test_the_commands_of_the_readme_run_as_printed() -> None:
    readme = (ROOT / "README.md").read_text()
    (section,) = re.findall(r"<!-- SERVE -->\n(.*?)<!-- /SERVE -->", readme, re.DOTALL)
    serve, ask_it = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    words = shlex.split(serve)
    assert words[:2] == ["dop-compile", "serve"]
    process, line = started(*words[2:])
    try:
        command = ask_it.replace("http://127.0.0.1:8000", line.rpartition(" ")[2])
        assert command != ask_it
        found = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
        answer = json.loads(found.stdout)
    finally:
        process.terminate()
        process.wait(20)
    assert answer["choices"][0]["message"]["content"] == "7 5 6"
    assert answer["model"] == "llava@policy"
