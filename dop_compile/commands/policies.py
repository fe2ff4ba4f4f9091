"""The tiers that a command works with: from its options, else those that were saved with the model.

1. `--policy FILE` and options such as `--mha-depth` describe them; they replace saved ones, which is said on stderr.
   A FILE may be a published policy (`dop_compile.zoo`) of a model with the same sizes: zoo:NAME/BUDGET.
2. Otherwise they are those of the model's `dop_compile.json`, which `save_pretrained` of a compiled model writes.
3. `--tier NAME` is one of them.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Collection, Mapping
from pathlib import Path

from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from dop_compile.commands.inputs import load_config, located
from dop_compile.commands.usage import UsageError, one_line
from dop_compile.policy.policy import Policy
from dop_compile.policy.tiers import TIERS_FILE, load_policies
from dop_compile.zoo import PREFIX, find, split_reference

__all__ = ["NO_POLICY", "load_policy", "read_policies", "replacing", "saved_policies"]

NO_POLICY = (
    "no policy: give --policy FILE, or options such as --mha-depth and --visual-tokens; the model has no tiers of its "
    f"own ({TIERS_FILE})"
)
DEPTHS = ("mha_depth", "mha_query_depth", "mha_key_value_depth", "mlp_depth", "system_mha_depth", "system_mlp_depth")
POLICY_OPTIONS = (*DEPTHS, "visual_tokens", "reducer", "positions")


def read_policies(arguments: Namespace, layers: int, taken: Collection[str] = ()) -> dict[str, Policy]:
    """The tiers that the command line describes, or else the model's own; empty if there are none.

    `taken`: as in `replacing`.
    """
    given = _given(arguments, layers)
    tiers = replacing(given, arguments.model, taken)
    if arguments.tier is not None and arguments.tier not in tiers:
        what = "policies given" if given or not tiers else f"tiers saved with {arguments.model}"
        raise UsageError(f"--tier: {arguments.tier!r} is not one of the {what} ({', '.join(tiers) or 'none'})")
    return tiers


def replacing(given: Mapping[str, Policy], model: str, taken: Collection[str] = ()) -> dict[str, Policy]:
    """The policies of the command line, or else those saved with the model; says so where both are there.

    `taken`: names that the command gives to something else; a saved tier of such a name is called `NAME (saved)`.
    """
    try:
        saved = saved_policies(model)
    except UsageError:
        if not given:
            raise
        saved = {}
    if given and saved:
        names = ", ".join(saved)
        print(f"the policies given replace the tiers saved with {model} ({names})", file=sys.stderr)
    return dict(given) or {f"{name} (saved)" if name in taken else name: tier for name, tier in saved.items()}


def load_policy(model: str, file: str) -> Policy:
    """The policy in a file, or the published one that is named in its place, if it is for such a model.

    Raises:
        OSError, TypeError, ValueError: there is no such policy, or it is for another model.
        UsageError: the model's configuration cannot be read.
    """
    if not file.startswith(PREFIX):
        return Policy.load(file)
    name, budget = split_reference(file)
    find(name, budget)  # a wrong name is said before the configuration is looked for
    return Policy.published(name, budget, load_config(model))


def saved_policies(model: str) -> dict[str, Policy]:
    """The tiers that were saved with a model (a directory, its config.json, or a hub id); empty if there are none."""
    where = Path(located(model))
    if where.is_file():
        where = where.parent
    if where.is_dir() and not (where / TIERS_FILE).exists():
        return {}
    try:
        return load_policies(where if where.is_dir() else model)
    except ValueError as error:
        raise UsageError(f"tiers of {model!r}: {one_line(error)}") from error
    except OSError as error:
        if where.is_dir():
            raise UsageError(f"tiers of {model!r}: {one_line(error)}") from error
        cause = error.__cause__
        absent = isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError)
        if cause is not None and not absent:
            print(f"it is not known whether {model} has tiers of its own: {one_line(error)}", file=sys.stderr)
        return {}


def _depthwise(arguments: Namespace, layers: int) -> Policy | None:
    given = {name: value for name in POLICY_OPTIONS if (value := getattr(arguments, name)) is not None}
    if not given:
        return None
    if arguments.policy:
        raise UsageError("give either --policy or options such as --mha-depth, not both")
    try:
        return Policy.depthwise(layers, **given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"policy: {one_line(error)}") from error


def _given(arguments: Namespace, layers: int) -> dict[str, Policy]:
    policy = _depthwise(arguments, layers)
    tiers: dict[str, Policy] = {} if policy is None else {"policy": policy}
    for text in arguments.policy:
        name, separator, file = text.partition("=")
        if not separator or Path(text).exists():
            name, file = Path(text).stem, text
        if name in tiers:
            raise UsageError(f"--policy: the name {name!r} is given twice; name policies apart with NAME=FILE")
        try:
            tiers[name] = load_policy(arguments.model, file)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"policy {file!r}: {one_line(error)}") from error
    return tiers
