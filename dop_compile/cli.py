"""The command line: ``dop-compile explain|run|warmup|bench|demo|...``; `dop-compile --help` names all commands.

Exit codes: 0 done; 2 wrong usage or bad input, with one line on stderr that says what; 1 any other failure. `verify`
adds 1 for a tier that differs, and 3 for graphs that cannot run here. 130: stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence

from dop_compile import __version__
from dop_compile.commands.options import bench, evaluate, model, onnx, search, serve, vllm, zoo
from dop_compile.commands.options.common import policy_options
from dop_compile.commands.unused import check_unused, given_options
from dop_compile.commands.usage import UsageError
from dop_compile.logs import quiet_transformers

__all__ = ["main"]

ACTIONS = {
    name: action
    for options in (model, bench, search, evaluate, onnx, serve, vllm, zoo)
    for name, action in options.ACTIONS.items()
}
"""What does what a command says: loaded once it is run, since torch takes seconds."""

DESCRIPTION = """\
Compile a Hugging Face vision-language model so that its decoder skips the operations a policy prunes.

A policy says how many visual tokens enter the decoder, and in how many of its layers they take part in
attention and in the MLP. Each part is optional and keeps everything unless given:

  --visual-tokens 97         97 visual tokens per sample enter, chosen by --reducer
  --mha-depth 26             they take part in attention in layers 0 to 25
  --mlp-depth 19             they take part in the MLP in layers 0 to 18
  --mha-query-depth 8        from layer 8 on attention no longer updates them ...
  --mha-key-value-depth 28   ... but the text still reads them, up to layer 27

Text and generated tokens are always processed in full. Finer policies are written in Python
(Policy.from_operations) and saved as JSON files, which --policy reads.
"""
EXAMPLES = """\
examples:
  dop-compile demo --number 3 --out pictures
  dop-compile explain llava-hf/llava-1.5-7b-hf --mha-depth 26 --mlp-depth 19 --visual-tokens 97
  dop-compile explain ./my-model --mha-query-depth 8 --mha-key-value-depth 28 --save-policy policy.json
  dop-compile run ./my-model --image photo.jpg --prompt "What is this?" --policy policy.json --compare
  dop-compile warmup ./my-model --policy policy.json --batch-sizes 1 4 --padded --cache compiled
  dop-compile bench ./my-model --policy 28%=policy.json --batch 1 --batch 4 --out bench
  dop-compile profile ./my-model --samples samples.jsonl --out divergences.json
  dop-compile search divergences.json --budget 0.37 --budget 0.28 --out policies
  dop-compile report divergences.json --policy policies/37.json --policy policies/28.json --out report
  dop-compile recommend ./my-model --samples samples.jsonl --max-loss 1% --out advice
  dop-compile eval ./my-model --samples samples.jsonl --method random --budget 0.28 --out comparison
  dop-compile export ./my-model --policy 28%=policies/28.json --out exported
  dop-compile verify exported --samples samples.jsonl
  dop-compile serve ./my-model --policy 28%=policies/28.json --port 8000
  dop-compile vllm ./my-model --policy 28%=policies/28.json --out served
  dop-compile zoo show llava-1.5-7b 28%
"""
INTERRUPTED = 130
STOPPED = {
    **dict.fromkeys(("profile", "greedy", "eval", "recommend"), "the same command goes on with what is finished"),
    "search": "no policy was kept; the same command goes on with the samples that all candidates had",
    "warmup": "what was compiled is kept",
    "serve": "the server has ended",
}
NOTHING = "nothing was kept"
"""What Ctrl-C leaves behind, by command."""


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("dop-compile", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"dop_compile {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show a traceback where something fails")
    policy = policy_options()
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=text, epilog=EXAMPLES, formatter_class=raw, parents=[*parents, common]
        )

    model.add_model_commands(command, policy)
    bench.add_bench_command(command, policy)
    search.add_search_commands(command)
    evaluate.add_eval_command(command)
    onnx.add_onnx_commands(command, policy)
    serve.add_serve_command(command)
    vllm.add_vllm_command(command, policy)
    zoo.add_zoo_command(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # --help, or wrong usage that argparse has already reported
        return int(stop.code or 0)
    try:
        return _run(arguments, argv)
    except KeyboardInterrupt:
        print(f"dop-compile {arguments.command}: stopped; {STOPPED.get(arguments.command, NOTHING)}", file=sys.stderr)
        return INTERRUPTED


def _action(name: str, debug: bool) -> Callable[[argparse.Namespace], int | None]:
    """What a command does; libraries that it needs say nothing while they are imported, unless someone debugs."""
    before = logging.root.manager.disable
    if not debug:
        logging.disable(max(before, logging.WARNING))
    try:
        module, _, function = ACTIONS[name].partition(":")
        action: Callable[[argparse.Namespace], int | None] = getattr(importlib.import_module(module), function)
    finally:
        logging.disable(before)
    if not debug and "transformers" in sys.modules:
        quiet_transformers()
    return action


def _run(arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    try:
        check_unused(arguments, given_options(_parser(), argv))
        code = _action(arguments.command, arguments.debug)(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `dop-compile explain ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UsageError as error:
        if arguments.debug:
            raise
        print(f"dop-compile {arguments.command}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if arguments.debug:
            raise
        message = " ".join(str(error).split())
        if isinstance(error, OSError) and error.filename is not None:  # a full disk, for example
            message = f"{error.filename}: {error.strerror}"
        print(f"dop-compile {arguments.command}: {type(error).__name__}: {message}", file=sys.stderr)
        return 1
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
