"""Questions about digits as a file of samples, for `dop-compile profile`, `search`, `eval` and `recommend`.

    python -m digits_vlm.samples --count 120 --out digits

writes digits/samples.jsonl and a picture per question. They are of the validation scans, which no checkpoint has seen.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from digits_vlm import data

__all__ = ["main", "write_samples"]


def write_samples(folder: Path, count: int, *, split: str = "validation", seed: int = 7) -> Path:
    """Write pictures and `samples.jsonl`, kinds of questions in turn; returns the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    before, after = (part.strip() for part in data.prompt("{}").split("{}"))
    lines = []
    for number, example in enumerate(data.examples(split, count, seed=seed)):
        example.image.save(folder / f"{number}.png")
        # What stands around the question is put there by the checkpoints' chat templates
        question = example.prompt.removeprefix(before).removesuffix(after).strip()
        line = {"image": f"{number}.png", "prompt": question, "answers": [example.answer], "task": example.kind}
        lines.append(json.dumps(line) + "\n")
    path = folder / "samples.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=120, help="questions (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="which questions (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("digits"))
    options = parser.parse_args()
    print(write_samples(options.out, options.count, seed=options.seed))


if __name__ == "__main__":
    main()
