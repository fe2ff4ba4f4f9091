"""Answers under a policy are those of the compiled Hugging Face model: pictures of several sizes, several pictures,
turns, and prompts without any in one batch, and one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm_engine.engines import POLICIES, check, engine, run

OF_CLASS_TOKEN = ("vispruner", "visionzip")


@pytest.mark.parametrize(
    ("name", "label"),
    [("llava", label) for label in POLICIES]
    + [("qwen2_5_vl", label) for label in POLICIES if label not in OF_CLASS_TOKEN],
)
def test_answers_are_those_of_the_compiled_model(name: str, label: str, tmp_path: Path) -> None:
    with engine(name, label, tmp_path) as llm:
        check(run(llm, name), name, label)
        check(run(llm, name, [7]), name, label)
        check(run(llm, name, [3, 1]), name, label)
