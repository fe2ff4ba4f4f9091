"""Questions as a file: what the model is asked by it is what it was trained to read."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from digits_vlm import data, models
from digits_vlm.samples import write_samples
from dop_compile.commands.inputs import load_processor
from dop_compile.search.samples import Samples, read_jsonl

SHIPPED = Path(models.__file__).parent / "checkpoints"


def test_the_questions_are_those_that_the_model_reads(tmp_path: Path) -> None:
    path = write_samples(tmp_path / "digits", 6)
    rows = read_jsonl(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    examples = list(data.examples("validation", 6, seed=7))
    assert [(line["answers"], line["task"]) for line in lines] == [([e.answer], e.kind) for e in examples]
    samples = Samples(rows, load_processor(str(SHIPPED / "llava")))
    _, reader = models.load(SHIPPED / "llava")
    for sample, example in zip(samples, examples, strict=True):
        expected = reader([example.image], [example.prompt])
        assert torch.equal(sample["input_ids"], expected["input_ids"])
        assert torch.allclose(sample["pixel_values"], expected["pixel_values"], atol=1e-6)
