"""Answers under a policy are those of the compiled Hugging Face model: pictures of several sizes, several pictures,
turns, and prompts without any in one batch, and one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm_engine.engines import POLICIES, check, engine, run


@pytest.mark.parametrize("label", POLICIES)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_answers_are_those_of_the_compiled_model(name: str, label: str, tmp_path: Path) -> None:
    with engine(name, label, tmp_path) as llm:
        check(run(llm, name), name, label)
        check(run(llm, name, [7]), name, label)
        check(run(llm, name, [3, 1]), name, label)
