"""Options of the command for vLLM: ``dop-compile vllm``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

__all__ = ["ACTIONS", "add_vllm_command"]

ACTIONS = {"vllm": "dop_compile.commands.vllm:vllm_command"}

VLLM = """\
Write a directory that vLLM serves under a policy, without further options:

  dop-compile vllm ./my-model --policy 28%=p.json --out served
  vllm serve served

It has the model's files (linked, not copied, where the file system allows) and the policy in its configuration. vLLM
0.32 with dop_compile installed beside it knows such directories; docs/vllm.md says which models and policies it runs,
and what else. An engine serves one policy: of several, --tier chooses. Experimental: it has not run on a GPU.
"""


def add_vllm_command(command: Callable[..., argparse.ArgumentParser], policy: argparse.ArgumentParser) -> None:
    """Add the command by `command(name, summary, text, *parents)`, which makes a subparser."""
    one = command("vllm", "write a directory that vLLM serves under a policy", VLLM, policy)
    one.add_argument("model", metavar="MODEL", help="model directory or hub id")
    one.add_argument("--out", required=True, metavar="DIR", help="directory to make")
    one.add_argument("--force", action="store_true", help="replace DIR if it exists")
