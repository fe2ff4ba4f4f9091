"""`dop-compile serve` under load: requests per second, and time to the first token, of 1, 4 and 16 clients, per tier.

    python benchmarks/serve_http.py --out build/serve.md
    python benchmarks/serve_http.py --serve "./my-model --policy 28%=policies/28.json" --out build/serve.md

A server is started as a process of its own: of the model that reads digits, under the demo's tiers, or of what
`--serve` says. Each client sends its next request when the last is answered, each with a picture of its own, and
streams the answer. Tiers take turns in every round.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import torch
from PIL import Image

from dop_compile.demo.run import CHECKPOINT, EXAMPLES, demo_policies
from dop_compile.evaluation.environment import environment

QUESTION = "Read row 1."


@dataclass(frozen=True)
class Round:
    """`seconds`: of all requests together. `first`: to the first token of each."""

    seconds: float
    first: list[float]


@contextmanager
def server(argv: list[str]) -> Iterator[str]:
    """The address of a server that runs while the block does."""
    command = [sys.executable, "-m", "dop_compile.cli", "serve", *argv, "--port", "0", "--queue", "1000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the server did not start: {shlex.join(command)}")
        yield line.split()[-1]
    finally:
        process.terminate()
        process.wait()


def digits(folder: Path) -> list[str]:
    """Arguments that serve the digits model under the demo's tiers."""
    argv = [str(EXAMPLES / CHECKPOINT), "--no-measure"]
    for number, (name, policy) in enumerate(demo_policies().items()):
        policy.save(folder / f"{number}.json")
        argv += ["--policy", f"{name}={folder / f'{number}.json'}"]
    return argv


def messages(side: int, seed: int) -> list[dict[str, Any]]:
    """A question about a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}]


async def load(client: openai.AsyncOpenAI, model: str, clients: int, conversations: list[Any], tokens: int) -> Round:
    waiting = iter(conversations)
    first: list[float] = []

    async def one() -> None:
        for asked in waiting:
            begun = time.perf_counter()
            stream = await client.chat.completions.create(
                model=model, messages=asked, stream=True, max_completion_tokens=tokens
            )
            async for _ in stream:  # the first piece comes with the first token
                first.append(time.perf_counter() - begun)
                break
            async for _ in stream:
                pass

    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(one())
    return Round(time.perf_counter() - begun, first)


async def measure(url: str, arguments: argparse.Namespace) -> dict[tuple[int, str], list[Round]]:
    """Rounds by number of clients and model."""
    found: dict[tuple[int, str], list[Round]] = {}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        tiers = [model.id async for model in client.models.list() if "@" in model.id]
        for number in range(arguments.rounds + 1):  # the first warms up
            for clients in arguments.clients:
                for model in tiers:
                    count = max(arguments.requests, 2 * clients)
                    asked = [messages(arguments.side, 1000 * number + seed) for seed in range(count)]
                    one = await load(client, model, clients, asked, arguments.new_tokens)
                    if number:
                        found.setdefault((clients, model), []).append(one)
    return found


def table(found: dict[tuple[int, str], list[Round]]) -> str:
    lines = [
        "| clients | tier | requests/s | first token p50 | p95 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (clients, model), rounds in found.items():
        speed = statistics.median(len(one.first) / one.seconds for one in rounds)
        first = 1e3 * np.array([seconds for one in rounds for seconds in one.first])
        half, most = np.percentile(first, [50, 95])
        tier = model.partition("@")[2]
        lines.append(f"| {clients} | {tier} | {speed:.1f} | {half:.0f} ms | {most:.0f} ms |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", metavar="ARGUMENTS", help="of dop-compile serve, in one word")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=32, help="per round; at least twice as many as clients")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--side", type=int, default=96, help="of the pictures, in pixels")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        argv = shlex.split(arguments.serve) if arguments.serve else digits(Path(folder))
        with server(argv) as url:
            found = asyncio.run(measure(url, arguments))
    made = environment(torch.device("cpu"))
    versions = ", ".join(f"{name} {made['packages'][name]}" for name in ("torch", "transformers"))
    threads = os.environ.get("OMP_NUM_THREADS", made["threads"])
    where = f"{made['device']}, {made['cpus']} cores, {threads} threads; Python {made['python']}, {versions}"
    text = f"{table(found)}\n\n{where}; `{shlex.join(made['command'])}`"
    print(text)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
