"""Every option does something, or is refused by a line that says what it lacks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from dop_compile.cli import _parser
from dop_compile.commands.unused import check_unused, given_options
from tests.command_line import refused

SAMPLES = ["--samples", "s.jsonl"]
MODEL = ["--model", "m"]
EVAL = ["eval", "m", *SAMPLES, "--out", "o", "--budget", "0.5"]
SEARCH = ["search", "d.json", "--out", "o"]
REPORT = ["report", "d.json", "--out", "o"]
PROFILE = ["profile", "m", "--out", "o", *SAMPLES]


@pytest.mark.parametrize(
    ("argv", "option", "says"),
    [
        (["explain", "m", "--mha-depth", "2", "--reducer", "random"], "--reducer", "--visual-tokens"),
        (["run", "m", "--prompt", "x", "--mlp-depth", "2", "--positions", "compact"], "--positions", "--visual-tokens"),
        (
            ["bench", "m", "--mha-depth", "2", "--mha-query-depth", "1", "--mha-key-value-depth", "2"],
            "--mha-depth",
            "take its place",
        ),
        ([*PROFILE, "--tokens", "3"], "--tokens", "forced_kl"),
        ([*PROFILE, "--seed", "3"], "--seed", "--count"),
        ([*PROFILE, "--split", "test"], "--split", "is a file"),
        (["greedy", "m", "--out", "o", *SAMPLES, "--prompt-column", "p"], "--prompt-column", "is a file"),
        ([*EVAL, "--method", "random", "--task-column", "t"], "--task-column", "is a file"),
        ([*EVAL, "--method", "random", "--divergences", "d.json"], "--divergences", "split"),
        ([*EVAL, "--method", "fastv", "--positions", "compact"], "--positions", "reducers alone"),
        ([*EVAL, "--method", "resize", "--backend", "inductor"], "--backend", "nothing is compiled"),
        ([*SEARCH, "--budget", "0.5", "--verify-top", "1", *MODEL, *SAMPLES], "--model", "--verify-top"),
        ([*SEARCH, "--budget", "0.5", "--faithful", *MODEL, *SAMPLES], "--model", "--verify-top"),
        ([*SEARCH, "--budget", "0.5", *SAMPLES], "--samples", "--model"),
        ([*SEARCH, "--budget", "0.5", "--backend", "inductor"], "--backend", "--model"),
        ([*SEARCH, "--budget", "0.5", "--verify-top", "2", *MODEL], "--verify-top", "--samples"),
        ([*SEARCH, "--budget", "0.5", "--latency", "l.json"], "--latency", "--max-ms"),
        ([*SEARCH, "--max-ms", "5", "--latency", "l.json", *MODEL], "--model", "--samples"),
        ([*SEARCH, "--max-ms", "5", "--latency", "l.json", "--count", "3"], "--count", "--model"),
        ([*SEARCH, "--max-kv-bytes", "5", "--alpha", "2"], "--alpha", "--budget"),
        ([*REPORT, "--policy", "p.json", *SAMPLES], "--samples", "--model"),
        ([*REPORT, "--policy", "p.json", *MODEL], "--model", "--samples"),
        ([*REPORT, "--policy", "p.json", "--device", "cuda"], "--device", "--model"),
        ([*REPORT, *MODEL, *SAMPLES], "--model", "--policy"),
    ],
)
def test_what_would_be_ignored_is_refused(
    capsys: pytest.CaptureFixture[str], argv: list[str], option: str, says: str
) -> None:
    message = refused(capsys, *argv)
    assert message.startswith(f"dop-compile {argv[0]}: {option}: ")
    assert says in message


@pytest.mark.parametrize(
    "argv",
    [
        ["explain", "m", "--visual-tokens", "3", "--reducer", "random", "--positions", "compact"],
        ["explain", "m", "--mha-depth", "2", "--mha-query-depth", "1"],
        [*PROFILE, "--tokens", "3", "--metric", "forced_kl", "--count", "2", "--seed", "3"],
        ["profile", "m", "--out", "o", "--samples", "owner/data", "--split", "test", "--image-column", "i"],
        [*EVAL, "--method", "random", "--method", "dop+random", "--divergences", "d.json", "--positions", "compact"],
        [*EVAL, "--method", "full", "--backend", "inductor"],
        [*SEARCH, "--budget", "0.5", "--verify-top", "2", *MODEL, *SAMPLES, "--backend", "inductor", "--count", "2"],
        [*SEARCH, "--budget", "0.5", *MODEL, *SAMPLES],
        [*SEARCH, "--max-ms", "5", "--latency", "l.json", *MODEL, *SAMPLES],
        [*SEARCH, "--max-ms", "5", "--latency", "l.json", "--budget", "0.5", "--alpha", "2"],
        [*REPORT],
        [*REPORT, "--policy", "p.json", *MODEL, *SAMPLES, "--device", "cuda"],
    ],
)
def test_what_is_used_is_not(argv: list[str]) -> None:
    check_unused(_parser().parse_args(argv), given_options(_parser(), argv))


def test_a_file_is_told_from_a_data_set_by_being_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "samples").write_text(json.dumps({}))
    argv = ["profile", "m", "--out", "o", "--samples", str(tmp_path / "samples"), "--split", "test"]
    assert "is a file" in refused(capsys, *argv)


def test_what_is_given_is_what_the_line_names() -> None:
    argv = ["search", "d.json", "--out", "o", "--budget", "0.5", "--budget", "0.4", "--raw-curves"]
    expected = {"command", "divergences", "out", "budget", "raw_curves"}
    assert given_options(_parser(), argv) == expected
    assert isinstance(_parser().parse_args(argv), argparse.Namespace)
