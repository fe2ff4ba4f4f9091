"""JSON documents: strict text, versions, and files that are written whole or not at all.

Every document has a `format` and a `version`: a whole number, the major version, or "major.minor". A release reads the
major versions that it knows. A minor version may add fields at the top level of a document: a release that does not
know them names them in a warning, and keeps them, so that the document is written again as it was (but of a file of
tiers, which is read as a plain mapping). A newer major version is refused.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["Document", "Format", "keep", "kept", "named", "parse", "read_text", "write_atomic"]


@dataclass(frozen=True)
class Format:
    """A kind of document.

    Args:
        name: what its `format` says.
        versions: major versions that are read, the one that is written last.
        what: what such a document is, for messages.
        again: what to do about another version.
    """

    name: str
    versions: tuple[int, ...]
    what: str
    again: str

    def header(self, version: int | None = None) -> dict[str, Any]:
        """The first two fields of a document."""
        return {"format": self.name, "version": self.versions[-1] if version is None else version}

    def open(self, document: object) -> Document:
        """A document of this kind.

        Raises:
            ValueError: another kind, or a version that this release does not read.
        """
        if not isinstance(document, dict) or document.get("format") != self.name:
            found = document.get("format") if isinstance(document, dict) else document
            raise ValueError(f"format: expected {self.name!r}, got {found!r}; this is not {self.what}")
        version = document.get("version")
        major, minor = _numbers(version)
        if major not in self.versions or (minor and major != self.versions[-1]):
            known = " and ".join(filter(None, (", ".join(map(str, self.versions[:-1])), str(self.versions[-1]))))
            plural = "s" if len(self.versions) > 1 else ""
            raise ValueError(f"version: this release reads version{plural} {known}, got {version!r}; {self.again}")
        fields = {name: value for name, value in document.items() if name not in ("format", "version")}
        return Document(fields, major, version if minor else None)


@dataclass
class Document:
    """A document's fields but for its header.

    Args:
        version: the major one.
        newer: as the document says it, where it has a minor version.
        unknown: fields that this release does not know.
    """

    fields: dict[str, Any]
    version: int
    newer: str | None = None
    unknown: dict[str, Any] = field(default_factory=dict)

    def take(self, names: Iterable[str], *, keeps: bool = True) -> dict[str, Any]:
        """The fields; of a newer minor version those of these names alone, and a warning about the others.

        Args:
            keeps: whether the others will be written again (`keep`), for the warning.
        """
        if self.newer is None:
            return self.fields
        names = set(names)
        self.unknown = {name: value for name, value in self.fields.items() if name not in names}
        if self.unknown:
            warnings.warn(
                f"version {self.newer}: {', '.join(self.unknown)}: not known to this release, which "
                + ("keeps them as they are and does nothing with them" if keeps else "leaves them out"),
                stacklevel=4,
            )
        return {name: value for name, value in self.fields.items() if name in names}


def _numbers(version: object) -> tuple[int, int]:
    """Major and minor; (-1, 0) for what is no version."""
    if type(version) is int:
        return version, 0
    if isinstance(version, str) and (found := re.fullmatch(r"(\d+)\.(\d+)", version)) is not None:
        return int(found[1]), int(found[2])
    return -1, 0


def keep(instance: object, document: Document) -> None:
    """Note on a value what its document had besides, for `kept`; values changed since have lost it."""
    if document.newer is not None:
        object.__setattr__(instance, "_kept_of_document", {"version": document.newer, **document.unknown})


def kept(instance: object) -> dict[str, Any]:
    """What to write with a value beside its own fields."""
    found: dict[str, Any] = getattr(instance, "_kept_of_document", {})
    return found


def read_text(path: str | os.PathLike[str], what: str = "") -> str:
    """The text of a file; ValueError naming it, after `what` it is, for one that is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}{os.fspath(path)}: expected UTF-8 JSON text, {error}") from error


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
