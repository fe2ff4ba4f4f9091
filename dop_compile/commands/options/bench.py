"""Options of the command that measures speed and memory: ``dop-compile bench``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from dop_compile.commands.options.common import DTYPES, positive

__all__ = ["ACTIONS", "add_bench_command"]

ACTIONS = {"bench": "dop_compile.commands.bench:bench_command"}

BENCH = """\
Measure answers of the original and of every policy, part by part: vision, selection of tokens, prefill,
decode, peak memory and KV cache. All take turns in every round, the original twice: the spread between
the two (A/A) says which differences mean something. Without --image a picture of noise is asked about.

A batch is the same prompt that often. The original is never compiled; `full` is the compiled model with
nothing pruned, under the same backend as the policies.
"""


def add_bench_command(command: Callable[..., argparse.ArgumentParser], policy: argparse.ArgumentParser) -> None:
    """Add the command by `command(name, summary, text, *parents)`, which makes a subparser."""
    one = command("bench", "speed and memory of the original and of policies", BENCH, policy)
    one.add_argument("model", metavar="MODEL", help="model directory or hub id")
    one.add_argument("--image", action="append", default=[], metavar="PATH", help="an image; repeat for several")
    one.add_argument("--prompt", default="Describe the picture.", metavar="TEXT", help="what to ask")
    one.add_argument(
        "--batch", action="append", default=[], type=positive, metavar="N", help="a batch size (1); repeat"
    )
    backend = "eager (default), inductor, or any backend of torch.compile; repeat for several"
    one.add_argument("--backend", action="append", default=[], metavar="NAME", help=backend)
    one.add_argument("--rounds", type=positive, default=7, metavar="N", help="measured rounds (7)")
    one.add_argument("--new-tokens", type=positive, default=32, metavar="N", help="length of every answer (32)")
    one.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as saved")
    one.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    one.add_argument("--out", metavar="DIR", help="where bench.json and bench.md go; unless given, only printed")
    one.add_argument("--force", action="store_true", help="replace files that are there")
