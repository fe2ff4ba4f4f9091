"""Options that a command would not look at are refused: whoever gives one expects that it does something."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Collection, Sequence
from pathlib import Path

from dop_compile.commands.usage import UsageError

__all__ = ["check_unused", "given_options"]

OF_A_DATA_SET = ("split", "image_column", "prompt_column", "answers_column", "task_column")
RUNNING = (
    *("model", "samples", "count", "seed", "skip_bad", *OF_A_DATA_SET),
    *("device", "dtype", "tensor_parallel", "backend"),
)
"""What says how `search` and `report` run policies."""


def given_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> frozenset[str]:
    """Names of the arguments that the command line gives; the parser has no defaults afterwards."""
    _without_defaults(parser)
    return frozenset(vars(parser.parse_args(argv)))


def _without_defaults(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        if isinstance(action, argparse._SubParsersAction):
            for own in action.choices.values():
                _without_defaults(own)


def check_unused(arguments: Namespace, given: Collection[str]) -> None:
    """Raises UsageError for an option that has no effect beside the others; the message says what it needs."""
    if "policy" in arguments and "visual_tokens" in arguments and not arguments.policy:
        _check_policy(given)
    if "samples" in arguments:
        _check_samples(arguments, given)
    check = {
        "profile": _check_profile,
        "search": _check_search,
        "report": _check_report,
        "eval": _check_eval,
        "serve": _check_serve,
    }
    if arguments.command in check:
        check[arguments.command](arguments, given)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refuse(names: Collection[str], given: Collection[str], why: str) -> None:
    for name in names:
        if name in given:
            raise UsageError(f"{_flag(name)}: {why}")


def _check_policy(given: Collection[str]) -> None:
    if "visual_tokens" not in given:
        _refuse(["reducer", "positions"], given, "it is of the visual tokens that enter; give also --visual-tokens N")
    if {"mha_query_depth", "mha_key_value_depth"} <= set(given):
        _refuse(["mha_depth"], given, "--mha-query-depth and --mha-key-value-depth take its place; leave it out")


def _check_samples(arguments: Namespace, given: Collection[str]) -> None:
    source = arguments.samples
    if source is not None and (Path(source).suffix in (".jsonl", ".json") or Path(source).expanduser().is_file()):
        _refuse(OF_A_DATA_SET, given, f"it is of a data set, and --samples {source!r} is a file")
    if "count" not in given and "samples" in given:
        _refuse(["seed"], given, "it is of the draw; give also --count N")


def _check_profile(arguments: Namespace, given: Collection[str]) -> None:
    if arguments.metric != "forced_kl":
        _refuse(["tokens"], given, f"--metric {arguments.metric} compares no number of tokens; forced_kl does")


def _check_pair(given: Collection[str], what: str) -> None:
    """A model and samples: both, or nothing that is of them."""
    missing = [name for name in ("model", "samples") if name not in given]
    if len(missing) == 1:
        other = "samples" if missing == ["model"] else "model"
        raise UsageError(f"{_flag(other)}: {what}; give also {_flag(missing[0])}")
    if missing:
        _refuse(RUNNING, given, f"{what}; give also --model and --samples")


def _check_search(arguments: Namespace, given: Collection[str]) -> None:
    if "max_ms" not in given:
        _refuse(["latency"], given, "it is what --max-ms is read from; give also --max-ms MS")
    if not arguments.budget:
        _refuse(["alpha"], given, "it is of a --budget; give one, or leave it out")
    runs = (arguments.verify_top or 0) > 1 or (arguments.verify_top is None and not arguments.faithful)
    if (arguments.verify_top or 0) > 1 and ("model" not in given or "samples" not in given):
        raise UsageError("--verify-top: give also --model and --samples, on which the candidates are measured")
    if runs or "latency" in given:
        _check_pair(given, "candidates and latencies are measured of a model on samples")
    else:
        _refuse(RUNNING, given, "nothing is run: give also --verify-top N, or --latency to measure times")


def _check_report(arguments: Namespace, given: Collection[str]) -> None:
    _check_pair(given, "policies are run on samples by a model")
    if not arguments.policy:
        _refuse(RUNNING, given, "there is nothing to run; give also --policy FILE")


def _check_eval(arguments: Namespace, given: Collection[str]) -> None:
    # Imported late: it takes seconds
    from dop_compile.evaluation.in_decoder import IN_DECODER
    from dop_compile.evaluation.methods import FULL, ORIGINAL, RESIZE
    from dop_compile.search.candidates import SPACES

    methods = set(arguments.method)
    if not any(name.partition("+")[0] in SPACES for name in methods):
        _refuse(["divergences"], given, "no method is found in it; name one: dop, split, dop+REDUCER, split+REDUCER")
    alone = methods - {FULL, ORIGINAL, RESIZE, *IN_DECODER}
    if not any(name.partition("+")[0] not in SPACES for name in alone):
        _refuse(["positions"], given, "it is of reducers alone; the methods given bring their own")
    if methods <= {ORIGINAL, RESIZE} and not arguments.policy and not arguments.order:
        _refuse(["backend"], given, "nothing is compiled: the original and resize run as they are")


def _check_serve(arguments: Namespace, given: Collection[str]) -> None:
    if arguments.no_measure:
        _refuse(["max_ms"], given, "--no-measure leaves out what it needs; leave one of them out")
