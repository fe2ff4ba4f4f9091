"""Options that several commands share."""

from __future__ import annotations

import argparse

__all__ = ["BACKEND", "DTYPES", "count", "policy_options", "positive", "samples_options", "share"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
BACKEND = "eager (default), inductor (compiles first, then faster), or any backend of torch.compile"


def count(text: str) -> int:
    """A whole number >= 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {value}")
    return value


def positive(text: str) -> int:
    """A whole number >= 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number >= 1, got {value}")
    return value


def share(text: str) -> float:
    """A fraction, or a percentage: 0.01 or 1%."""
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a fraction or a percentage, such as 0.01 or 1%, got {text}")
    return value


share.__name__ = "fraction"
count.__name__ = positive.__name__ = "whole number"  # argparse names the type in its messages


def samples_options(required: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("samples")
    group.add_argument("--samples", required=required, metavar="FILE|ID", help="JSON Lines file, or data set")
    group.add_argument("--count", type=positive, metavar="N", help="draw N of them; all unless given")
    group.add_argument("--seed", type=count, default=0, metavar="N", help="of the draw (0)")
    group.add_argument("--skip-bad", action="store_true", help="leave out samples whose images do not decode")
    group.add_argument("--split", default="train", help="of a data set (train)")
    group.add_argument("--image-column", default="image", metavar="NAME", help="of a data set (image)")
    group.add_argument("--prompt-column", default="question", metavar="NAME", help="of a data set (question)")
    group.add_argument("--answers-column", metavar="NAME", help="of a data set; none unless given")
    group.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as saved")
    group.add_argument(
        "--tensor-parallel", action="store_true", help="torchrun's processes share one model, not the samples"
    )
    group.add_argument("--backend", default="eager", metavar="NAME", help="eager (default), inductor, ...")
    return parser


def policy_options(*, one_tier: bool = True) -> argparse.ArgumentParser:
    """Options that describe tiers, and choose one of them where the command is about `one_tier`."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("policy")
    group.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="a policy saved as JSON; repeat for several tiers (the name is the file's unless given); instead of those "
        "that were saved with the model. A published one: zoo:NAME/BUDGET (dop-compile zoo)",
    )
    if one_tier:
        group.add_argument("--tier", metavar="NAME", help="which of the tiers to use; the first unless given")
    for flag, text in (
        ("--mha-depth", "layers in which visual tokens take part in attention"),
        ("--mha-query-depth", "layers in which attention updates visual tokens (overrides --mha-depth)"),
        ("--mha-key-value-depth", "layers in which visual tokens can be read (overrides --mha-depth)"),
        ("--mlp-depth", "layers in which visual tokens pass the MLP"),
        ("--system-mha-depth", "the same as --mha-depth for the tokens before the first visual one"),
        ("--system-mlp-depth", "the same as --mlp-depth for the tokens before the first visual one"),
        ("--visual-tokens", "visual tokens per sample that enter the decoder"),
    ):
        group.add_argument(flag, type=count, metavar="N", help=text)
    group.add_argument("--reducer", metavar="NAME", help="who chooses the visual tokens: uniform (default), random")
    group.add_argument("--positions", choices=("original", "compact"), help="positions of kept tokens")
    return parser
