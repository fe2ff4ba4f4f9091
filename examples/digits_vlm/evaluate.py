"""Accuracy of a checkpoint on validation scans, by kind of question.

    python -m digits_vlm.evaluate digits_vlm/checkpoints/llava                         # 500 questions a kind, greedy
    python -m digits_vlm.evaluate digits_vlm/checkpoints/llava --policy policy.json    # the same, pruned

An answer counts if all of its words are right.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from digits_vlm import data, models
from dop_compile import Policy, dop_compile

__all__ = ["accuracy", "answers"]


@torch.inference_mode()
def answers(model: Any, reader: models.Reader, examples: list[data.Example]) -> list[str]:
    """What the model says, greedily."""
    inputs = reader([e.image for e in examples], [e.prompt for e in examples])
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return list(reader.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def accuracy(model: Any, reader: models.Reader, examples: Iterable[data.Example], batch: int = 50) -> dict[str, float]:
    """Share of questions answered exactly, by kind."""
    asked = list(examples)
    right: dict[str, list[bool]] = {}
    for start in tqdm(range(0, len(asked), batch), desc="answering", file=sys.stderr, leave=False):
        part = asked[start : start + batch]
        for example, answer in zip(part, answers(model, reader, part), strict=True):
            right.setdefault(example.kind, []).append(answer.strip() == example.answer)
    return {kind: sum(values) / len(values) for kind, values in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--questions", type=int, default=500, help="of each kind (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the canvases and questions")
    parser.add_argument("--side", type=int, help="resize pictures to this many pixels (dynamic-resolution models)")
    parser.add_argument("--policy", type=Path, help="a policy to compile the model with")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    model, reader = models.load(options.checkpoint)
    if torch.cuda.is_available():
        model = model.cuda()
    if options.policy:
        model = dop_compile(model, Policy.load(options.policy), backend="eager")
    asked = list(data.examples("validation", options.questions * len(data.KINDS), seed=options.seed))
    if options.side:
        size = (options.side, options.side)
        asked = [data.Example(e.image.resize(size), e.prompt, e.answer, e.kind) for e in asked]
    found = accuracy(model, reader, asked)
    print(f"{options.checkpoint}: {options.questions} questions a kind on validation scans, seed {options.seed}")
    for kind, share in found.items():
        print(f"  {kind:8}{100 * share:5.1f} %")
    if options.json:
        options.json.write_text(json.dumps({"questions": options.questions, "seed": options.seed, **found}) + "\n")


if __name__ == "__main__":
    main()
