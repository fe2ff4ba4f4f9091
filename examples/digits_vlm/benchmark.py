"""The validation questions as a benchmark of lmms-eval: two tasks with their data, in one directory.

    cd examples && python -m digits_vlm.benchmark --out /tmp/digits_task --questions 20
    lmms-eval --include_path /tmp/digits_task --tasks digits_vlm --model dop_compile \
        --model_args pretrained=digits_vlm/checkpoints/llava,mha_depth=6,mlp_depth=2,backend=eager

`digits_vlm` asks for answers in words. `digits_vlm_likelihood` compares the likelihoods of the possible answers to
yes/no questions and choices, and needs --force_simple.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value

from digits_vlm import data

__all__ = ["write"]

TASK = Path(__file__).parent / "lmms_task"
FEATURES = Features({"image": Image()} | {name: Value("string") for name in ("question", "answer", "kind")})


def write(directory: Path, questions: int, seed: int = 1) -> None:
    """Write tasks and data.

    Args:
        directory: is made where there is none.
        questions: of each kind, those that `digits_vlm.evaluate` asks.
    """
    rows: dict[str, list[object]] = {name: [] for name in FEATURES}
    for number in range(questions * len(data.KINDS)):
        canvas = data.canvas("validation", number, seed)
        kind = data.KINDS[number % len(data.KINDS)]
        asked = data.ask(canvas, kind, np.random.default_rng([seed, 2, number]))
        for name, value in zip(FEATURES, (canvas.image, asked.text, asked.answer, kind), strict=True):
            rows[name].append(value)
    directory = directory.expanduser().resolve()
    directory.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows, features=FEATURES).to_parquet(directory / "validation.parquet")
    for file in TASK.iterdir():
        if file.suffix in (".py", ".yaml"):
            (directory / file.name).write_text(file.read_text().replace("DIRECTORY", str(directory)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the tasks")
    parser.add_argument("--questions", type=int, default=100, help="of each kind (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the canvases and questions (default %(default)s)")
    options = parser.parse_args()
    write(options.out, options.questions, options.seed)
    print(f"lmms-eval --include_path {options.out} --tasks digits_vlm ...")


if __name__ == "__main__":
    main()
