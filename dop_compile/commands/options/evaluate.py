"""Options of the command that compares methods: ``dop-compile eval``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from dop_compile.commands.options.common import positive, samples_options, share

__all__ = ["ACTIONS", "add_eval_command"]

ACTIONS = {
    "eval": "dop_compile.commands.evaluate:eval_command",
    "recommend": "dop_compile.commands.recommend:recommend_command",
}

RECOMMEND = """\
Find out which tier to serve, in one command: profile the model and search a policy for each budget on one
half of the samples, run the candidates, ask the other half of the questions of the original, of each policy
and of fewer tokens alone, and advise one of them.

  default        of the tiers that lose at most --max-loss of the answers the fastest; of those that are as
                 fast within 5 % the one that loses least, and of equals the cheapest
  --max-ms MS    the tier that loses least of those whose first token is there in time, vision and selection
                 included, on this machine

Samples are those of eval, with answers. Everything finished is kept in --out: the same command goes on
where it was stopped, and with other bounds nothing is run again. Under torchrun every process takes its
share of the samples.
"""

EVAL = """\
Compare methods on the same model and the same samples: right answers by task, FLOPs, KV cache, times of
vision, selection, prefill and decode, peak memory, and how many answers changed. Each --method is made
for each --budget, a fraction of the original's policy FLOPs (eq. 11 at the samples' token counts).

  original          the untouched model; always there
  full              the compiled model with nothing pruned
  REDUCER           that reducer alone: as many visual tokens as the budget allows (uniform, random, ...)
  resize            smaller pictures for the untouched model, where it takes pictures of any size
  fastv, pyramiddrop, sparsevlm, dart, fitprune
                    visual tokens leave inside the decoder; fitprune is fitted to the first 25 samples
  dop, split        the best policy of that space by --divergences
  dop+REDUCER       its depths and number of tokens, with another reducer

Besides these the policies given are compared, or the tiers saved with the model.

Samples are those of profile, with answers, and may name a task each:
  {"image": "photos/7.png", "prompt": "What does the sign say?", "answers": ["exit"], "task": "signs"}

Finished answers are kept beside the result, so that the same command goes on where it was stopped. With
further methods or budgets and the same --out these alone are run, and the others' results stay. Under
torchrun every process takes its share of the samples.
"""


def add_eval_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command by `command(name, summary, text, *parents)`, which makes a subparser."""
    one = command("eval", "compare methods at equal FLOPs", EVAL, samples_options(True))
    one.add_argument("model", metavar="MODEL", help="model directory or hub id")
    one.add_argument("--task-column", metavar="NAME", help="of a data set; one task for all unless given")
    one.add_argument("--method", action="append", default=[], metavar="NAME", help="a method; repeat for several")
    one.add_argument("--budget", type=float, action="append", default=[], metavar="F", help="fraction of FLOPs kept")
    one.add_argument("--policy", action="append", default=[], metavar="[NAME=]FILE", help="a policy, as it is")
    one.add_argument("--order", action="append", default=[], metavar="[NAME=]FILE", help="what greedy wrote (GSOP)")
    one.add_argument("--divergences", metavar="FILE", help="what profile wrote, for dop and split")
    one.add_argument("--positions", choices=("original", "compact"), default="original", help="of kept tokens")
    one.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="length of an answer (64)")
    one.add_argument("--out", required=True, metavar="DIR", help="where JSON, table and picture go")

    two = command("recommend", "find out which tier to serve", RECOMMEND, samples_options(True))
    two.add_argument("model", metavar="MODEL", help="model directory or hub id")
    two.add_argument("--task-column", metavar="NAME", help="of a data set; one task for all unless given")
    two.add_argument(
        "--budget", type=float, action="append", metavar="F", help="fraction of FLOPs; repeat (0.5 0.37 0.28 0.23)"
    )
    two.add_argument("--max-loss", type=share, default=0.01, metavar="X%", help="answers that may be lost (1%%)")
    two.add_argument("--max-ms", type=float, metavar="MS", help="most milliseconds to the first token")
    two.add_argument("--reducer", default="uniform", metavar="NAME", help="who chooses visual tokens (uniform)")
    two.add_argument("--space", choices=("split", "dop"), default="split", help="of policies (split)")
    two.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="length of an answer (64)")
    two.add_argument("--out", required=True, metavar="DIR", help="where policies, table and picture go")
