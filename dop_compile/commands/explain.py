"""`dop-compile explain`: what policies cost on a model, of which no weights are read."""

from __future__ import annotations

import functools
import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from dop_compile.commands.inputs import (
    compile_model,
    load_model_on_meta,
    write_file,
)
from dop_compile.commands.outputs import PLOT_DPI, check_new, output_file, picture_file
from dop_compile.commands.policies import read_policies
from dop_compile.commands.prompt_tokens import prompt_tokens
from dop_compile.commands.usage import UsageError, one_line
from dop_compile.policy.policy import Policy
from dop_compile.reports.explain import explain
from dop_compile.reports.picture import explain_figure

__all__ = ["explain_command"]


def explain_command(arguments: Namespace) -> None:
    """Print what policies cost on a model, of which no weights are read."""
    plot = picture_file("--plot", arguments.plot)
    if plot is not None:
        check_new([plot], arguments.force, "--plot")
    if arguments.save_policy:
        check_new([output_file(arguments.save_policy, "--save-policy")], arguments.force, "--save-policy")
    model = load_model_on_meta(arguments.model, arguments.dtype)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    tiers = read_policies(arguments, layers) or {"full": Policy.full(layers)}
    # A fingerprint covers weights, and there are none here
    compiled = compile_model(model, {name: p.replace(provenance=None) for name, p in tiers.items()}, "eager")
    tokens = prompt_tokens(arguments, model.config, tiers)
    counts = {"system": tokens.system, "visual": tokens.visual, "text": tokens.text, "rows": arguments.rows}
    try:
        result = replace(explain(compiled, arguments.tier, **counts), counts=tokens.why)
        figure = explain_figure(compiled, **counts) if plot is not None else None
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    if figure is not None and plot is not None:
        save = functools.partial(figure.savefig, format=plot.suffix[1:], dpi=PLOT_DPI)
        write_file(plot, save, "--plot")
        print(f"saved picture {plot}", file=sys.stderr)
    if arguments.save_policy:
        write_file(Path(arguments.save_policy).expanduser(), tiers[result.tier].to_json() + "\n", "--save-policy")
        print(f"saved policy {result.tier!r} to {arguments.save_policy}", file=sys.stderr)
    print(json.dumps(result.to_dict(), indent=1) if arguments.json else result)
