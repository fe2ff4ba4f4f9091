"""How long first answers take: in a process that compiles, and in one that finds the compiled code in a folder.

python benchmarks/first_call.py --rounds 3

Each round begins with an empty folder: one process answers with it, then a second one. Both are asked the same: one
prompt, a longer one, two prompts, and a padded batch of four. Seconds are of `generate` for three tokens, imports,
loading and `dop_compile` apart; medians over the rounds, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import environment
from transformers import AutoProcessor, LlavaForConditionalGeneration

from dop_compile import Policy, dop_compile
from dop_compile.hf.images import load_image

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "digits_vlm" / "checkpoints" / "llava"
POLICY = Policy.depthwise(8, mha_query_depth=2, mha_key_value_depth=7, mlp_depth=1, visual_tokens=91)
QUESTION = "Look at the handwritten digits. <image> {} Answer:"
SHORT, LONG = "Read row 1.", "Which digit is in row 3 column 3? a 6, b 7, c 3, d 5."
ASKED = {
    "first answer": [SHORT],
    "second answer, a longer prompt": [LONG],
    "first of two prompts": [SHORT, SHORT],
    "first of four, padded": [SHORT, LONG, SHORT, LONG],
}
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def answer_all() -> dict[str, float]:
    """Seconds of each answer in this process."""
    model = LlavaForConditionalGeneration.from_pretrained(MODEL).eval()
    processor = AutoProcessor.from_pretrained(MODEL)
    processor.tokenizer.padding_side = "left"
    picture = load_image(str(ROOT / "docs" / "images" / "digits.png"))
    compiled = dop_compile(model, POLICY)
    seconds = {}
    for name, questions in ASKED.items():
        texts = [QUESTION.format(question) for question in questions]
        inputs = processor(images=[picture] * len(texts), text=texts, padding=True, return_tensors="pt")
        started = time.perf_counter()
        compiled.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        seconds[name] = time.perf_counter() - started
    return seconds


def in_a_process(folder: str) -> dict[str, float]:
    """Seconds of each answer in a fresh process with a folder of compiled code, and of the whole process."""
    variables = {**os.environ, VARIABLE: folder}
    started = time.perf_counter()
    command = [sys.executable, __file__, "--answer"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "the whole process": time.perf_counter() - started}


def _shown(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answer", action="store_true", help="what the measured processes do")
    arguments = parser.parse_args()
    if arguments.answer:
        print(json.dumps(answer_all()))
        return
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append((in_a_process(folder), in_a_process(folder)))
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    where: dict[str, Any] = environment(torch.device("cpu"))
    print(
        f"{where['machine']}, {where['threads']} threads, torch {where['torch']}, transformers "
        f"{where['transformers']}, dop_compile {where['dop_compile']}; {where['command']}\n"
    )
    print("| seconds | empty folder | filled folder | of it |\n| --- | --- | --- | --- |")
    for name in rounds[0][0]:
        cold, warm = ([one[side][name] for one in rounds] for side in (0, 1))
        ratios = [b / a for a, b in zip(cold, warm, strict=True)]
        print(f"| {name} | {_shown(cold)} | {_shown(warm)} | {_shown(ratios)} |")


if __name__ == "__main__":
    main()
