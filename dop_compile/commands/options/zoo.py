"""Options of the command for published policies: ``dop-compile zoo``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

__all__ = ["ACTIONS", "add_zoo_command"]

ACTIONS = {"zoo": "dop_compile.commands.zoo:zoo_command"}

ZOO = """\
List the policies that papers have published for particular models, what they cost and what they assume. Their
numbers are the papers'; only FLOPs are counted again here, by eq. 11, and nothing was measured again.

  dop-compile zoo                           all of them
  dop-compile zoo --model MODEL             those whose model has the sizes of this one's configuration
  dop-compile zoo show NAME BUDGET          one of them, layer by layer; --out FILE writes it
  dop-compile zoo --hub                     repositories of the hub that push_policies(..., tag=True) has marked

Where a command takes --policy FILE, zoo:NAME/BUDGET is one of them, such as zoo:llava-1.5-7b/28%. It is refused
for a model of other sizes; a file written by `show --out` is read as any other.
"""
SHOW = """\
Print a published policy: which layers its visual tokens take part in, how many tokens that is for the published
picture, what it costs by eq. 11, where it was published, and what it assumes.
"""


def add_zoo_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command by `command(name, summary, text, *parents)`, which makes a subparser."""
    one = command("zoo", "policies that were published for particular models", ZOO)
    one.add_argument("--model", metavar="MODEL", help="only what fits: a model directory, config.json, or hub id")
    one.add_argument("--hub", action="store_true", help="search the hub for policies that others have pushed")
    actions = one.add_subparsers(dest="action", metavar="show")
    raw = argparse.RawDescriptionHelpFormatter
    show = actions.add_parser("show", help="print one of them, or write it", description=SHOW, formatter_class=raw)
    show.add_argument("name", metavar="NAME", help="of a model, as listed")
    show.add_argument("budget", metavar="BUDGET", help="as listed: 28%%, shortv")
    show.add_argument("--out", metavar="FILE", help="write the policy as JSON")
    show.add_argument("--force", action="store_true", help="replace a file that is there")
