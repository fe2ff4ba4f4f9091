"""Strict values at a policy's door: field checks, the versioned JSON document, the atomic file.

Refused, naming the field and the file: unknown, missing or repeated fields; wrong types (a bool is no int);
NaN and Infinity; layers out of range, unsorted or repeated; another format or version. No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import itertools
import json
import math
import operator
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from dop_compile.policy import Policy

__all__ = [
    "FORMAT",
    "VERSION",
    "Provenance",
    "choice",
    "decode",
    "encode",
    "finite",
    "integer",
    "named",
    "pairs",
    "parse",
    "read",
    "store",
    "write_atomic",
]

FORMAT = "dop_compile.policy"
VERSION = 3
READABLE = (1, 2, 3)
"""Version 1 had no rankings; before version 3 `divergence` was a predicted one or a measured one. A policy of which no
measured divergence is known is written as version 2, so that earlier releases read it."""
_FIELDS = (
    "format",
    "version",
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


def store(instance: object, field: str, value: object) -> None:
    """Set a field of a frozen dataclass while it is being built."""
    object.__setattr__(instance, field, value)


def integer(field: str, value: object, *, low: int, high: int | None = None, none: str = "") -> int:
    """`value` as an int in [low, high]; TypeError for bool, float and the rest, ValueError out of range."""
    bounds = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    expected = f"expected {bounds}" + (f", or None ({none})" if none else "")
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{field}: {expected}, got {value!r}") from None
    if number < low or (high is not None and number > high):
        raise ValueError(f"{field}: {expected}, got {number}")
    return number


def finite(field: str, value: object) -> float:
    """`value` as a finite float; TypeError for bool and non-numbers, ValueError for NaN and infinities."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{field}: expected a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{field}: expected a finite number, got {value!r}")
    return number


def choice(field: str, value: object, choices: Iterable[str]) -> str:
    """`value` when it is one of `choices`, else an error that suggests the nearest."""
    names = tuple(choices)
    if not isinstance(value, str):
        raise TypeError(f"{field}: expected one of {', '.join(names)}, got {value!r}")
    if value not in names:
        nearest = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{field}: expected one of {', '.join(names)}, got {value!r}{hint}")
    return value


def pairs(field: str, value: object) -> tuple[tuple[str, Any], ...]:
    """A mapping, or an iterable of (name, value), as a tuple sorted by name."""
    items = value.items() if isinstance(value, Mapping) else value
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise TypeError(f"{field}: expected a mapping from names to values, got {value!r}")
    found: dict[str, Any] = {}
    for item in items:
        if not isinstance(item, tuple | list) or len(item) != 2 or not isinstance(item[0], str) or not item[0]:
            raise TypeError(f"{field}: expected (name, value) pairs with string names, got {item!r}")
        if item[0] in found:
            raise ValueError(f"{field}: the name {item[0]!r} is given twice; give each name once")
        found[item[0]] = item[1]
    return tuple(sorted(found.items(), key=operator.itemgetter(0)))


@dataclass(frozen=True)
class Provenance:
    """Where a policy comes from. Does not change what is executed, but is part of the policy's value.

    `budget`: fraction of policy FLOPs kept, in (0, 1]. `divergence`: the predicted one, a sum of measured curves;
    `measured_divergence`: that of the policy as a whole, run on samples. `versions`: package names and versions, given
    as a mapping or as pairs.
    """

    model_fingerprint: str | None = None
    budget: float | None = None
    divergence: float | None = None
    samples: int | None = None
    versions: tuple[tuple[str, str], ...] = ()
    measured_divergence: float | None = None

    def __post_init__(self) -> None:
        fingerprint = self.model_fingerprint
        if fingerprint is not None and not (isinstance(fingerprint, str) and fingerprint):
            raise TypeError(f"model_fingerprint: expected a non-empty string or None, got {fingerprint!r}")
        if self.budget is not None:
            budget = finite("budget", self.budget)
            if not 0 < budget <= 1:
                raise ValueError(f"budget: expected a fraction of FLOPs kept, 0 < budget <= 1, got {budget}")
            store(self, "budget", budget)
        for field in ("divergence", "measured_divergence"):
            if getattr(self, field) is not None:
                store(self, field, finite(field, getattr(self, field)))
        if self.samples is not None:
            store(self, "samples", integer("samples", self.samples, low=1))
        versions = pairs("versions", self.versions)
        for name, version in versions:
            if not isinstance(version, str):
                raise TypeError(f"versions[{name!r}]: expected a version string, got {version!r}")
        store(self, "versions", versions)


def encode(policy: Policy) -> str:
    """The JSON text of `policy`, one line per field and per list of layers."""
    # policy imports this module for the checks above, so its names are only there once it has been loaded.
    from dop_compile.policy import MODULES

    source = policy.provenance
    version = 2 if source is None or source.measured_divergence is None else VERSION
    document = {
        "format": FORMAT,
        "version": version,
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
    }
    text = json.dumps(document, indent=2, allow_nan=False)
    return _LAYER_LIST.sub(lambda match: re.sub(r"\s+", " ", match[0]).replace("[ ", "[").replace(" ]", "]"), text)


def _provenance_fields(version: int) -> tuple[str, ...]:
    return _PROVENANCE_FIELDS if version > 2 else _PROVENANCE_FIELDS[:-1]


def decode(text: str, where: str) -> Policy:
    """The policy of `encode`d text; ValueError starting with `where` for anything else."""
    from dop_compile.policy import MODULES, Operation, Policy
    from dop_compile.ranking import Ranking

    if not isinstance(text, str):
        raise TypeError(f"{where}: expected JSON text, got {type(text).__name__}")
    try:
        document = _object("document", parse(text), None)
        if document.get("format") != FORMAT:
            raise ValueError(f"format: expected {FORMAT!r}, got {document.get('format')!r}; this is not a policy file")
        version = document.get("version")
        if version not in READABLE or type(version) is not int:
            known = f"{', '.join(map(str, READABLE[:-1]))} and {READABLE[-1]}"
            raise ValueError(f"version: this release reads versions {known}, got {version!r}; save the policy again")
        _object("document", document, tuple(name for name in _FIELDS if name != "ranking" or version > 1))
        source = document["provenance"]
        if source is not None:
            versions = _object("provenance", source, _provenance_fields(version))["versions"]
            source = Provenance(**source | {"versions": pairs("versions", _object("versions", versions, None))})
        options = _object("reducer_options", document["reducer_options"], None)
        fields = {name: document[name] for name in _FIELDS[2:-3] if name != "reducer_options"}
        policy = Policy(**fields, reducer_options=pairs("reducer_options", options), provenance=source)
        groups = _object("pruned", document["pruned"], policy.prunable_groups)
        pruned = [
            Operation(group, layer, module)
            for group in policy.prunable_groups
            for module, layers in _object(f"pruned.{group}", groups[group], MODULES).items()
            for layer in _layers(f"pruned.{group}.{module}", layers, policy.num_layers)
        ]
        ranking = document.get("ranking")
        return policy.replace(pruned=pruned, ranking=ranking and Ranking.from_document(ranking))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error


def read(path: str | os.PathLike[str]) -> Policy:
    """The policy in the file at `path`; ValueError naming the file, or the OSError of opening it."""
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"policy file {os.fspath(path)}: expected UTF-8 JSON text, {error}") from error
    return decode(text, f"policy file {os.fspath(path)}")


def write_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file at `path` by `text` in one step; a failure leaves the previous file, and no other.

    Raises:
        OSError: naming `path`, not the file that is written beside it.
    """
    # Resolved so that a symbolic link keeps pointing at the file, rather than being replaced by one.
    target = Path(path).resolve()
    # Not tempfile: its 0600 would override the user's umask for the final file.
    scratch = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with scratch.open("x", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, target)
    except BaseException as error:
        with contextlib.suppress(OSError):  # of a folder that is no folder, or read-only
            scratch.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise named(error, path) from error
        raise


def named(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """The same error of the file or folder that the caller named."""
    return OSError(error.errno or errno.EIO, error.strerror or str(error), os.fspath(path))


def parse(text: str) -> object:
    """JSON text in which no field is given twice and every number is finite; ValueError for anything else."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error


def _unique(items: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in items]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(repeated)}: the field is given twice")
    return dict(items)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, got {name}; JSON has no such number")


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
