"""The three commands from samples to policies to pictures, as a user types them."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dop_compile import Policy
from dop_compile.policy.costs import prefill_flops_ratio
from dop_compile.policy.provenance import Provenance
from dop_compile.search import Divergences, OperationOrder, joint, measure_policies
from dop_compile.search.candidates import candidates, tokens_only
from tests.command_line import refused, run
from tests.local_llava import local_llava, local_processor, picture

LAYERS = 4
WORDS = ("table", "picture", "colour", "human")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and four samples with answers."""
    folder = tmp_path_factory.mktemp("search")
    model = local_llava(layers=LAYERS, hidden=64, image_size=56)
    model.generation_config.max_new_tokens = 2
    model.save_pretrained(folder / "model")
    local_processor(56).save_pretrained(folder / "model")
    lines = []
    for number, word in enumerate(WORDS):
        picture().rotate(90 * number).save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "prompt": f"What is the {word} ?", "answers": [word]})
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def profiled(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dop_compile.cli import main

    out = tmp_path_factory.mktemp("out") / "divergences.json"
    argv = ["profile", str(folder / "model"), "--samples", str(folder / "samples.jsonl"), "--out", str(out)]
    assert main(argv) == 0
    return out


def test_profile_writes_divergences_and_nothing_else(profiled: Path) -> None:
    found = Divergences.load(profiled)
    assert len(found.digests) == 4
    assert found.visual_tokens == 16
    assert [path.name for path in profiled.parent.iterdir()] == [profiled.name]


def test_profile_of_a_draw(capsys: pytest.CaptureFixture[str], folder: Path, profiled: Path, tmp_path: Path) -> None:
    argv = ["profile", str(folder / "model"), "--samples", str(folder / "samples.jsonl"), "--count", "2"]
    code, out, _ = run(capsys, *argv, "--axis", "mlp_depth", "--out", str(tmp_path / "d.json"))
    assert code == 0
    found = Divergences.load(tmp_path / "d.json")
    assert len(found.digests) == 2
    assert set(found.digests) < set(Divergences.load(profiled).digests)
    assert set(found.points) == {"mlp_depth"}
    assert "mlp_depth" in out


def test_search_saves_a_policy_per_budget(capsys: pytest.CaptureFixture[str], profiled: Path, tmp_path: Path) -> None:
    argv = ["search", str(profiled), "--alpha", "off", "--out", str(tmp_path)]
    code, out, _ = run(capsys, *argv, "--budget", "1", "--budget", "0.7")
    assert code == 0
    found = Divergences.load(profiled)
    assert Policy.load(tmp_path / "100.json").is_full
    policy = Policy.load(tmp_path / "70.json")
    assert prefill_flops_ratio(found.dims, policy, *found.counts[0]) <= 0.7
    assert "70%" in out
    assert "policy FLOPs" in out
    assert "at the token counts of 4 samples, " in out
    before = (tmp_path / "70.json").read_bytes()
    dop_space = [*argv, "--budget", "0.7", "--space", "dop"]
    assert "70.json: there already" in refused(capsys, *dop_space), "another space's policy is not lost"
    assert (tmp_path / "70.json").read_bytes() == before
    assert run(capsys, *argv, "--budget", "0.7")[0] == 0, "the same policy is no other"
    assert run(capsys, *dop_space, "--force")[0] == 0
    dop = Policy.load(tmp_path / "70.json")
    assert dop.pruned_layers("visual", "mha_query") == dop.pruned_layers("visual", "mha_key_value")


def test_candidates_go_on_where_they_were_stopped(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    profiled: Path,
    tmp_path: Path,
) -> None:
    samples: list[int] = []
    made = joint.SampleMeter.__init__

    def counted(self: joint.SampleMeter, *args: Any, **settings: Any) -> None:
        if len(samples) == stops_at:
            raise KeyboardInterrupt
        samples.append(1)
        made(self, *args, **settings)

    monkeypatch.setattr(joint.SampleMeter, "__init__", counted)
    argv = ["search", str(profiled), "--budget", "0.6", "--out", str(tmp_path / "out")]
    argv += ["--model", str(folder / "model"), "--samples", str(folder / "samples.jsonl")]
    stops_at = 2
    assert run(capsys, *argv)[0] == 130
    assert [file.name.split("-")[0] for file in (tmp_path / "out").iterdir()] == ["candidates"]
    stops_at = -1
    code, text, _ = run(capsys, *argv)
    assert code == 0
    assert len(samples) == 4, "finished samples are not measured again"
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["60.json"]
    assert "60% tokens only" in text


def test_search_verifies_on_samples_and_bounds_time(
    capsys: pytest.CaptureFixture[str], folder: Path, profiled: Path, tmp_path: Path
) -> None:
    model = ["--model", str(folder / "model"), "--samples", str(folder / "samples.jsonl")]
    argv = ["search", str(profiled), "--out", str(tmp_path), *model]
    verified = [*argv, "--alpha", "off", "--budget", "0.7", "--verify-top", "2"]
    code, text, _ = run(capsys, *verified)
    assert code == 0
    policy = Policy.load(tmp_path / "70.json")
    divergences = Divergences.load(profiled)
    alone = tokens_only(divergences, 0.7)
    assert alone is not None
    known = [candidate.policy for candidate in (*candidates(divergences, 0.7, alpha=None, top=2), alone)]
    assert policy.provenance is not None
    assert policy.provenance.measured_divergence is not None
    plain = dataclasses.replace(policy.provenance, measured_divergence=None)
    assert policy.replace(provenance=plain) in known, "the predicted divergence stays beside the measured one"
    assert text.splitlines()[1].split()[-2:] == [
        f"{value:.4f}" for value in (policy.provenance.divergence, policy.provenance.measured_divergence)
    ]
    assert text.splitlines()[2].startswith("70% tokens only")
    assert "taken by 2 of the samples; the measured divergence is of the other 2" in text
    assert "there already" in refused(capsys, *verified), "said before anything is run"
    latency = tmp_path / "latency.json"
    assert run(capsys, *argv, "--max-ms", "1e6", "--latency", str(latency))[0] == 0
    unbounded = Policy.load(tmp_path / "policy.json").provenance
    assert unbounded is not None
    assert unbounded.measured_divergence == pytest.approx(0, abs=1e-6), "pruned at most where nothing is lost"
    bounded = [*argv[:-4], "--max-ms", "1e-6", "--latency", str(latency)]
    assert "max_ms" in refused(capsys, *bounded)
    assert "measured under backend 'eager'" in refused(capsys, *bounded, *model, "--backend", "aot_eager")
    code, _, said = run(capsys, *bounded[:-4], "--max-ms", "1e6", "--latency", str(latency), *model, "--force")
    assert code == 0
    assert f"{latency} is there" in said
    document = json.loads(latency.read_text())
    latency.write_text(json.dumps({**document, "model_fingerprint": "0" * 64}))
    assert "measured on another model" in refused(capsys, *bounded)


def test_report_draws_and_runs_policies(
    capsys: pytest.CaptureFixture[str], folder: Path, profiled: Path, tmp_path: Path
) -> None:
    run(capsys, "search", str(profiled), "--alpha", "off", "--budget", "0.7", "--budget", "1", "--out", str(tmp_path))
    policies = ["--policy", str(tmp_path / "70.json"), "--policy", str(tmp_path / "100.json")]
    out = tmp_path / "report"
    assert run(capsys, "report", str(profiled), *policies, "--out", str(out))[0] == 0
    files = {"divergences.png", "pareto.png", "operations.png", "report.txt"}
    assert {path.name for path in out.iterdir()} == files
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in files if name.endswith("png"))
    model = ["--model", str(folder / "model"), "--samples", str(folder / "samples.jsonl")]
    again = ["report", str(profiled), *policies, "--out", str(out), *model]
    assert "divergences.png, pareto.png, operations.png, report.txt: there already" in refused(capsys, *again)
    code, text, _ = run(capsys, *again, "--force")
    assert code == 0
    assert "predicted divergence" in text
    assert "measured divergence" in text
    assert "accuracy" in text
    assert (out / "report.txt").read_text().strip() in text


def test_policies_and_models_of_another_model_are_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, profiled: Path, tmp_path: Path
) -> None:
    """Of the same depth: only the fingerprint tells."""
    fingerprint = Divergences.load(profiled).model_fingerprint
    own, other = (Policy.full(LAYERS).replace(provenance=Provenance(found)) for found in (fingerprint, "0" * 64))
    own.save(tmp_path / "own.json")
    other.save(tmp_path / "other.json")
    out = tmp_path / "out"
    argv = ["report", str(profiled), "--out", str(out), "--policy", str(tmp_path / "own.json")]
    message = refused(capsys, *argv, "--policy", str(tmp_path / "other.json"))
    told_apart = f"another model (fingerprint 000000000000, this model has {fingerprint[:12]})"
    assert f"other.json': the policy was made for {told_apart}" in message
    assert not out.exists()
    foreign = tmp_path / "foreign.json"
    foreign.write_text(profiled.read_text().replace(fingerprint, "0" * 64))
    model = ["--model", str(folder / "model"), "--samples", str(folder / "samples.jsonl")]
    for own_argv in (
        ["report", str(foreign), "--policy", str(tmp_path / "other.json"), *model],
        ["search", str(foreign), "--alpha", "off", "--budget", "0.7", "--verify-top", "2", *model],
    ):
        message = refused(capsys, *own_argv, "--out", str(out))
        assert f"the divergences are of {told_apart}" in message
    with pytest.raises(ValueError, match=r"policies\[1\]: the policy was made for another model"):
        measure_policies(local_llava(layers=LAYERS, hidden=64, image_size=56), [{}], [Policy.full(LAYERS), other])


def test_outputs_that_cannot_be_written_are_named_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], folder: Path, profiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dop_compile.commands.measuring.load_processor", None)  # would fail if it were called
    (tmp_path / "file").write_text("in the way")
    out = ["--out", str(tmp_path / "file" / "out")]
    model = ["--model", str(folder / "model"), "--samples", str(folder / "samples.jsonl")]
    Policy.full(LAYERS).save(tmp_path / "p.json")
    for argv in (
        ["profile", *model[1:], *out],
        ["greedy", *model[1:], *out],
        ["eval", *model[1:], "--method", "full", *out],
        ["search", str(profiled), "--budget", "0.7", "--verify-top", "2", *model, *out],
        ["report", str(profiled), "--policy", str(tmp_path / "p.json"), *model, *out],
    ):
        assert f"--out '{out[1]}': cannot write there: Not a directory" in refused(capsys, *argv)
    for command in ("profile", "greedy"):
        assert "not a backend" in refused(capsys, command, *model[1:], "--out", "o", "--backend", "inductr")


def test_a_disk_that_fills_up_is_named_and_the_same_command_goes_on(
    capsys: pytest.CaptureFixture[str], folder: Path, profiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "d.json"
    argv = ["profile", str(folder / "model"), "--samples", str(folder / "samples.jsonl"), "--out", str(out)]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("dop_compile.documents.os.replace", full)
        code, _, err = run(capsys, *argv)
    assert code == 1
    assert f"OSError: {out}: No space left on device" in err
    assert [file.name for file in tmp_path.iterdir()] == ["d.json.progress-0"], "nothing half written"
    assert run(capsys, *argv)[0] == 0
    assert Divergences.load(out).values == Divergences.load(profiled).values


def test_ctrl_c_says_whether_the_same_command_goes_on(
    capsys: pytest.CaptureFixture[str], folder: Path, profiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dop_compile.commands.measuring.load_processor", stop)
    model, out = ["--samples", str(folder / "samples.jsonl")], ["--out", str(tmp_path / "o")]
    verified = ["search", str(profiled), "--budget", "0.7", "--verify-top", "2", "--model", str(folder / "model")]
    for argv, says in (
        (["profile", str(folder / "model"), *model, *out], "profile: stopped; the same command goes on"),
        (["greedy", str(folder / "model"), *model, *out], "greedy: stopped; the same command goes on"),
        (["eval", str(folder / "model"), *model, *out, "--method", "full"], "eval: stopped; the same command goes on"),
        ([*verified, *model, *out], "search: stopped; no policy was kept"),
    ):
        code, _, err = run(capsys, *argv)
        assert code == 130
        assert f"dop-compile {says}" in err


def test_greedy_saves_an_order(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "order.json"
    argv = ["greedy", str(folder / "model"), "--samples", str(folder / "samples.jsonl"), "--count", "1"]
    code, text, _ = run(capsys, *argv, "--steps", "2", "--max-loss", "0.1", "--out", str(out))
    assert code == 0
    order = OperationOrder.load(out)
    assert f"{len(order.steps)} steps" in text


def test_bad_input(capsys: pytest.CaptureFixture[str], folder: Path, profiled: Path, tmp_path: Path) -> None:
    model, samples, out = str(folder / "model"), str(folder / "samples.jsonl"), str(tmp_path / "o")
    assert "no such file" in refused(capsys, "profile", model, "--samples", "none.jsonl", "--out", out)
    assert "no such directory" in refused(capsys, "profile", "/no/model", "--samples", samples, "--out", out)
    assert "unknown" in refused(capsys, "profile", model, "--samples", samples, "--out", out, "--reducer", "best")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"image": "none.png", "prompt": "x"}\n')
    assert "--skip-bad" in refused(capsys, "profile", model, "--samples", str(bad), "--out", out)
    assert "no budget" in refused(capsys, "search", str(profiled), "--out", out)
    assert "0 < budget <= 1" in refused(capsys, "search", str(profiled), "--budget", "0", "--out", out)
    assert "is the least" in refused(capsys, "search", str(profiled), "--budget", "0.001", "--out", out)
    assert "No such file" in refused(capsys, "search", "none.json", "--budget", "0.5", "--out", out)
    (tmp_path / "other.json").write_text('{"format": "x"}')
    assert "not a file of divergences" in refused(capsys, "search", str(tmp_path / "other.json"), "--out", out)
    assert "--verify-top" in refused(
        capsys, "search", str(profiled), "--budget", "0.5", "--verify-top", "3", "--out", out
    )
    assert "--alpha" in refused(capsys, "search", str(profiled), "--budget", "0.5", "--alpha", "x", "--out", out)
    assert "--latency" in refused(capsys, "search", str(profiled), "--max-ms", "5", "--out", out)
    Policy.full(9).save(tmp_path / "deep.json")
    twice = ["--budget", "0.5", "--budget", "0.5000001"]
    assert "two of them are the same" in refused(capsys, "search", str(profiled), *twice, "--out", out)
    deep = ["--policy", str(tmp_path / "deep.json")]
    assert "the policy is for 9 layers" in refused(capsys, "report", str(profiled), *deep, "--out", out)
    assert not Path(out).exists()


def test_a_tensor_parallel_model_needs_processes(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    argv = ["profile", str(folder / "model"), "--samples", str(folder / "samples.jsonl"), "--tensor-parallel"]
    assert "torchrun" in refused(capsys, *argv, "--out", str(tmp_path / "d.json"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [[], pytest.param(["--tensor-parallel"], marks=pytest.mark.conformance)])
def test_profile_under_torchrun(folder: Path, profiled: Path, tmp_path: Path, settings: list[str]) -> None:
    """Two processes that share the samples, or the model, find what one does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "dop_compile.cli"]
    command += ["profile", str(folder / "model"), "--samples", str(folder / "samples.jsonl")]
    out = tmp_path / "d.json"
    done = subprocess.run([*command, "--out", str(out), *settings], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved") == 1, "one of them speaks"
    found, expected = Divergences.load(out), Divergences.load(profiled)
    assert found.digests == expected.digests
    for axis, rows in expected.values.items():
        assert np.allclose(found.values[axis], rows, rtol=1e-3, atol=1e-6)
