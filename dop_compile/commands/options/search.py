"""Options of the commands that search for policies: ``dop-compile profile|search|greedy|report``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from dop_compile.commands.options.common import positive, samples_options

__all__ = ["ACTIONS", "add_search_commands"]

ACTIONS = {
    "profile": "dop_compile.commands.measuring:profile_command",
    "search": "dop_compile.commands.search:search_command",
    "greedy": "dop_compile.commands.measuring:greedy_command",
    "report": "dop_compile.commands.measuring:report_command",
}

PROFILE = """\
Measure what a model loses when visual tokens take part in fewer layers, and when fewer of them enter:
the divergence from the original's first token, along each axis, on a few samples.

Samples are a JSON Lines file with an object per line:
  {"image": "photos/7.png", "prompt": "What does the sign say?", "answers": ["exit"]}
(paths relative to the file, a list for several images, answers optional), or a Hugging Face data set:
an id, or a local folder, with --split and the names of its columns.

Finished samples are kept beside --out, so that the same command goes on where it was stopped. Under
torchrun every process takes its share of the samples.
"""
SEARCH = """\
Find the best policy for each budget in measured divergences, and save it as OUT/<budget>.json. A budget is
a fraction of the original's policy FLOPs: eq. 11 at the token counts of the measured samples.

  split   (default) queries and keys apart: visual tokens may stop being updated and still be read
  dop     one depth for attention, one for the MLP, and a number of tokens: the paper's space

With --model and --samples the best candidates are run, and what only drops tokens with them: the best on one
half of the samples is taken, and its divergence on the other half reported, beside that of tokens only. What
is taken is then never worse than tokens only on the samples that it was taken by. Without a model the
predicted divergences decide, which are sums of curves.

--faithful is the search as published: at least alpha n_e visual tokens (C.4), and no comparison with fewer
tokens alone.
"""
GREEDY = """\
Sort operations by how little they are missed, one after the other (GSOP): finer than depths, and slower.
Any budget is a prefix of the order.
"""
REPORT = """\
Draw what was measured: divergence along each axis with 95 % confidence bands, divergence against policy
FLOPs, and which operations each policy keeps. With --model and --samples the policies are also run: measured
divergence, and right answers where samples have them.
"""


def add_search_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands by `command(name, summary, text, *parents)`, which makes a subparser."""
    metrics = ("top_k_kl", "kl", "forced_kl", "accuracy_drop")
    one = command("profile", "measure what pruning costs, on a few samples", PROFILE, samples_options(True))
    one.add_argument("model", metavar="MODEL", help="model directory or hub id")
    one.add_argument("--out", required=True, metavar="FILE", help="where the divergences go (JSON)")
    one.add_argument("--axis", action="append", metavar="NAME", help="measure this axis; repeat for several")
    one.add_argument("--metric", choices=metrics, default="top_k_kl", help="what is compared (top_k_kl)")
    one.add_argument("--tokens", type=positive, default=4, metavar="N", help="tokens that forced_kl compares (4)")
    one.add_argument("--reducer", default="uniform", metavar="NAME", help="who chooses visual tokens (uniform)")
    one.add_argument("--positions", choices=("original", "compact"), default="original", help="of kept tokens")

    two = command("search", "find a policy per budget", SEARCH, samples_options(False))
    two.add_argument("divergences", metavar="FILE", help="what profile wrote")
    two.add_argument("--budget", type=float, action="append", metavar="F", help="fraction of FLOPs; repeatable")
    two.add_argument("--max-kv-bytes", type=float, metavar="N", help="bytes of a sample's KV cache")
    two.add_argument("--max-ms", type=float, metavar="MS", help="prefill milliseconds, by --latency")
    two.add_argument("--latency", metavar="FILE", help="measured latencies; made by --model and --samples if missing")
    two.add_argument("--out", required=True, metavar="DIR", help="where the policies go")
    two.add_argument("--space", choices=("split", "dop"), default="split", help="of policies (split)")
    two.add_argument("--alpha", default="auto", help="at least alpha n_e visual tokens: a number, auto, or off")
    two.add_argument("--raw-curves", action="store_true", help="do not make the curves monotone")
    two.add_argument("--faithful", action="store_true", help="the search as published")
    two.add_argument(
        "--verify-top", type=positive, metavar="N", help="candidates that are run, with alpha and without (4; 1: none)"
    )
    two.add_argument("--model", metavar="MODEL", help="runs the candidates, and measures --latency")
    two.add_argument("--force", action="store_true", help="replace policies that are there")

    three = command("greedy", "sort operations by how little they are missed", GREEDY, samples_options(True))
    three.add_argument("model", metavar="MODEL", help="model directory or hub id")
    three.add_argument("--out", required=True, metavar="FILE", help="where the order goes (JSON)")
    three.add_argument("--metric", choices=metrics, default="top_k_kl", help="what is compared (top_k_kl)")
    three.add_argument("--reducer", default="uniform", metavar="NAME", help="who ranks visual tokens (uniform)")
    three.add_argument("--max-loss", type=float, metavar="X", help="mean loss at which the order ends")
    three.add_argument("--steps", type=positive, default=15, metavar="N", help="strides up to that loss (15)")
    three.add_argument("--budget", type=float, action="append", default=[], metavar="F", help="also print its policy")

    four = command("report", "tables and pictures", REPORT, samples_options(False))
    four.add_argument("divergences", metavar="FILE", help="what profile wrote")
    four.add_argument("--policy", action="append", default=[], metavar="[NAME=]FILE", help="a policy; repeat")
    four.add_argument("--out", required=True, metavar="DIR", help="where tables and pictures go")
    four.add_argument("--model", metavar="MODEL", help="run the policies on --samples")
    four.add_argument("--force", action="store_true", help="replace files that are there")
