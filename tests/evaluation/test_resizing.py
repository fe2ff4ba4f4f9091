"""`resize` as a method of `dop-compile eval`, by name and as a policy's reducer, on the trained Qwen2.5-VL."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from digits_vlm import data, models
from dop_compile import Policy, prefill_flops
from dop_compile.commands import evaluate as commands
from dop_compile.evaluation import Evaluation, Planner
from dop_compile.reducers import resize_processor
from dop_compile.search.samples import Row, Samples
from tests.command_line import run
from tests.local_llava import local_llava

CHECKPOINT = Path(models.__file__).parent / "checkpoints" / "qwen2_5_vl"


class Digits(Samples):
    """Questions by the checkpoint's own reader: the class of its processor wants torchvision for videos."""

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return Digits(self.rows[number], self._processor)
        row = self.rows[number]
        return {**self._processor(row.open(), [row.prompt]), "answers": list(row.answers)}

    def resized(self, number: int, visual_tokens: int) -> dict[str, Any]:
        small = models.Reader(CHECKPOINT)
        small.images = resize_processor(small.images, visual_tokens)
        return Digits(self.rows, small)[number]


def test_smaller_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reader = models.load(CHECKPOINT)
    drawn = data.examples("validation", 3, seed=4)
    rows = [
        Row(f"line {n}", (functools.partial(getattr, one, "image"),), one.prompt, (one.answer,))
        for n, one in enumerate(drawn)
    ]
    monkeypatch.setattr(commands, "model_and_samples", lambda _: (model, Digits(rows, reader), reader))
    Policy.depthwise(8, mha_depth=6, visual_tokens=30, reducer="resize").save(tmp_path / "small.json")
    argv = ["eval", "model", "--samples", "none.jsonl", "--max-new-tokens", "2", "--out", str(tmp_path / "out")]
    argv += ["--method", "resize", "--budget", "0.6", "--policy", str(tmp_path / "small.json")]
    code, _, said = run(capsys, *argv)
    assert code == 0, said
    result = Evaluation.load(tmp_path / "out" / "evaluation.json")
    assert result.labels == ("original", "resize 60%", "small")
    original, fewer, policy = result.rows()
    assert original.flops == 1
    assert 0.3 < fewer.flops <= 0.6
    assert policy.executed_flops < fewer.executed_flops
    # The policy's are those that search and report print of it, at the samples' own counts
    spent, whole = (
        sum(prefill_flops(model.config, p, system=s, visual=v, text=t) for s, v, t in result.counts)
        for p in (Policy.load(tmp_path / "small.json"), Policy.full(8))
    )
    assert policy.flops == pytest.approx(spent / whole)
    assert policy.kv_bytes < fewer.kv_bytes < original.kv_bytes


def test_by_name_it_is_made_elsewhere() -> None:
    with pytest.raises(TypeError, match=r"make it with Planner\.resized"):
        Planner.of(local_llava(layers=2, hidden=64, image_size=56), [(1, 2, 3)]).named("resize", 0.5)
