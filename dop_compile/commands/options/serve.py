"""Options of the command that serves: ``dop-compile serve``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from dop_compile.commands.options.common import BACKEND, DTYPES, policy_options, positive

__all__ = ["ACTIONS", "add_serve_command"]

ACTIONS = {"serve": "dop_compile.commands.serve:serve_command"}

SERVE = """\
Answer over HTTP as OpenAI's API does: /v1/chat/completions (pictures as data URLs, streaming), /v1/models
with a model per tier (NAME@28%) and NAME, whose tier is chosen by max_ms; /health, /metrics, and a page
to try it at /. Needs pip install dop_compile[serve].

The model runs in PyTorch; the policies given, or those saved with it, are its tiers. What export wrote is
served by OnnxPipeline and Triton instead (docs/serving.md).

Only this machine is served unless --host names another address, which then needs a key: in a file, or in the
variable DOP_COMPILE_API_KEY. Ctrl-C, or SIGTERM, finishes the requests that run.
"""


def _seconds(text: str) -> float:
    """A time above 0."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


_seconds.__name__ = "number"


def add_serve_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command by `command(name, summary, text, *parents)`, which makes a subparser."""
    one = command("serve", "answer over HTTP, as OpenAI's API does", SERVE, policy_options(one_tier=False))
    one.add_argument("model", metavar="MODEL", help="model directory or hub id")
    one.add_argument("--name", help="of the model in requests; unless given, the directory's")
    one.add_argument("--max-batch", type=positive, default=8, metavar="N", help="requests that run at once (8)")
    one.add_argument("--no-measure", action="store_true", help="start sooner, without latencies for max_ms")
    torch = one.add_argument_group("model")
    torch.add_argument("--backend", default="eager", metavar="NAME", help=BACKEND)
    torch.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as saved")
    torch.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    _add_access(one.add_argument_group("access"))
    _add_limits(one.add_argument_group("limits"))


def _add_access(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="to listen on (8000); 0: any free one")
    group.add_argument("--api-key-file", metavar="FILE", help="whose first line clients have to send as their key")
    group.add_argument("--no-api-key", action="store_true", help="let everyone in who reaches the address")
    group.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="by which clients may address it; repeat"
    )
    group.add_argument(
        "--image-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="from which pictures may be fetched, such as https://example.org; repeat. None unless given",
    )
    group.add_argument("--private-images", action="store_true", help="also where an origin's address is not public")
    group.add_argument("--access-log", action="store_true", help="print who asked, which path, and the status")


def _add_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--queue", type=positive, default=64, metavar="N", help="requests that wait at most (64)")
    group.add_argument("--queue-seconds", type=_seconds, default=60.0, metavar="S", help="that one waits at most (60)")
    group.add_argument("--request-seconds", type=_seconds, default=600.0, metavar="S", help="that one takes (600)")
    group.add_argument("--grace", type=positive, default=60, metavar="S", help="to finish at the end (60)")
    group.add_argument("--new-tokens", type=positive, default=256, metavar="N", help="unless a request says (256)")
    group.add_argument("--max-new-tokens", type=positive, default=1024, metavar="N", help="of an answer (1024)")
    group.add_argument("--max-ms", type=_seconds, metavar="MS", help="to the first token, unless a request says")
    group.add_argument("--max-images", type=positive, default=8, metavar="N", help="of a request (8)")
    group.add_argument(
        "--max-pixels", type=positive, default=16_000_000, metavar="N", help="of its pictures (16 million)"
    )
    group.add_argument("--max-bytes", type=positive, default=20 << 20, metavar="N", help="of a request (20 MiB)")
