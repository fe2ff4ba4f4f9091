"""Every command of docs/lmms-eval.md: its arguments are known, its policy exists, its tasks are lmms-eval's."""

from __future__ import annotations

import inspect
import itertools
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval.api.model", reason="lmms-eval is not installed: pip install lmms-eval")

import lmms_eval.tasks
from lmms_eval.utils import simple_parse_args_string

from dop_compile.plugins.lmms_eval.arguments import check_names, policy_of
from dop_compile.plugins.lmms_eval.models.dop_compile import DopCompile

ROOT = Path(__file__).parents[3]
LAYERS = {"7b": 32, "13b": 40, "8b": 28, "llava": 8}
NAMED = re.compile(r"""^\s*(?:task|group|tag):\s*["']?([\w+-]+)["']?\s*$""", re.MULTILINE)


def commands() -> list[dict[str, str]]:
    text = (ROOT / "docs" / "lmms-eval.md").read_text().replace("\\\n", " ")
    found, variables = [], {}
    for line in text.splitlines():
        if line.startswith("TASKS="):
            variables["$TASKS"] = line.partition("=")[2]
        if "--model_args" in line and not line.startswith(("|", "The ", "`")):
            words = [variables.get(word, word) for word in shlex.split(line)]
            found.append(dict(itertools.pairwise(words)))
    return found


def layers_of(pretrained: str) -> int:
    if "Qwen" in pretrained:
        return 28
    return next(count for name, count in LAYERS.items() if name in pretrained.lower().split("/")[-1])


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 20


@pytest.mark.parametrize("command", commands(), ids=lambda command: command["--model_args"].split("/")[-1][:60])
def test_arguments_and_policies(command: dict[str, str]) -> None:
    arguments = simple_parse_args_string(command["--model_args"])
    settings = inspect.getfullargspec(DopCompile.__init__).kwonlyargs
    check_names(arguments, ("pretrained", *settings))
    policy = policy_of("nowhere", layers_of(arguments["pretrained"]), arguments)
    assert (policy is None) is (arguments.get("policy") == "original")


def test_tasks_are_those_of_lmms_eval() -> None:
    files = Path(lmms_eval.tasks.__file__).parent.rglob("*.yaml")
    names = {name for file in files for name in NAMED.findall(file.read_text(encoding="utf-8"))}
    asked = {name for command in commands() for name in command["--tasks"].split(",")}
    assert asked - names == {"digits_vlm", "digits_vlm_likelihood"}
