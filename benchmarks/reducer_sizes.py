"""How a reducer's time and memory grow with the visual tokens of one picture.

    python benchmarks/reducer_sizes.py --out benchmarks/results

One token of eight is kept of a picture in one part, on one core. Features are random and of full rank, which is the
worst case for choices by similarity: no token is much nearer to one token than to all others. Every figure is of a
process of its own. Memory is what the choice needs at most beside its input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import environment
from reducers import contexts
from tqdm import tqdm

from dop_compile.reducers import VisualContext, create, known

WIDTH, KEPT = 1024, 8


def picture(tokens: int) -> VisualContext:
    """All tokens in one part."""
    torch.manual_seed(0)
    (context,) = contexts(WIDTH, tokens, 1, torch.device("cpu"), torch.float32)
    return dataclasses.replace(context, tiles=torch.zeros(tokens, dtype=torch.long))


def peak() -> float:
    """MiB of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.no_grad()
def measure(name: str, tokens: int, rounds: int) -> tuple[float, float]:
    """Median seconds, and MiB beside the input in the first round."""
    torch.set_num_threads(1)
    reducer = create(name)
    reducer(picture(512), 64)  # what is loaded or compiled on first use
    context, times = picture(tokens), []
    before = peak()
    memory = 0.0
    for number in range(rounds):
        started = time.perf_counter()
        reducer(context, tokens // KEPT)
        times.append(time.perf_counter() - started)
        memory = peak() - before if number == 0 else memory
    return statistics.median(times), memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--reducers", nargs="+", default=[n for n in known() if n not in ("given", "resize")])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for reducer-sizes.json and .md")
    options = parser.parse_args()
    found: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in options.reducers}
    context = multiprocessing.get_context("spawn")
    for tokens in tqdm(options.sizes, desc="sizes", leave=False):
        for name in options.reducers:
            with context.Pool(1) as pool:
                found[name][tokens] = pool.apply(measure, (name, tokens, options.rounds))
    lines = ["| reducer | " + " | ".join(f"{tokens:,}" for tokens in options.sizes) + " |"]
    lines += ["| --- " * (len(options.sizes) + 1) + "|"]
    for name, row in found.items():
        cells = [f"{seconds:.2f} s, {memory:.0f} MiB" for seconds, memory in row.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    around: dict[str, Any] = {**environment(torch.device("cpu")), "threads": 1}
    lines += ["", "; ".join(f"{name}: {value}" for name, value in around.items())]
    print("\n".join(lines))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "reducer-sizes.md").write_text("\n".join(lines) + "\n")
        (options.out / "reducer-sizes.json").write_text(json.dumps({"reducers": found, **around}, indent=1) + "\n")


if __name__ == "__main__":
    main()
