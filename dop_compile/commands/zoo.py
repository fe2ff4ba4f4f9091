"""`dop-compile zoo`: the policies that were published for particular models."""

from __future__ import annotations

import itertools
import sys
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dop_compile.commands.inputs import load_config, write_file
from dop_compile.commands.outputs import check_new, output_file
from dop_compile.commands.usage import UsageError, one_line, usage_errors
from dop_compile.policy.costs import layer_flops, policy_tokens, prefill_flops_ratio
from dop_compile.policy.hub import TAG, pushed_policies
from dop_compile.policy.policy import Policy
from dop_compile.reports.counts import SYSTEM, TEXT
from dop_compile.reports.table import POLICY_FLOPS, columns, show_flops, show_percent
from dop_compile.zoo import PublishedModel, PublishedPolicy, find, published_for, published_policies
from dop_compile.zoo.catalogue import METHODS, MODELS

__all__ = ["zoo_command"]

WIDTH = 110
HEAD = ("name", "budget", POLICY_FLOPS, "published", "accuracy", "method", "source")
COUNTED = (
    f"{POLICY_FLOPS}: of the original's, by eq. 11 of DOP and this package, for {SYSTEM} system tokens, the visual "
    f"tokens of the published picture and {TEXT} text tokens. published, accuracy: what the papers say of their own "
    "FLOPs, and of the mean of their benchmarks relative to the original; - where it is not known. Nothing was "
    "measured again here."
)


def zoo_command(arguments: Namespace) -> None:
    """List published policies, all or those that fit a model; show or write one; or search the hub."""
    if arguments.action == "show":
        for name in ("model", "hub"):
            if getattr(arguments, name):
                raise UsageError(f"--{name}: show prints the policy that is named; leave it out")
        _show(arguments)
    elif arguments.hub:
        if arguments.model is not None:
            raise UsageError("--model: repositories of the hub are not compared with a model; leave out --hub or this")
        _hub()
    elif arguments.model is None:
        print(_listed(published_policies()))
    else:
        _fitting(arguments.model, load_config(arguments.model))


def _listed(policies: Sequence[PublishedPolicy]) -> str:
    """A table, and what the policies in it assume."""
    rows = [HEAD, *(_row(policy) for policy in policies)]
    notes = [COUNTED]
    for method in METHODS:
        if any(policy.method is method for policy in policies):
            notes.append(f"{method.name} ({method.paper}): {method.assumes}")
    return "\n\n".join(["\n".join(columns(rows, left=(0, 1, 5, 6))), *(textwrap.fill(note, WIDTH) for note in notes)])


def _row(policy: PublishedPolicy) -> tuple[str, ...]:
    published = "-" if policy.flops is None else f"{100 * policy.flops:g} %"
    recomputed = show_percent(_recomputed(policy))
    accuracy = show_percent(policy.accuracy)
    return policy.name, policy.budget, recomputed, published, accuracy, policy.method.name, policy.source


def _recomputed(policy: PublishedPolicy) -> float:
    own = Policy.published(policy.name, policy.budget)
    return prefill_flops_ratio(policy.model.geometry.dims, own, SYSTEM, policy.model.visual_tokens, TEXT)


def _fitting(name: str, config: Any) -> None:
    """The policies that fit a configuration; else how the nearest model differs."""
    if names := published_for(config):
        print(_listed([policy for policy in published_policies() if policy.name in names]))
        print()
        print(textwrap.fill(f"{name} has these models' sizes; its weights were not compared with theirs.", WIDTH))
        return

    def distance(model: PublishedModel) -> int:
        return len(model.geometry.differences(config))

    nearest = min(MODELS, key=distance)
    print(f"no published policy fits {name}. The nearest model is {nearest.name} ({nearest.checkpoint}); this one has")
    print("\n".join(f"  {difference}" for difference in nearest.geometry.differences(config)))


def _show(arguments: Namespace) -> None:
    with usage_errors():
        entry = find(arguments.name, arguments.budget)
        policy = Policy.published(arguments.name, arguments.budget)
    if arguments.out is None and arguments.force:
        raise UsageError("--force: nothing is written without --out")
    if arguments.out is not None:
        path = output_file(arguments.out)
        check_new([path], arguments.force)
        write_file(path, policy.to_json() + "\n")
        print(f"saved policy {entry.reference} to {Path(arguments.out)}", file=sys.stderr)
    model = entry.model
    entering = model.visual_tokens if policy.visual_tokens is None else policy.visual_tokens
    published = "not known" if entry.flops is None else f"{100 * entry.flops:g} %"
    accuracy = f"; accuracy {show_percent(entry.accuracy)} of the original's ({entry.accuracy_source})"
    costs = (
        f"{POLICY_FLOPS}: {show_percent(_recomputed(entry))} of the original's, for {SYSTEM} system + "
        f"{model.visual_tokens} visual ({entering} enter) + {TEXT} text tokens, {model.picture}. As published: FLOPs "
        f"{published}{accuracy if entry.accuracy is not None else ''}. Nothing was measured again here."
    )
    head = f"{entry.reference}, for {model.checkpoint}: {entry.method.name} ({entry.method.paper}; {entry.source})"
    assumes = f"Assumed: {entry.assumes}"
    print(f"{head}\n{policy}\n")
    print("\n".join(_layers(entry, policy)))
    print(f"\n{textwrap.fill(costs, WIDTH)}\n\n{textwrap.fill(assumes, WIDTH)}")


def _layers(entry: PublishedPolicy, policy: Policy) -> list[str]:
    """Tokens and FLOPs per layer, equal neighbours in one row."""
    dims = entry.model.geometry.dims
    tokens = policy_tokens(policy, SYSTEM, entry.model.visual_tokens, TEXT)
    rows: list[tuple[str, ...]] = [("layer", "queries", "keys/values", "MLP", POLICY_FLOPS)]
    for counts, group in itertools.groupby(range(policy.num_layers), key=lambda layer: tokens[layer]):
        layers = list(group)
        name = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
        flops = show_flops(layer_flops(dims, counts, layers[0]))
        rows.append((name, str(counts.query), str(counts.key_value), str(counts.mlp), flops))
    return columns(rows)


def _hub() -> None:
    try:
        found = pushed_policies()
    except OSError as error:
        raise UsageError(f"--hub: {one_line(error)}") from error
    if not found:
        print(f"no repository of the hub has the tag {TAG} and a file of tiers")
        return
    rows = [("repository", "downloads", "changed"), *((one.name, str(one.downloads), one.changed) for one in found)]
    print("\n".join(columns(rows, left=(0, 2))))
    print(
        "\nload_policies(NAME) reads their tiers. They are their authors': how they were found is not known here, and "
        "nothing was measured."
    )
