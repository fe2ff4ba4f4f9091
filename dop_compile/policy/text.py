"""A policy as versioned JSON text.

Refused, naming the field and the file: unknown, missing or repeated fields; wrong types (a bool is no int);
NaN and Infinity; layers out of range, unsorted or repeated; another format or version. No pickle anywhere.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from typing import Any

from dop_compile.checks import choice, integer, pairs
from dop_compile.documents import Format, keep, kept, parse, read_text
from dop_compile.policy.operations import MODULES, Operation
from dop_compile.policy.provenance import Provenance
from dop_compile.policy.ranking import Ranking

__all__ = ["FORMAT", "decode", "encode", "read"]

FORMAT = Format("dop_compile.policy", (1, 2, 3), "a policy file", "save the policy again")
"""Version 1 had no rankings; before version 3 `divergence` was a predicted one or a measured one. A policy of which no
measured divergence is known is written as version 2, so that earlier releases read it."""
_FIELDS = (
    "num_layers",
    "visual_tokens",
    "reducer",
    "reducer_options",
    "positions",
    "salient_fraction",
    "ranking",
    "pruned",
    "provenance",
)
_PROVENANCE_FIELDS = ("model_fingerprint", "budget", "divergence", "samples", "versions", "measured_divergence")
# A raw newline cannot occur inside a JSON string, so this matches lists of layers and nothing else.
_LAYER_LIST = re.compile(r"\[\n[\d,\s]+\]")


def encode(policy: Any) -> str:
    """The JSON text of `policy`, one line per field and per list of layers."""
    source = policy.provenance
    newer = kept(policy)
    version = FORMAT.versions[-1]
    if not newer and (source is None or source.measured_divergence is None):
        version = 2
    document = {
        **FORMAT.header(version),
        "num_layers": policy.num_layers,
        "visual_tokens": policy.visual_tokens,
        "reducer": policy.reducer,
        "reducer_options": policy.options,
        "positions": policy.positions,
        "salient_fraction": policy.salient_fraction,
        "ranking": policy.ranking and policy.ranking.to_document(),
        "pruned": {
            group: {module: list(policy.pruned_layers(group, module)) for module in MODULES}
            for group in policy.prunable_groups
        },
        "provenance": source
        and {name: getattr(source, name) for name in _provenance_fields(version)} | {"versions": dict(source.versions)},
    } | newer
    text = json.dumps(document, indent=2, allow_nan=False)
    return _LAYER_LIST.sub(lambda match: re.sub(r"\s+", " ", match[0]).replace("[ ", "[").replace(" ]", "]"), text)


def _provenance_fields(version: int) -> tuple[str, ...]:
    return _PROVENANCE_FIELDS if version > 2 else _PROVENANCE_FIELDS[:-1]


def decode(text: str, where: str, policy_class: Any) -> Any:
    """The policy, of a class, of `encode`d text; ValueError starting with `where` for anything else."""
    if not isinstance(text, str):
        raise TypeError(f"{where}: expected JSON text, got {type(text).__name__}")
    try:
        opened = FORMAT.open(_object("document", parse(text), None))
        version, names = opened.version, tuple(name for name in _FIELDS if name != "ranking" or opened.version > 1)
        document = FORMAT.header(version) | opened.take(names)
        _object("document", document, ("format", "version", *names))
        source = document["provenance"]
        if source is not None:
            versions = _object("provenance", source, _provenance_fields(version))["versions"]
            source = Provenance(**source | {"versions": pairs("versions", _object("versions", versions, None))})
        options = _object("reducer_options", document["reducer_options"], None)
        fields = {name: document[name] for name in _FIELDS[:-3] if name != "reducer_options"}
        policy = policy_class(**fields, reducer_options=pairs("reducer_options", options), provenance=source)
        groups = _object("pruned", document["pruned"], policy.prunable_groups)
        pruned = [
            Operation(group, layer, module)
            for group in policy.prunable_groups
            for module, layers in _object(f"pruned.{group}", groups[group], MODULES).items()
            for layer in _layers(f"pruned.{group}.{module}", layers, policy.num_layers)
        ]
        ranking = document.get("ranking")
        found = policy.replace(pruned=pruned, ranking=ranking and Ranking.from_document(ranking))
        keep(found, opened)
        return found
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error


def read(path: str | os.PathLike[str], policy_class: Any) -> Any:
    """The policy in the file at `path`; ValueError naming the file, or the OSError of opening it."""
    return decode(read_text(path, "policy file "), f"policy file {os.fspath(path)}", policy_class)


def _object(field: str, value: object, names: tuple[str, ...] | None) -> dict[str, Any]:
    """`value` when it is a JSON object with exactly the fields `names` (None: any)."""
    if not isinstance(value, dict):
        raise TypeError(f"{field}: expected a JSON object, got {type(value).__name__}")
    if names is not None:
        prefix = "" if field == "document" else f"{field}."
        for name in names:
            if name not in value:
                raise ValueError(f"{prefix}{name}: the field is missing")
        for name in value:
            if name not in names:
                choice(f"{prefix}{name}: unknown field", name, names)
    return value


def _layers(field: str, value: object, num_layers: int) -> list[int]:
    if not isinstance(value, list):
        raise TypeError(f"{field}: expected a list of layers, got {type(value).__name__}")
    layers = [integer(field, layer, low=0, high=num_layers - 1) for layer in value]
    if any(a >= b for a, b in itertools.pairwise(layers)):
        raise ValueError(f"{field}: expected layers in increasing order, each once, got {layers}")
    return layers
