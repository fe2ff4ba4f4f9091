"""What property tests are given is the same in every run."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.drawing import FUZZ, MANY, USUAL, examples

same_only = pytest.mark.skipif(settings().database is not None, reason="examples are drawn at random")


def draws() -> list[list[int]]:
    found = []

    @given(st.lists(st.integers(), min_size=20, max_size=20))
    def note(numbers: list[int]) -> None:
        found.append(numbers)

    note()
    return found


@same_only
def test_examples_do_not_depend_on_the_modules_that_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = draws()
    (tmp_path / "numbers_of_mine.py").write_text(f"NUMBERS = {[10_007 * number for number in range(500)]}\n")
    spec = importlib.util.spec_from_file_location("numbers_of_mine", tmp_path / "numbers_of_mine.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "numbers_of_mine", module)
    spec.loader.exec_module(module)
    assert draws() == before


@same_only
def test_no_example_is_remembered_and_no_clock_is_asked() -> None:
    assert settings().derandomize
    assert settings().database is None
    assert settings().deadline is None
    assert (settings().max_examples, examples(7).max_examples) == (USUAL, 7)


def test_fuzz_draws_more_at_random() -> None:
    profile = settings.get_profile(FUZZ)
    assert not profile.derandomize
    assert profile.database is not None
    assert (profile.max_examples, profile.deadline) == (MANY, None)


@pytest.mark.parametrize("time", ["first", "second"])
def test_global_generators_begin_each_test_alike(time: str) -> None:
    drawn = (random.randrange(10**9), int(np.random.randint(10**9)), int(torch.randint(10**9, ())))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert drawn == (random.randrange(10**9), int(np.random.randint(10**9)), int(torch.randint(10**9, ())))
